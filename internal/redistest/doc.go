// Package redistest starts real Redis servers for tests, stops, kills and
// pauses them, and puts a faulty network in front of them. Importing it is for
// tests only.
//
// The binary is redis-server of the PATH, or what the environment variable
// MESH_REDIS_SERVER names: a path or a name, "valkey-server" for instance.
// Where there is none, tests are skipped; with MESH_REQUIRE_REDIS=1 they fail.
//
// Nothing has a fixed port, so any number of tests and of test binaries may
// run at the same time.
package redistest
