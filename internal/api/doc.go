// Package api lists the exported names of the public packages, so that no change of the
// API goes unnoticed. The listings are in the directory api at the root, one file per
// package and one line per name, in the style of Go's own api directory. After a change
// of the API run
//
//	go test ./internal/api -update
//
// and add a line to CHANGELOG.md in the same commit. The script .ci/api checks that.
package api
