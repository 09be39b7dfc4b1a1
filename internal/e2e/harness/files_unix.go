//go:build unix

package harness

import (
	"syscall"
)

// limitFiles limits the number of open files of this process.
func limitFiles(most int) error {
	var r syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &r); err != nil {
		return err
	}
	r.Cur = uint64(most)
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &r)
}
