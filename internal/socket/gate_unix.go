//go:build unix

package socket

import (
	"io"
	"net"
	"os"
	"syscall"
)

// rawOf returns access to reads and writes without waiting. It returns nil if that is not
// possible, for example for an encrypted connection.
func rawOf(conn net.Conn) syscall.RawConn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil // it is closed; reading returns the error
	}
	return raw
}

// await returns when data has been read, or when reading has ended. It needs little
// stack, which is most of the memory of an idle connection.
func (g *gate) await() error {
	var failed error
	err := g.raw.Read(func(fd uintptr) bool {
		in := chunks.Get().(*chunk)
		n, err := syscall.Read(int(fd), in.data[:])
		for err == syscall.EINTR {
			n, err = syscall.Read(int(fd), in.data[:])
		}
		switch {
		case err == nil && n > 0:
			in.from, in.to = 0, n
			g.in = in
			return true
		case err == nil:
			failed = io.EOF
		case err != syscall.EAGAIN:
			failed = os.NewSyscallError("read", err)
		}
		chunks.Put(in)
		return failed != nil
	})
	if failed != nil {
		return failed
	}
	return err
}

// attempt is one write that does not wait.
type attempt struct {
	data []byte
	n    int // number of bytes that were written
	err  error
	once func(fd uintptr) bool // run, made once
}

func newAttempt() *attempt {
	a := new(attempt)
	a.once = a.run
	return a
}

func (a *attempt) run(fd uintptr) bool {
	a.n, a.err = syscall.Write(int(fd), a.data)
	for a.err == syscall.EINTR {
		a.n, a.err = syscall.Write(int(fd), a.data)
	}
	if a.err == syscall.EAGAIN {
		a.err = nil
	}
	a.n = max(a.n, 0)
	return true
}

// try writes as much of data as possible without waiting, and returns the number of
// bytes. No other goroutine may be writing, because then it would wait after all.
func (a *attempt) try(raw syscall.RawConn, data []byte) (int, error) {
	a.data, a.n, a.err = data, 0, nil
	err := raw.Write(a.once)
	a.data = nil
	if err == nil && a.err != nil {
		err = os.NewSyscallError("write", a.err)
	}
	return a.n, err
}
