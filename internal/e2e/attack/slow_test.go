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

// slowEnemies is how many take their time at once.
const slowEnemies = 50

var slowAttacks = []attack{
	{"an upgrade byte by byte", harness.ChildConfig{Header: time.Second}, slowEnemies*64<<10 + spare, slowUpgrade},
	{"frames byte by byte", harness.ChildConfig{Ping: time.Second}, slowEnemies*96<<10 + spare, slowFrames},
	{"frames that never end", harness.ChildConfig{Ping: time.Second}, slowEnemies*160<<10 + spare, halfFrames},
	{"no pongs", harness.ChildConfig{Ping: time.Second}, slowEnemies*64<<10 + spare, noPongs},
	{"a busy room that is read slowly", harness.ChildConfig{Buffer: 32 << 10, Limits: unlimited, Metadata: true}, 3*perEnemy + spare, unreadRoom},
	{"a little unread for long", harness.ChildConfig{Buffer: 32 << 10, Write: time.Second}, perEnemy + spare, stuckWrite},
	{"half a connection", harness.ChildConfig{}, slowEnemies*64<<10 + spare, halfClosed},
}

// each does something with many at once.
func (f *fort) each(n int, do func(i int) error) {
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

// slowUpgrade: http.Server's ReadHeaderTimeout ends what never becomes a
// request; whoever sends a whole one in time is not affected.
func slowUpgrade(_ *testing.T, f *fort) {
	f.each(slowEnemies, func(int) error {
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

// slowFrames: a frame is a sign of life when it is whole.
func slowFrames(t *testing.T, f *fort) {
	f.each(slowEnemies, func(int) error {
		e, _, err := tryEnemy(t, f.Addr)
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
		return fmt.Errorf("a frame of %d bytes came through", len(frame))
	})
}

func wantCode(r told, code int) error {
	if r.closing != code {
		return fmt.Errorf("ended with %d (%w), not %d", r.closing, r.err, code)
	}
	return nil
}

// halfFrames: what has been sent is kept while its rest may come.
func halfFrames(t *testing.T, f *fort) {
	f.each(slowEnemies, func(i int) error {
		e, _, err := tryEnemy(t, f.Addr)
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

// noPongs: 1011 when nothing has come for too long.
func noPongs(t *testing.T, f *fort) {
	f.each(slowEnemies, func(int) error {
		e, _, err := tryEnemy(t, f.Addr)
		if err != nil {
			return err
		}
		e.mute = true
		return wantCode(<-e.listen(), websocket.CloseInternalServerErr)
	})
	assert.EqualValues(t, slowEnemies, f.gauge().Stats.Closed["silent"])
}

// unreadRoom: two fill the room with what cannot be left out for one who does
// not keep up. It is closed with 1013 at the bound of its queue.
func unreadRoom(t *testing.T, f *fort) {
	slow := dialEnemy(t, f.Addr)
	require.Contains(t, slow.call("mesh/subscribe-presence", `{"roomName":"busy"}`), `"success":true`)
	slow.pause = 25 * time.Millisecond
	ended := slow.listen()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	for range 2 {
		e := dialEnemy(t, f.Addr)
		require.Contains(t, e.call("mesh/set-my-connection-metadata", `{"metadata":"`+strings.Repeat("x", 8<<10)+`"}`), "true")
		wg.Go(func() {
			defer e.gone()
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
		require.FailNow(t, "it is not closed")
	}
}

// stuckWrite: less than the bound waits, but nothing moves. There is no way to
// tell it: the connection is cut.
func stuckWrite(t *testing.T, f *fort) {
	e := dialEnemy(t, f.Addr)
	name := strings.Repeat("x", 30_000)
	for i := range 12 {
		require.NoError(t, e.text(fmt.Sprintf(`{"id":%d,"command":%q}`, i, name)))
	}
	f.within(patience, func() bool { return f.gauge().Stats.Closed["stuck"] == 1 }, "cut: %+v", f.gauge().Stats)
	e.gone()
}

// halfClosed: who says no more has gone, whether or not it still listens; and
// so has who says no more without a word.
func halfClosed(t *testing.T, f *fort) {
	watcher := dialEnemy(t, f.Addr)
	require.Contains(t, watcher.call("mesh/subscribe-presence", `{"roomName":"half"}`), `"success":true`)
	for i := range slowEnemies {
		e := dialEnemy(t, f.Addr)
		require.Contains(t, e.call("mesh/join-room", `{"roomName":"half"}`), `"success":true`)
		tcp := e.ws.NetConn().(*net.TCPConn)
		if i%2 == 0 {
			require.NoError(t, tcp.CloseWrite())
		} else {
			require.NoError(t, tcp.SetLinger(0)) // a reset
			require.NoError(t, tcp.Close())
		}
		_, err := watcher.until(fmt.Sprintf(`{"type":"leave","connectionId":%q`, e.id))
		require.NoError(t, err, "its leave")
		if i%2 == 0 {
			assert.Equal(t, websocket.CloseAbnormalClosure, e.code(), "no close frame: there is nobody to answer it")
		}
	}
	watcher.gone()
}
