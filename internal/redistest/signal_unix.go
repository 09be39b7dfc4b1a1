//go:build unix

package redistest

import "syscall"

// pauseProcess stops the process, and resumeProcess continues it.
func pauseProcess(pid int) error  { return syscall.Kill(pid, syscall.SIGSTOP) }
func resumeProcess(pid int) error { return syscall.Kill(pid, syscall.SIGCONT) }
