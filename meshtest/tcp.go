package meshtest

import (
	"errors"
	"io"
	"net"
	"time"
)

// accept serves the TCP listener until Close.
func (r *Redis) accept() {
	for {
		conn, err := r.listener.Accept()
		switch {
		case err == nil:
			r.bridge(conn)
		case errors.Is(err, net.ErrClosed):
			return
		default: // out of file descriptors, most likely
			select {
			case <-r.stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
}

// bridge connects a TCP connection to a new one in memory, which gives it the same
// buffers and the same faults. Only accept calls it.
func (r *Redis) bridge(conn net.Conn) {
	mem, err := r.connect(&link{})
	if err != nil {
		reset(conn)
		return
	}
	r.wg.Go(func() {
		_, _ = io.Copy(mem, conn) // either end may break at any time
		_ = mem.Close()
	})
	r.wg.Go(func() {
		if _, err := io.Copy(conn, mem); err != nil {
			reset(conn)
		}
		_ = conn.Close()
	})
}

// reset closes a connection such that the other end sees a reset.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
