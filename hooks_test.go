package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"runtime"
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
)

func TestAppCommands(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		handle := func(name string, h mesh.CommandHandler) {
			require.NoError(t, s.HandleCommand(name, h))
		}
		handle("echo", func(_ context.Context, c *mesh.Connection, payload json.RawMessage) (any, error) {
			return map[string]any{"id": c.ID(), "payload": payload, "rooms": c.Rooms()}, nil
		})
		handle("nothing", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { return nil, nil })
		handle("fail", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			return nil, errors.New("no luck")
		})
		handle("coded", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			return nil, &mesh.CommandError{Code: "ETEAPOT", Name: "Teapot", Message: "short and stout"}
		})
		handle("panic", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { panic("secret") })
		handle("goexit", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			runtime.Goexit()
			return nil, nil
		})
		handle("unencodable", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { return make(chan int), nil })
		p := s.Dial()
		p.Join("lobby")
		for command, want := range map[string]string{
			"echo":    `{"id":"` + p.ID + `","payload":{"n":1.0},"rooms":["lobby"]}`,
			"nothing": `null`,
			"fail":    `{"error":"no luck","code":"ESERVER","name":"Error"}`,
			"coded":   `{"error":"short and stout","code":"ETEAPOT","name":"Teapot"}`,
			"panic":   `{"error":"Internal error","code":"ESERVER","name":"Error"}`,
			"goexit":  `{"error":"Internal error","code":"ESERVER","name":"Error"}`,
		} {
			assert.JSONEq(t, want, string(p.Call(command, json.RawMessage(`{"n":1.0}`))), command)
		}
		assert.Contains(t, string(p.Call("unencodable", nil)), `"ESERVER"`)
		w.Eventually(time.Second, func() bool { return s.Stats().CallbackPanics == 2 }, "both panics are counted")

		for _, name := range []string{"", "mesh/noop", "mesh/mine", "ping", "pong", "latency", "latency:request", "latency:response"} {
			require.ErrorIs(t, s.HandleCommand(name, func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { return nil, nil }), mesh.ErrInvalidCommand, "%q", name)
		}
		require.ErrorIs(t, s.HandleCommand("echo", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { return nil, nil }), mesh.ErrCommandExists)
		require.ErrorIs(t, s.HandleCommand("nil", nil), mesh.ErrInvalidOptions)
	})
}

func TestAHangingHandlerDoesNotKeepItsConnectionPresent(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		release := make(chan struct{})
		require.NoError(t, s.HandleCommand("hang", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			<-release // ignores its context
			return nil, nil
		}))
		watcher, p := s.Dial(), s.Dial()
		watcher.Subscribe("lobby")
		p.Join("lobby")
		require.NoError(t, p.Send(map[string]any{"id": 1000, "command": "hang"}))
		p.Call("mesh/noop", nil)
		p.Close()
		watcher.Expect(2*time.Second, "leave", p.ID)
		close(release)
	})
}

func TestConnectionHooks(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		type ending struct {
			member  mesh.Member
			present []string
			reason  error
		}
		ended := make(chan ending, 10)
		s.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			// The client's first command may already have arrived.
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), map[string]any{"userId": "u1"}, mesh.MetadataOptions{}))
		})
		s.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			assert.JSONEq(t, `{"userId":"u1"}`, string(c.Member().Metadata), "hooks run in the order in which they were added")
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), map[string]any{"second": true}, mesh.MetadataOptions{Strategy: mesh.Merge}))
			assert.NotNil(t, c.RemoteAddr())
		})
		s.OnDisconnection(func(ctx context.Context, c *mesh.Connection, reason error) {
			present, err := s.Presence().PresentConnections(ctx, "lobby")
			assert.NoError(t, err)
			ended <- ending{c.Member(), present, reason}
		})
		var present []mesh.Member
		p := s.Dial()
		require.NoError(t, json.Unmarshal(p.Join("lobby").Present, &present))
		require.Len(t, present, 1)
		assert.JSONEq(t, `{"userId":"u1","second":true}`, string(present[0].Metadata))

		require.NoError(t, s.Connections().Close(t.Context(), p.ID))
		p.Closed(2 * time.Second)
		e := <-ended
		assert.Equal(t, p.ID, e.member.ID)
		assert.JSONEq(t, `{"userId":"u1","second":true}`, string(e.member.Metadata), "the metadata is still known")
		assert.Empty(t, e.present, "it has left its rooms")
		assert.ErrorContains(t, e.reason, "closed")

		p = s.Dial()
		p.Join("lobby")
		p.Close()
		e = <-ended
		assert.Empty(t, e.present)
		assert.ErrorContains(t, e.reason, "broken", "the client sent no close frame")
		_, open := s.Connection(p.ID)
		assert.False(t, open)
	})
}

func TestHooksThatFail(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.HookTimeout = time.Second })
		release := make(chan struct{})
		var after atomic.Int32
		var reason atomic.Pointer[error]
		s.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), "half", mesh.MetadataOptions{}))
			assert.NoError(t, s.Presence().Join(ctx, "lobby", c.ID()))
			panic("up")
		})
		s.OnConnection(func(context.Context, *mesh.Connection) { after.Add(1) })
		s.OnDisconnection(func(_ context.Context, _ *mesh.Connection, err error) { reason.Store(&err); panic("down") })
		s.OnDisconnection(func(context.Context, *mesh.Connection, error) { after.Add(100) })
		watcher := w.Tracked().Dial()
		watcher.Subscribe("lobby")

		// Nothing remains of a connection if its first OnConnection hook fails.
		p := s.Dial()
		begun := time.Now()
		_, err := p.TryCall("mesh/join-room", map[string]any{"roomName": "other"})
		require.Error(t, err, "no command is carried out")
		assert.Equal(t, websocket.CloseInternalServerErr, p.Closed(time.Second))
		assert.Zero(t, time.Since(begun), "a panic closes the connection at once")
		w.Sleep(time.Second)
		assert.EqualValues(t, 100, after.Load(), "later OnConnection hooks do not run, OnDisconnection hooks do")
		require.ErrorIs(t, *reason.Load(), mesh.ErrClosed)
		assert.Contains(t, (*reason.Load()).Error(), "1011")
		assert.EqualValues(t, 2, s.Stats().CallbackPanics)
		assert.Equal(t, 1, watcher.Count("leave", p.ID), "it leaves the room that the hook joined")
		_, err = s.Connections().Metadata(t.Context(), p.ID)
		require.ErrorIs(t, err, mesh.ErrUnknownConnection)
		in, err := s.Rooms().ConnectionIDs(t.Context(), "other")
		require.NoError(t, err)
		assert.Empty(t, in)
		assert.Zero(t, s.Stats().Connections)

		// A hook that hangs delays only its own connection, until HookTimeout.
		s2 := w.Tracked(func(o *mesh.Options) {
			o.HookTimeout = time.Second
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) { return r.Header.Get("X-Kind"), nil }
		})
		s2.OnConnection(func(_ context.Context, c *mesh.Connection) {
			if strings.Contains(string(c.Member().Metadata), "slow") {
				<-release
			}
		})
		slow, quick := s2.Dial(http.Header{"X-Kind": {"slow"}}), s2.Dial(http.Header{"X-Kind": {"quick"}})
		begun = time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := slow.TryCall("mesh/join-room", map[string]any{"roomName": "lobby"})
			assert.Error(t, err)
			assert.Equal(t, websocket.CloseInternalServerErr, slow.Closed(time.Second))
			assert.InDelta(t, 1, time.Since(begun).Seconds(), 0.1)
		})
		quick.Join("lobby")
		assert.Zero(t, time.Since(begun))
		wg.Wait()
		assert.EqualValues(t, 1, s2.Stats().CallbackTimeouts)
		close(release)
	})
}

// TestACommandEndsItsConnection checks that a command handler may end its own
// connection.
func TestACommandEndsItsConnection(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var ended atomic.Int64
		s.OnDisconnection(func(_ context.Context, _ *mesh.Connection, reason error) {
			assert.ErrorIs(t, reason, mesh.ErrClosed)
			ended.Add(1)
		})
		done := make(chan error, 1)
		require.NoError(t, s.HandleCommand("bye", func(ctx context.Context, c *mesh.Connection, _ json.RawMessage) (any, error) {
			err := s.Presence().Disconnect(ctx, c.ID())
			done <- err
			return nil, err
		}))
		p := s.Dial()
		p.Join("lobby")
		_, _ = p.TryCall("bye", nil)
		err := <-done
		assert.True(t, err == nil || errors.Is(err, context.Canceled), "%v", err)
		assert.Equal(t, 1000, p.Closed(2*time.Second))
		w.Sleep(time.Second)
		assert.EqualValues(t, 1, ended.Load())
		n, err := s.Presence().Count(t.Context(), "lobby")
		require.NoError(t, err)
		assert.Zero(t, n)
	})
}
