//go:build !unix

package limit

// OpenFiles returns false, because the limit of this system is unknown.
func OpenFiles() (int, bool) { return 0, false }
