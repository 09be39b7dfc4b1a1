package attack

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// attacker is a client that writes any bytes, and reads or not. A client of meshtest
// writes valid frames and always reads.
type attacker struct {
	t     testing.TB
	ws    *websocket.Conn
	id    string
	n     int
	mute  bool          // answers no ping
	pause time.Duration // before each frame that it reads

	answered atomic.Int64 // number of answers that listen has read
}

// timeLimit is the limit of a wait.
const timeLimit = harness.MachineShare

// dialAttacker connects a client with a small receive buffer in the kernel.
func dialAttacker(t testing.TB, addr string, headers ...http.Header) *attacker {
	t.Helper()
	e, resp, err := tryDial(t, addr, headers...)
	if resp != nil && err != nil {
		require.NoError(t, err, resp.Status)
	}
	require.NoError(t, err)
	return e
}

func tryDial(t testing.TB, addr string, headers ...http.Header) (*attacker, *http.Response, error) {
	var h http.Header
	if len(headers) > 0 {
		h = headers[0]
	}
	d := websocket.Dialer{HandshakeTimeout: timeLimit, NetDialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetReadBuffer(32 << 10)
		}
		return c, err
	}}
	ws, resp, err := d.DialContext(t.Context(), "ws://"+addr+"/ws", h)
	if err != nil {
		return nil, resp, err
	}
	e := &attacker{t: t, ws: ws}
	t.Cleanup(e.drop)
	// read answers pings of the Mesh protocol. The server sends no WebSocket pings.
	text, err := e.read()
	if err != nil {
		return nil, resp, err
	}
	var first struct{ Payload string }
	if err := json.Unmarshal([]byte(text), &first); err != nil {
		return nil, resp, err
	}
	e.id = first.Payload
	return e, resp, nil
}

// drop closes the connection without a close frame.
func (e *attacker) drop() { _ = e.ws.NetConn().Close() }

// wireFrame encodes a frame of a client. The mask is zero.
func wireFrame(first byte, payload string) []byte {
	b := append(frameHead(first, uint64(len(payload))), 0, 0, 0, 0)
	return append(b, payload...)
}

// frameHead encodes the head of a masked frame, without the mask.
func frameHead(first byte, n uint64) []byte {
	switch {
	case n < 126:
		return []byte{first, 0x80 | byte(n)}
	case n < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{first, 0x80 | 126}, uint16(n))
	default:
		return binary.BigEndian.AppendUint64([]byte{first, 0x80 | 127}, n)
	}
}

const (
	moreText  = 0x01 // other fragments follow
	moreOf    = 0x00
	finOf     = 0x80
	finText   = 0x81
	finBinary = 0x82
	finClose  = 0x88
	finPing   = 0x89
	finPong   = 0x8a
)

// raw writes bytes.
func (e *attacker) raw(b []byte) error {
	c := e.ws.NetConn()
	_ = c.SetWriteDeadline(time.Now().Add(timeLimit))
	_, err := c.Write(b)
	return err
}

// text writes a text frame.
func (e *attacker) text(s string) error { return e.raw(wireFrame(finText, s)) }

// read returns the next text frame. It answers pings.
func (e *attacker) read() (string, error) {
	for {
		time.Sleep(e.pause)
		_ = e.ws.SetReadDeadline(time.Now().Add(timeLimit))
		_, data, err := e.ws.ReadMessage()
		if err != nil {
			return "", err
		}
		if string(data) != `{"command":"ping","payload":{}}` {
			return string(data), nil
		}
		if e.mute {
			continue
		}
		if err := e.text(`{"id":2,"command":"pong","payload":{}}`); err != nil {
			return "", err
		}
	}
}

// until reads until a frame that contains a text, and returns it.
func (e *attacker) until(part string) (string, error) {
	for {
		text, err := e.read()
		if err != nil || strings.Contains(text, part) {
			return text, err
		}
	}
}

// call sends a request and returns its answer.
func (e *attacker) call(command, payload string) string {
	e.t.Helper()
	e.n++
	id := fmt.Sprintf(`{"id":%d,`, 1000+e.n)
	require.NoError(e.t, e.text(id+`"command":"`+command+`","payload":`+payload+`}`))
	answer, err := e.until(id)
	require.NoError(e.t, err, command)
	return answer
}

// code reads until the connection ends and returns the close code.
func (e *attacker) code() int {
	for {
		if _, err := e.read(); err != nil {
			return harness.CloseCodeOf(err)
		}
	}
}

// result contains the frames that a client received until its connection ended.
type result struct {
	codes   map[string]int // number of answers by error code, "" for success
	pushes  int
	closing int // close code
	err     error
}

// listen reads in the background until the connection ends.
func (e *attacker) listen() <-chan result {
	done := make(chan result, 1)
	go func() { // ends with the connection, which the end of the test closes
		r := result{codes: map[string]int{}}
		for {
			text, err := e.read()
			switch {
			case err != nil:
				r.closing, r.err = harness.CloseCodeOf(err), err
				done <- r
				return
			case strings.HasPrefix(text, `{"id":`):
				r.codes[codeIn(text)]++
				e.answered.Add(1)
			default:
				r.pushes++
			}
		}
	}()
	return done
}

// closeNormally sends a close frame.
func (e *attacker) closeNormally() { _ = e.raw(wireFrame(finClose, "\x03\xe8")) }

// flood writes requests at a rate until the connection or the time ends. It writes in
// bursts, one per hundredth of a second.
func (e *attacker) flood(perSecond int, d time.Duration, request func(i int) string) (sent int) {
	const step = 10 * time.Millisecond
	begun := time.Now()
	for at := time.Duration(0); at < d; at += step {
		time.Sleep(time.Until(begun.Add(at)))
		var burst []byte
		for due := int((at+step).Seconds()*float64(perSecond) + 0.5); sent < due; sent++ {
			burst = append(burst, wireFrame(finText, request(sent))...)
		}
		if e.raw(burst) != nil {
			return sent
		}
	}
	return sent
}

// codeIn returns the code in an error answer, or "".
func codeIn(answer string) string {
	var a struct{ Payload struct{ Code string } }
	_ = json.Unmarshal([]byte(answer), &a)
	return a.Payload.Code
}
