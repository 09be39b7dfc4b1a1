//go:build unix

package limit

import (
	"math"
	"syscall"
)

// OpenFiles returns how many files, sockets among them, this process may have
// open at once (ulimit -n). False: that is unknown or unlimited.
func OpenFiles() (int, bool) {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return 0, false
	}
	if most := uint64(r.Cur); most < math.MaxInt32 { // RLIM_INFINITY is more, and on some systems negative
		return int(most), true
	}
	return 0, false
}
