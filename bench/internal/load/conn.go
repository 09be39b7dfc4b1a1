// Package load puts load on the servers under test: many WebSockets in one process that
// cost little compared with the servers. It speaks the Mesh wire protocol and
// Centrifuge's JSON protocol.
package load

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
)

// Conn is a WebSocket whose frames are parsed in place. Reading allocates nothing, and
// writing is one system call. One goroutine may read and one may write.
type Conn struct {
	net     net.Conn
	r       *bufio.Reader
	message []byte // of several frames, or larger than the reader's buffer
	skip    int    // bytes of the last frame, to be discarded from r
	out     []byte
}

// Dial opens a WebSocket at ws://addr/path. buffer is the size of one read.
func Dial(addr, path string, buffer int) (*Conn, error) {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	c := &Conn{net: nc, r: bufio.NewReaderSize(nc, buffer)}
	request := "GET " + path + " HTTP/1.1\r\nHost: " + addr + "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
	if _, err := nc.Write([]byte(request)); err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return nil, errors.Join(fmt.Errorf("%s: %s", resp.Status, strings.TrimSpace(string(body))), nc.Close())
	}
	return c, nil
}

// Close closes the connection without a close frame.
func (c *Conn) Close() error { return c.net.Close() }

// Next returns the next message. It is valid until the next call. Control frames are
// skipped. A close frame is an error.
func (c *Conn) Next() ([]byte, error) {
	c.message = c.message[:0]
	for {
		if _, err := c.r.Discard(c.skip); err != nil {
			return nil, err
		}
		c.skip = 0
		head, err := c.r.Peek(2)
		if err != nil {
			return nil, err
		}
		final, op, size, n := head[0]&128 != 0, head[0]&15, int(head[1]&127), 2
		switch size {
		case 126:
			if head, err = c.r.Peek(4); err != nil {
				return nil, err
			}
			size, n = int(binary.BigEndian.Uint16(head[2:])), 4
		case 127:
			if head, err = c.r.Peek(10); err != nil {
				return nil, err
			}
			size, n = int(binary.BigEndian.Uint64(head[2:])), 10
		}
		if op < 8 && (op == 0 || !final || n+size > c.r.Size()) {
			if err := c.gather(n, size); err != nil {
				return nil, err
			}
			if final {
				return c.message, nil
			}
			continue
		}
		data, err := c.r.Peek(n + size)
		if err != nil {
			return nil, err
		}
		c.skip = n + size
		switch {
		case op == 8:
			return nil, fmt.Errorf("closed by the server: %q", data[n:])
		case op < 8:
			return data[n:], nil
		}
	}
}

// gather adds a frame to the message: size bytes that begin n bytes ahead.
func (c *Conn) gather(n, size int) error {
	if _, err := c.r.Discard(n); err != nil {
		return err
	}
	at := len(c.message)
	c.message = slices.Grow(c.message, size)[:at+size]
	_, err := io.ReadFull(c.r, c.message[at:])
	return err
}

// Write sends one text frame. It is masked, as a client's must be, with a key of zeros.
func (c *Conn) Write(text []byte) error {
	c.out = append(c.out[:0], 0x81)
	switch n := len(text); {
	case n < 126:
		c.out = append(c.out, 0x80|byte(n))
	case n < 1<<16:
		c.out = binary.BigEndian.AppendUint16(append(c.out, 0x80|126), uint16(n))
	default:
		c.out = binary.BigEndian.AppendUint64(append(c.out, 0x80|127), uint64(n))
	}
	c.out = append(append(c.out, 0, 0, 0, 0), text...)
	_, err := c.net.Write(c.out)
	return err
}

// await reads until a message begins with prefix, and returns it.
func (c *Conn) await(prefix string) ([]byte, error) {
	for {
		frame, err := c.Next()
		if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(frame) {
			if bytes.HasPrefix(line, []byte(prefix)) {
				return line, nil
			}
		}
	}
}
