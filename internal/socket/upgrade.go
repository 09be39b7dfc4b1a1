package socket

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/websocket"
)

// HijackError says that a ResponseWriter did not hand over its connection.
type HijackError struct {
	Writer string // its type
	Inner  string // the type of the innermost writer by Unwrap; the same if there is no Unwrap
	Err    error  // of Hijack; nil: none of them has Hijack
}

// Error implements error.
func (e *HijackError) Error() string {
	if e.Err != nil {
		return fmt.Sprintf("socket: hijack %s: %v", e.Writer, e.Err)
	}
	return fmt.Sprintf("socket: %s has neither Hijack nor Unwrap", e.Inner)
}

// Unwrap returns Err.
func (e *HijackError) Unwrap() error { return e.Err }

// EarlyError says that the client sent data before the handshake was complete. The
// request has been answered, and the connection is closed.
type EarlyError struct {
	Status int // of the answer
	Bytes  int
}

// Error implements error.
func (e *EarlyError) Error() string {
	return fmt.Sprintf("socket: the client sent %d bytes before the answer", e.Bytes)
}

// Upgrade upgrades a request to a WebSocket for a [Socket], like u.Upgrade, with header
// as its responseHeader. u.ReadBufferSize must be 0. The error is a *HijackError, an
// *EarlyError, or that of u.Upgrade. In each case the connection is closed if it was
// hijacked.
func Upgrade(u *websocket.Upgrader, w http.ResponseWriter, r *http.Request, header http.Header) (*websocket.Conn, error) {
	k := &gatekeeper{ResponseWriter: w, header: header, timeout: u.HandshakeTimeout}
	ws, err := u.Upgrade(k, r, header)
	if err != nil && k.failed != nil {
		err = k.failed
	}
	return ws, err
}

// gatekeeper is a response that puts a gate in front of the connection when it is
// hijacked.
type gatekeeper struct {
	http.ResponseWriter
	header  http.Header   // of the answer
	timeout time.Duration // for an answer that Hijack writes; 0: none
	failed  error         // why Hijack failed
}

// Hijack implements http.Hijacker.
func (k *gatekeeper) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := k.hijack()
	if err != nil {
		k.failed = err
		return nil, nil, err
	}
	if n := rw.Reader.Buffered(); n > 0 {
		k.failed = k.early(conn, n)
		return nil, nil, k.failed
	}
	g := &gate{Conn: conn, raw: rawOf(conn)}
	g.br = bufio.NewReaderSize(g, readBytes)
	return g, bufio.NewReadWriter(g.br, rw.Writer), nil
}

// errNoConnection says that an app's Hijack returned neither a connection nor an error.
var errNoConnection = errors.New("no connection and no error")

// maxUnwraps limits the number of ResponseWriters around the one with Hijack. A writer
// that unwraps to itself by mistake would never end.
const maxUnwraps = 100

// hijack takes the connection from the first writer that has Hijack, from the outermost
// on.
func (k *gatekeeper) hijack() (net.Conn, *bufio.ReadWriter, error) {
	failed := &HijackError{Writer: fmt.Sprintf("%T", k.ResponseWriter)}
	w := k.ResponseWriter
	for range maxUnwraps {
		failed.Inner = fmt.Sprintf("%T", w)
		if h, ok := w.(http.Hijacker); ok {
			conn, rw, err := h.Hijack()
			switch {
			case errors.Is(err, http.ErrNotSupported): // it forwards to a writer that has no Hijack
				return nil, nil, failed
			case err == nil && (conn == nil || rw == nil):
				err = errNoConnection
			}
			if failed.Err = err; err != nil {
				return nil, nil, failed
			}
			return conn, rw, nil
		}
		outer, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		w = outer.Unwrap()
	}
	return nil, nil, failed
}

// early answers a client that did not wait for the handshake, and closes the connection.
func (k *gatekeeper) early(conn net.Conn, n int) error {
	defer func() { _ = conn.Close() }()
	const text = "data came before the WebSocket handshake was complete\n"
	header := k.header.Clone()
	if header == nil {
		header = make(http.Header)
	}
	header.Del("Sec-Websocket-Protocol")
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("X-Content-Type-Options", "nosniff")
	answer := http.Response{
		StatusCode: http.StatusBadRequest, ProtoMajor: 1, ProtoMinor: 1, Close: true, Header: header,
		ContentLength: int64(len(text)), Body: io.NopCloser(strings.NewReader(text)),
	}
	var data bytes.Buffer
	_ = answer.Write(&data) // to memory
	_ = conn.SetDeadline(time.Time{})
	if k.timeout > 0 {
		_ = conn.SetWriteDeadline(time.Now().Add(k.timeout))
	}
	_, _ = conn.Write(data.Bytes()) // the client may be gone
	return &EarlyError{Status: http.StatusBadRequest, Bytes: n}
}
