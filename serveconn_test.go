package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/meshtest"
)

func TestServeConn(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		opts := w.Options()
		opts.LatencyInterval = -1
		srv, err := mesh.NewServer(opts)
		require.NoError(t, err)
		require.NoError(t, srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		var mu sync.Mutex
		var foreign []string
		ended := make(chan error, 10)
		s := harness.Upgrading(w, srv, mesh.ConnOptions{
			Metadata: map[string]any{"userId": "u1"},
			Foreign: func(c *mesh.Connection, messageType int, data []byte) {
				mu.Lock()
				defer mu.Unlock()
				foreign = append(foreign, fmt.Sprintf("%d %s", messageType, data))
				assert.NoError(t, c.Send("app/got", string(data)))
			},
		}, ctx, ended)
		_, _, err = s.TryDial()
		require.Error(t, err)
		require.ErrorIs(t, <-ended, mesh.ErrNotStarted)

		require.NoError(t, srv.Start(t.Context()))
		p := s.Dial()
		var present []mesh.Member
		require.NoError(t, json.Unmarshal(p.Join("lobby").Present, &present))
		require.Len(t, present, 1)
		assert.JSONEq(t, `{"userId":"u1"}`, string(present[0].Metadata))
		require.NoError(t, p.Send("just text"))
		require.NoError(t, p.Send(map[string]any{"type": "app's own"}))
		require.NoError(t, p.Client.Write(websocket.BinaryMessage, []byte("binary")))
		w.Eventually(2*time.Second, func() bool { return p.Pushed("app/got") == 3 }, "the frames")
		mu.Lock()
		assert.Equal(t, []string{"1 \"just text\"\n", "1 {\"type\":\"app's own\"}\n", "2 binary"}, foreign, "in order")
		mu.Unlock()
		assert.Equal(t, "true", string(p.Call("mesh/noop", nil)))

		gone := errors.New("gone")
		cancel(gone)
		assert.Equal(t, websocket.CloseGoingAway, p.Closed(2*time.Second))
		require.ErrorIs(t, <-ended, gone, "ServeConn returns the reason")
		ids, err := srv.Rooms().ConnectionIDs(t.Context(), "lobby")
		w.Eventually(2*time.Second, func() bool {
			ids, err = srv.Rooms().ConnectionIDs(t.Context(), "lobby")
			return err == nil && len(ids) == 0
		}, "the connection has left the room")

		require.NoError(t, srv.Shutdown(t.Context()))
		_, _, err = s.TryDial()
		require.Error(t, err)
		require.ErrorIs(t, <-ended, mesh.ErrClosed)
	})
}

// TestServeConnReportsRefusals checks that ServeConn closes a WebSocket that it does not
// serve with a code and a reason. It also logs the reason, because most apps ignore the
// error.
func TestServeConnReportsRefusals(t *testing.T) {
	t.Parallel()
	type tc struct {
		ready  func(t *testing.T, s *harness.Server)
		opts   mesh.ConnOptions
		code   int
		reason string
		level  slog.Level
		line   string
	}
	start := func(t *testing.T, s *harness.Server) { require.NoError(t, s.Start(t.Context())) }
	for name, c := range map[string]tc{
		"not started": {nil, mesh.ConnOptions{}, 1013, "the server is starting", slog.LevelWarn, "the server has not been started"},
		"full": {
			func(t *testing.T, s *harness.Server) { start(t, s); s.Dial() }, mesh.ConnOptions{},
			1013, "too many connections", slog.LevelWarn, "the server is full",
		},
		"draining": {
			func(t *testing.T, s *harness.Server) { start(t, s); require.NoError(t, s.Drain(t.Context(), 0)) }, mesh.ConnOptions{},
			1012, "server is restarting", slog.LevelInfo, "the server is draining or shut down",
		},
		"invalid level":       {start, mesh.ConnOptions{Level: 7}, 1011, "the connection could not be set up", slog.LevelWarn, "it could not be set up error=mesh: invalid options: ConnOptions.Level is 7"},
		"invalid metadata":    {start, mesh.ConnOptions{Metadata: make(chan int)}, 1011, "the connection could not be set up", slog.LevelWarn, "it could not be set up"},
		"metadata that panic": {start, mesh.ConnOptions{Metadata: harness.Panicking{}}, 1011, "the connection could not be set up", slog.LevelWarn, "it could not be set up"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				var log testlog.Logbook
				opts := w.Options()
				opts.Logger, opts.Limits.Connections = slog.New(&log), 1
				srv, err := mesh.NewServer(opts)
				require.NoError(t, err)
				ended := make(chan error, 10)
				s := harness.Upgrading(w, srv, c.opts, t.Context(), ended)
				if c.ready != nil {
					c.ready(t, s)
				}
				_, _, err = s.TryDial()
				var closed *meshtest.CloseError
				require.ErrorAs(t, err, &closed)
				assert.Equal(t, c.code, closed.Code)
				assert.Equal(t, c.reason, closed.Reason)
				require.Error(t, <-ended)
				var lines []testlog.LogLine
				for _, l := range log.Written() {
					if strings.HasPrefix(l.Text, "mesh: connection not served: ") {
						lines = append(lines, l)
					}
				}
				require.Len(t, lines, 1)
				assert.Equal(t, c.level, lines[0].Level)
				assert.Contains(t, lines[0].Text, c.line)
			})
		})
	}
}

func TestServeConnRefusesBadMetadata(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		srv := w.Server().Server
		for want, metadata := range map[error]any{mesh.ErrInvalidMetadata: make(chan int), mesh.ErrTooLarge: strings.Repeat("x", 20<<10)} {
			ended := make(chan error, 1)
			s := harness.Upgrading(w, srv, mesh.ConnOptions{Metadata: metadata}, t.Context(), ended)
			_, _, err := s.TryDial()
			require.Error(t, err)
			require.ErrorIs(t, <-ended, want)
		}
		assert.Zero(t, srv.Stats().Connections)
	})
}

func TestServeConnAtLevel2(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		level := 2
		ended := make(chan error, 2)
		s.HTTP.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			ws, err := new(websocket.Upgrader).Upgrade(rw, r, nil)
			if assert.NoError(t, err) {
				ended <- s.ServeConn(r.Context(), ws, mesh.ConnOptions{Level: level})
			}
		})
		p := s.Dial()
		assert.Equal(t, "ENOTFOUND", harness.Code(t, p.Call("mesh/unsubscribe-presence", harness.InRoomPayload("lobby"))))
		p.Close()
		require.ErrorIs(t, <-ended, mesh.ErrClosed)
		level = 3
		_, _, err := s.TryDial()
		require.Error(t, err, "the connection is closed")
		require.ErrorIs(t, <-ended, mesh.ErrInvalidOptions)
	})
}

// panickingConn is a network connection whose Write panics once it is broken.
type panickingConn struct {
	net.Conn
	broken, closed atomic.Bool
}

func (c *panickingConn) Write(p []byte) (int, error) {
	if c.broken.Load() {
		panic("no writes")
	}
	return c.Conn.Write(p)
}

func (c *panickingConn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}

// TestServeConnClosesWithoutAFrame checks that ServeConn closes a WebSocket that it does
// not serve even if it cannot write the close frame.
func TestServeConnClosesWithoutAFrame(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		here, there := net.Pipe()
		defer there.Close()
		go func() { _, _ = io.Copy(io.Discard, there) }()
		conn := &panickingConn{Conn: here}
		rec := brokenResponse{httptest.NewRecorder(), func() (net.Conn, error) { return conn, nil }}
		ws, err := new(websocket.Upgrader).Upgrade(rec, harness.Handshake(t), nil)
		require.NoError(t, err)
		conn.broken.Store(true)
		require.NoError(t, s.Shutdown(t.Context()))
		require.ErrorIs(t, s.ServeConn(t.Context(), ws, mesh.ConnOptions{}), mesh.ErrClosed)
		assert.True(t, conn.closed.Load())
	})
}
