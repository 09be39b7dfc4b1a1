//go:build unix

package redistest

import "syscall"

// pauseProcess stops the process as it stands; resumeProcess lets it go on.
func pauseProcess(pid int) error  { return syscall.Kill(pid, syscall.SIGSTOP) }
func resumeProcess(pid int) error { return syscall.Kill(pid, syscall.SIGCONT) }
