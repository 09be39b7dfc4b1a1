//go:build unix

package limit

import (
	"math"
	"syscall"
)

// OpenFiles returns the number of files, including sockets, that this process may have
// open at once (ulimit -n). It returns false if there is no limit or it is unknown.
func OpenFiles() (int, bool) {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return 0, false
	}
	// RLIM_INFINITY is larger, and negative on systems with a signed limit.
	if most := uint64(r.Cur); most < math.MaxInt32 { //nolint:unconvert // signed on some systems
		return int(most), true
	}
	return 0, false
}
