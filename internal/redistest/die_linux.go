package redistest

import "syscall"

// dieWithParent makes the kernel kill the child when the thread that started it ends, so
// that no server outlives a test binary that was killed.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
