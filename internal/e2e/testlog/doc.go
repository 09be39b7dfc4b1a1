// Package testlog has loggers whose lines tests read. It does not import mesh, so that
// tests of unexported parts can use it, too.
package testlog
