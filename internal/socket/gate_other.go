//go:build !unix

package socket

import (
	"net"
	"syscall"
)

// rawOf returns nil: nothing can be tried without waiting for it here, and what
// follows is never called.
func rawOf(net.Conn) syscall.RawConn { return nil }

func (g *gate) await() error { panic("unreachable") }

type attempt struct{}

func newAttempt() *attempt { return nil }

func (a *attempt) try(syscall.RawConn, []byte) (int, error) { panic("unreachable") }
