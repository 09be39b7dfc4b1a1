//go:build !unix

package limit

// OpenFiles returns false: this system has no such limit, or does not tell.
func OpenFiles() (int, bool) { return 0, false }
