package meshtest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

const (
	// requestLimit limits the bytes that a client may send ahead. Then it has to wait, as
	// for a full socket buffer.
	requestLimit = 256 << 10
	// replyLimit limits the bytes that a client may leave unread before its connection is
	// cut. It is the hard limit of client-output-buffer-limit for pub/sub clients in
	// redis.conf. Below the limit the server never waits for a client. On a net.Pipe it
	// would, and one slow subscriber would stop every command.
	replyLimit = 32 << 20
)

// memConn is one end of an in-memory connection.
type memConn struct {
	in, out       *stream
	local, remote net.Addr // nil: memAddr
	once          sync.Once
	onClose       func() // called once by Close or abort; may be nil
}

// memPipe returns the two ends of a new connection to a Redis.
func memPipe() (client, srv *memConn) {
	requests := newStream(requestLimit, false)
	replies := newStream(replyLimit, true)
	return &memConn{in: replies, out: requests}, &memConn{in: requests, out: replies}
}

// socketPipe returns the two ends of a new connection to a Server. Both directions have a
// buffer, like two sockets.
func socketPipe(client, srv net.Addr) (near, far *memConn) {
	up, down := newStream(requestLimit, false), newStream(requestLimit, false)
	return &memConn{in: down, out: up, local: client, remote: srv}, &memConn{in: up, out: down, local: srv, remote: client}
}

// Read implements [net.Conn].
func (c *memConn) Read(p []byte) (int, error) { return c.in.read(p) }

// Write implements [net.Conn].
func (c *memConn) Write(p []byte) (int, error) {
	n, full, err := c.out.write(p)
	if full {
		c.abort()
	}
	return n, err
}

// Close implements [net.Conn]. The other end may still read the data that was written.
func (c *memConn) Close() error {
	c.in.end(net.ErrClosed, opError("write", syscall.EPIPE))
	c.out.end(io.EOF, net.ErrClosed)
	c.closed()
	return nil
}

// abort ends the connection like a reset. Data on the way is lost.
func (c *memConn) abort() {
	for _, s := range []*stream{c.in, c.out} {
		s.drop()
		s.end(opError("read", syscall.ECONNRESET), opError("write", syscall.ECONNRESET))
	}
	c.closed()
}

func (c *memConn) closed() {
	c.once.Do(func() {
		if c.onClose != nil {
			c.onClose()
		}
	})
}

// LocalAddr implements [net.Conn].
func (c *memConn) LocalAddr() net.Addr { return addrOr(c.local) }

// RemoteAddr implements [net.Conn].
func (c *memConn) RemoteAddr() net.Addr { return addrOr(c.remote) }

func addrOr(a net.Addr) net.Addr {
	if a == nil {
		return memAddr{}
	}
	return a
}

// SetDeadline implements [net.Conn].
func (c *memConn) SetDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

// SetReadDeadline implements [net.Conn].
func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	return nil
}

// SetWriteDeadline implements [net.Conn].
func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

type memAddr struct{}

// Network implements [net.Addr].
func (memAddr) Network() string { return "memory" }

// String implements [net.Addr].
func (memAddr) String() string { return "meshtest" }

func opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "memory", Addr: memAddr{}, Err: err}
}

func refused() error { return opError("dial", syscall.ECONNREFUSED) }

// stream is one direction of a connection.
type stream struct {
	limit  int
	cutOff bool // if the stream is full, fail instead of waiting

	// mu guards the fields below. Each change to them signals cond.
	mu       sync.Mutex
	cond     *sync.Cond
	buf      bytes.Buffer
	readErr  error // the result of a read once buf is empty; nil: it waits
	writeErr error // the result of a write; nil: it succeeds
	readBy   alarm
	writeBy  alarm
}

// alarm is a deadline. Its timer wakes waiting readers and writers.
type alarm struct {
	at    time.Time
	timer *time.Timer
}

func (a *alarm) passed() bool { return !a.at.IsZero() && !time.Now().Before(a.at) }

func newStream(limit int, cutOff bool) *stream {
	s := &stream{limit: limit, cutOff: cutOff}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *stream) read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.readBy.passed():
			return 0, opError("read", os.ErrDeadlineExceeded)
		case s.buf.Len() > 0:
			n, err := s.buf.Read(p)
			s.cond.Broadcast()
			return n, err
		case s.readErr != nil:
			return 0, s.readErr
		case len(p) == 0:
			return 0, nil
		}
		s.cond.Wait()
	}
}

// write puts all of p into the stream. full says that the reader left too much unread, so
// that its connection must be cut.
func (s *stream) write(p []byte) (n int, full bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.writeErr != nil:
			return n, false, s.writeErr
		case s.writeBy.passed():
			return n, false, opError("write", os.ErrDeadlineExceeded)
		case n == len(p):
			return n, false, nil
		}
		room := s.limit - s.buf.Len()
		if s.cutOff && room < len(p) {
			return n, true, opError("write", syscall.ECONNRESET)
		}
		if room <= 0 {
			s.cond.Wait()
			continue
		}
		part := p[n:min(len(p), n+room)]
		s.buf.Write(part) // cannot fail
		n += len(part)
		s.cond.Broadcast()
	}
}

// end sets the errors of readers and writers from now on, and stops the alarms. The first
// errors stay, except that an end that closed itself gets net.ErrClosed.
func (s *stream) end(readErr, writeErr error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	reader, writer := errors.Is(readErr, net.ErrClosed), errors.Is(writeErr, net.ErrClosed)
	if s.readErr == nil || reader {
		s.readErr = readErr
	}
	if s.writeErr == nil || writer {
		s.writeErr = writeErr
	}
	if reader {
		s.buf = bytes.Buffer{}
	}
	for _, a := range []*alarm{&s.readBy, &s.writeBy} {
		if a.timer != nil {
			a.timer.Stop()
		}
	}
	s.cond.Broadcast()
}

// drop discards unread data.
func (s *stream) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.buf = bytes.Buffer{}
}

// setDeadline sets one of the stream's two alarms. The zero time turns it off.
func (s *stream) setDeadline(a *alarm, t time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.at = t
	switch {
	case t.IsZero() || s.readErr != nil && s.writeErr != nil:
		if a.timer != nil {
			a.timer.Stop()
		}
	case a.timer == nil:
		a.timer = time.AfterFunc(time.Until(t), s.wake)
	default:
		a.timer.Reset(time.Until(t))
	}
	s.cond.Broadcast()
}

// wake is called by the alarms. If an alarm fires early, which happens if its deadline
// has no monotonic clock reading, wake sets it again.
func (s *stream) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range []*alarm{&s.readBy, &s.writeBy} {
		if left := time.Until(a.at); !a.at.IsZero() && left > 0 {
			a.timer.Reset(left)
		}
	}
	s.cond.Broadcast()
}
