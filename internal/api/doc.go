// Package api lists what the public packages export, so that no change of it
// goes unnoticed. The listings are in the directory api at the root, one file
// per package and one line per name, in the manner of Go's own. After a change
// of the API:
//
//	go test ./internal/api -update
//
// and a line in CHANGELOG.md in the same commit: .ci/api looks for it.
package api
