//go:build !unix

package socket

import (
	"net"
	"syscall"
)

// rawOf returns nil, because reads and writes without waiting are not possible here. The
// functions below are never called.
func rawOf(net.Conn) syscall.RawConn { return nil }

func (g *gate) await() error { panic("unreachable") }

type attempt struct{}

func newAttempt() *attempt { return nil }

func (a *attempt) try(syscall.RawConn, []byte) (int, error) { panic("unreachable") }
