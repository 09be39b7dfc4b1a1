package attack

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// slowAttackers is the number of slow connections at the same time.
const slowAttackers = 50

var slowAttacks = []attack{
	{"an upgrade byte by byte", harness.ChildConfig{Header: time.Second}, slowAttackers*64<<10 + spare, slowUpgrade},
	{"frames byte by byte", harness.ChildConfig{Ping: time.Second}, slowAttackers*96<<10 + spare, slowFrames},
	{"frames that never end", harness.ChildConfig{Ping: time.Second}, slowAttackers*160<<10 + spare, halfFrames},
	{"no pongs", harness.ChildConfig{Ping: time.Second}, slowAttackers*64<<10 + spare, noPongs},
	{"a busy room that is read slowly", harness.ChildConfig{Buffer: 32 << 10, Limits: unlimited, Metadata: true}, 3*perAttacker + spare, unreadRoom},
	{"a few unread answers for long", harness.ChildConfig{Buffer: 32 << 10, Write: time.Second}, perAttacker + spare, stuckWrite},
	{"half-closed connections", harness.ChildConfig{}, slowAttackers*64<<10 + spare, halfClosed},
}

// each calls a function n times in parallel.
func (f *target) each(n int, do func(i int) error) {
	f.t.Helper()
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() { errs[i] = do(i) })
	}
	wg.Wait()
	for _, err := range errs {
		require.NoError(f.t, err)
	}
}

// slowUpgrade checks that ReadHeaderTimeout of http.Server ends requests that are not
// complete in time.
func slowUpgrade(_ *testing.T, f *target) {
	f.each(slowAttackers, func(int) error {
		c, err := net.Dial("tcp", f.Addr)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		begun := time.Now()
		for _, b := range []byte("GET /ws HTTP/1.1\r\nHost: " + strings.Repeat("x", 1000)) {
			if _, err := c.Write([]byte{b}); err != nil {
				return nil // reset
			}
			if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
				return err
			}
			if _, err := c.Read(make([]byte, 1)); err == io.EOF {
				return nil
			}
		}
		return fmt.Errorf("still open after %v", time.Since(begun))
	})
}

// slowFrames checks that only a whole frame is a sign of life.
func slowFrames(t *testing.T, f *target) {
	f.each(slowAttackers, func(int) error {
		e, _, err := tryDial(t, f.Addr)
		if err != nil {
			return err
		}
		e.mute = true
		ended := e.listen()
		frame := wireFrame(finText, `{"id":1,"command":"mesh/noop","payload":"`+strings.Repeat("x", 60_000))
		for _, b := range frame {
			select {
			case r := <-ended:
				return wantCode(r, websocket.CloseInternalServerErr)
			case <-time.After(20 * time.Millisecond):
				if err := e.raw([]byte{b}); err != nil {
					return wantCode(<-ended, websocket.CloseInternalServerErr)
				}
			}
		}
		return fmt.Errorf("a frame of %d bytes was accepted", len(frame))
	})
}

func wantCode(r result, code int) error {
	if r.closing != code {
		return fmt.Errorf("ended with %d (%w), not %d", r.closing, r.err, code)
	}
	return nil
}

// halfFrames checks that a partial frame is kept only until its connection counts as
// silent.
func halfFrames(t *testing.T, f *target) {
	f.each(slowAttackers, func(i int) error {
		e, _, err := tryDial(t, f.Addr)
		if err != nil {
			return err
		}
		e.mute = true
		ended := e.listen()
		head := append(frameHead(finText, 65_000), 0, 0, 0, 0)
		if i%2 == 0 {
			head = append(head, make([]byte, 64_000)...)
		}
		if err := e.raw(head); err != nil {
			return err
		}
		return wantCode(<-ended, websocket.CloseInternalServerErr)
	})
}

// noPongs checks that a silent connection is closed with 1011.
func noPongs(t *testing.T, f *target) {
	f.each(slowAttackers, func(int) error {
		e, _, err := tryDial(t, f.Addr)
		if err != nil {
			return err
		}
		e.mute = true
		return wantCode(<-e.listen(), websocket.CloseInternalServerErr)
	})
	assert.EqualValues(t, slowAttackers, f.gauge().Stats.Closed["silent"])
}

// unreadRoom fills a room with joins and leaves, which cannot be coalesced, for a slow
// subscriber. Its connection is closed with 1013 when its queue is full.
func unreadRoom(t *testing.T, f *target) {
	slow := dialAttacker(t, f.Addr)
	require.Contains(t, slow.call("mesh/subscribe-presence", `{"roomName":"busy"}`), `"success":true`)
	slow.pause = 25 * time.Millisecond
	ended := slow.listen()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	for range 2 {
		e := dialAttacker(t, f.Addr)
		require.Contains(t, e.call("mesh/set-my-connection-metadata", `{"metadata":"`+strings.Repeat("x", 8<<10)+`"}`), "true")
		wg.Go(func() {
			defer e.drop()
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, command := range []string{"join-room", "leave-room"} {
					if e.text(`{"id":1,`+body(command, "busy", "")+`}`) != nil {
						return
					}
					if _, err := e.until(`{"id":1,`); err != nil {
						return
					}
				}
			}
		})
	}
	select {
	case r := <-ended:
		require.NoError(t, wantCode(r, websocket.CloseTryAgainLater))
	case <-time.After(60 * time.Second):
		require.FailNow(t, "the connection is not closed")
	}
}

// stuckWrite checks a client that reads nothing while less than the limit waits. A
// close frame could not be written, so the connection is cut.
func stuckWrite(t *testing.T, f *target) {
	e := dialAttacker(t, f.Addr)
	name := strings.Repeat("x", 30_000)
	for i := range 12 {
		require.NoError(t, e.text(fmt.Sprintf(`{"id":%d,"command":%q}`, i, name)))
	}
	f.within(timeLimit, func() bool { return f.gauge().Stats.Closed["stuck"] == 1 }, "the connection is cut: %+v", f.gauge().Stats)
	e.drop()
}

// halfClosed checks that a connection leaves if the client closes its sending side,
// even if it still reads, or resets the connection.
func halfClosed(t *testing.T, f *target) {
	watcher := dialAttacker(t, f.Addr)
	require.Contains(t, watcher.call("mesh/subscribe-presence", `{"roomName":"half"}`), `"success":true`)
	for i := range slowAttackers {
		e := dialAttacker(t, f.Addr)
		require.Contains(t, e.call("mesh/join-room", `{"roomName":"half"}`), `"success":true`)
		tcp := e.ws.NetConn().(*net.TCPConn)
		if i%2 == 0 {
			require.NoError(t, tcp.CloseWrite())
		} else {
			require.NoError(t, tcp.SetLinger(0)) // a reset
			require.NoError(t, tcp.Close())
		}
		_, err := watcher.until(fmt.Sprintf(`{"type":"leave","connectionId":%q`, e.id))
		require.NoError(t, err, "the leave is reported")
		if i%2 == 0 {
			assert.Equal(t, websocket.CloseAbnormalClosure, e.code(), "no close frame, because the client could not answer it")
		}
	}
	watcher.drop()
}
