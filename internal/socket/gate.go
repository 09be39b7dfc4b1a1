package socket

import (
	"bufio"
	"net"
	"sync"
	"syscall"
	"time"
)

// gate is the network connection that the websocket package gets if a request is upgraded
// here. Once the socket runs, that package only reads. It would write by itself if it
// rejects a frame. That write would wait for a slow peer on the reader's goroutine, and
// would set a deadline for a write of the socket's writer. The writer informs the peer
// instead.
type gate struct {
	net.Conn
	raw  syscall.RawConn // for attempts without waiting; nil: not possible
	sock *Socket         // set while the socket runs; writes of the websocket package are discarded then
	br   *bufio.Reader   // of the websocket package
	in   *chunk          // read and not yet asked for; nil: nothing
}

// readBytes is the size of the buffer that the websocket package reads through. It is the
// smallest that the package does not replace by one of its own. Longer reads bypass it
// and go into a chunk that exists only while it holds data.
const readBytes = 288

// chunk holds the data of one read.
type chunk struct {
	data     [4 << 10]byte
	from, to int
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

// Read reads for the websocket package. After the connection has ended, nothing is
// counted any more.
func (g *gate) Read(p []byte) (int, error) {
	n, err := g.read(p)
	if g.sock == nil || g.sock.closed.Load() {
		return n, err
	}
	if flood := g.sock.count(p[:n]); flood != nil {
		return 0, flood
	}
	return n, err
}

func (g *gate) read(p []byte) (int, error) {
	if g.in == nil {
		return g.Conn.Read(p)
	}
	n := copy(p, g.in.data[g.in.from:g.in.to])
	if g.in.from += n; g.in.from == g.in.to {
		chunks.Put(g.in)
		g.in = nil
	}
	return n, nil
}

// Write writes for the websocket package, before the socket runs.
func (g *gate) Write(p []byte) (int, error) {
	if g.sock != nil {
		return len(p), nil
	}
	return g.Conn.Write(p)
}

// SetWriteDeadline is for the websocket package, before the socket runs.
func (g *gate) SetWriteDeadline(t time.Time) error {
	if g.sock != nil {
		return nil
	}
	return g.Conn.SetWriteDeadline(t)
}

// idle reports whether all data that was read has been asked for.
func (g *gate) idle() bool { return g.in == nil && g.br.Buffered() == 0 }
