//go:build !linux

package redistest

import "syscall"

// dieWithParent does nothing, because only Linux offers it. A test binary that is killed
// leaves its servers behind.
func dieWithParent() *syscall.SysProcAttr { return nil }
