package socket

import (
	"bufio"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
)

// gate is the network connection that the websocket package is given where a
// request is upgraded here. Once the socket runs, that package only reads: what
// it writes by itself, when it meets a frame that it refuses, would wait for a
// slow peer on the reader's goroutine, and would set a deadline to what the
// socket's writer has under way. The writer tells the peer instead.
type gate struct {
	net.Conn
	raw  syscall.RawConn // to try without waiting; nil: cannot be tried
	sock *Socket         // set while the socket runs; writes of the websocket package are discarded then
	br   *bufio.Reader   // of the websocket package
	in   *chunk          // read and not yet asked for; nil: nothing
}

// readBytes is the size of the buffer that the websocket package reads through:
// the least that it does not replace by one of its own. Longer reads go past it,
// into a chunk that is there only while something has come.
const readBytes = 288

// chunk is what one read brought.
type chunk struct {
	data     [4 << 10]byte
	from, to int
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

// Upgrade upgrades a request to a WebSocket for a [Socket], as u.Upgrade does.
// u.ReadBufferSize must be 0.
func Upgrade(u *websocket.Upgrader, w http.ResponseWriter, r *http.Request) (*websocket.Conn, error) {
	return u.Upgrade(gatekeeper{w}, r, nil)
}

// gatekeeper is a response that puts a gate before the connection that it is
// hijacked for.
type gatekeeper struct{ http.ResponseWriter }

// Hijack implements http.Hijacker.
func (k gatekeeper) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(k.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	g := &gate{Conn: conn, raw: rawOf(conn)}
	if rw.Reader.Buffered() > 0 {
		return g, rw, nil // too early: the websocket package refuses it
	}
	g.br = bufio.NewReaderSize(g, readBytes)
	return g, bufio.NewReadWriter(g.br, rw.Writer), nil
}

// Read reads for the websocket package. Of a connection that has ended, nothing
// is counted any more.
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

// idle tells whether all that was read has been asked for.
func (g *gate) idle() bool { return g.in == nil && g.br.Buffered() == 0 }
