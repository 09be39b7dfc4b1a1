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

// enemy is a client that does as it likes: it writes bytes, and reads or not.
type enemy struct {
	t     testing.TB
	ws    *websocket.Conn
	id    string
	n     int
	mute  bool          // it answers no ping
	pause time.Duration // before each frame that it reads

	answered atomic.Int64 // requests, as far as listen has read
}

// patience is how long anything that has to come may take.
const patience = harness.MachineShare

// dialEnemy connects one that has little room in the kernel for what it does
// not read.
func dialEnemy(t testing.TB, addr string, headers ...http.Header) *enemy {
	t.Helper()
	e, resp, err := tryEnemy(t, addr, headers...)
	if resp != nil && err != nil {
		require.NoError(t, err, resp.Status)
	}
	require.NoError(t, err)
	return e
}

func tryEnemy(t testing.TB, addr string, headers ...http.Header) (*enemy, *http.Response, error) {
	var h http.Header
	if len(headers) > 0 {
		h = headers[0]
	}
	d := websocket.Dialer{HandshakeTimeout: patience, NetDialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
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
	e := &enemy{t: t, ws: ws}
	t.Cleanup(e.gone)
	// Pings of the protocol are answered where they are read; WebSocket's own
	// are not expected.
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

// gone closes the connection without a word.
func (e *enemy) gone() { _ = e.ws.NetConn().Close() }

// wireFrame is a frame of a client as bytes; its mask is zero.
func wireFrame(first byte, payload string) []byte {
	b := append(frameHead(first, uint64(len(payload))), 0, 0, 0, 0)
	return append(b, payload...)
}

// frameHead is the head of a masked frame, without the mask.
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
func (e *enemy) raw(b []byte) error {
	c := e.ws.NetConn()
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	_, err := c.Write(b)
	return err
}

// text writes a text frame.
func (e *enemy) text(s string) error { return e.raw(wireFrame(finText, s)) }

// read returns the next text frame; pings are answered.
func (e *enemy) read() (string, error) {
	for {
		time.Sleep(e.pause)
		_ = e.ws.SetReadDeadline(time.Now().Add(patience))
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
func (e *enemy) until(part string) (string, error) {
	for {
		text, err := e.read()
		if err != nil || strings.Contains(text, part) {
			return text, err
		}
	}
}

// call sends a request and returns its answer.
func (e *enemy) call(command, payload string) string {
	e.t.Helper()
	e.n++
	id := fmt.Sprintf(`{"id":%d,`, 1000+e.n)
	require.NoError(e.t, e.text(id+`"command":"`+command+`","payload":`+payload+`}`))
	answer, err := e.until(id)
	require.NoError(e.t, err, command)
	return answer
}

// code reads until the connection ends and returns the close code.
func (e *enemy) code() int {
	for {
		if _, err := e.read(); err != nil {
			return harness.CloseCodeOf(err)
		}
	}
}

// told is what a client was told until its connection ended.
type told struct {
	codes   map[string]int // answers by their code, "" where they are no errors
	pushes  int
	closing int // the close code
	err     error
}

// listen reads in the background until the connection ends.
func (e *enemy) listen() <-chan told {
	done := make(chan told, 1)
	go func() { // ends with the connection, which the end of the test closes
		r := told{codes: map[string]int{}}
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

// bye ends the connection in peace, with a close frame.
func (e *enemy) bye() { _ = e.raw(wireFrame(finClose, "\x03\xe8")) }

// flood writes requests at a rate until the connection or the time is over. It
// writes in bursts: a hundredth of a second's worth at once.
func (e *enemy) flood(perSecond int, d time.Duration, request func(i int) string) (sent int) {
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

// codeIn returns the code in an error answer, "" where it is none.
func codeIn(answer string) string {
	var a struct{ Payload struct{ Code string } }
	_ = json.Unmarshal([]byte(answer), &a)
	return a.Payload.Code
}
