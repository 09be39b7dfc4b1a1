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

func TestConnectionMetadataAcrossServers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		ctx := t.Context()
		p, watcher, late := s1.Dial(), s2.Dial(), s2.Dial()
		p.Join("lobby")
		watcher.Join("lobby")
		watcher.Subscribe("lobby")
		// From the server that does not have the connection.
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.ID, map[string]any{"name": "ann", "n": json.RawMessage(`1.10`)}, mesh.MetadataOptions{}))
		for _, s := range []*harness.Server{s1, s2} {
			w.Eventually(time.Second, func() bool {
				data, err := s.Connections().Metadata(ctx, p.ID)
				return err == nil && string(data) == `{"n":1.10,"name":"ann"}`
			}, "the metadata")
		}
		w.Eventually(2*time.Second, func() bool {
			members, err := s2.Presence().Members(ctx, "lobby")
			require.NoError(t, err)
			for _, m := range members {
				if m.ID == p.ID && m.Metadata != nil {
					return true
				}
			}
			return false
		}, "members lists show it")
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
		ask := map[string]any{"connectionId": p.ID}
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(watcher.Call("mesh/get-connection-metadata", ask)))
		assert.JSONEq(t, `{"metadata":null}`, string(late.Call("mesh/get-connection-metadata", ask)), "no room in common")
		var shown json.RawMessage
		w.Eventually(2*time.Second, func() bool { // the change comes to the mirror as an event
			var present []mesh.Member
			require.NoError(t, json.Unmarshal(late.Subscribe("lobby").Present, &present))
			for _, m := range present {
				if m.ID == p.ID {
					shown = m.Metadata
				}
			}
			return shown != nil && string(shown) != "null"
		}, "the room's watchers are shown it")
		assert.JSONEq(t, `{"name":"ann","n":1.10}`, string(shown))
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(late.Call("mesh/get-connection-metadata", ask)), "watching is enough")
		all, err := s2.Connections().RoomMetadata(ctx, "lobby")
		require.NoError(t, err)
		assert.Len(t, all, 2)
		assert.JSONEq(t, `{"name":"ann","n":1.10}`, string(all[p.ID]))
		assert.Nil(t, all[watcher.ID])
		w.Sleep(50 * time.Millisecond)
		assert.Empty(t, watcher.Got(), "subscribers are told of joins, leaves and states")

		require.NoError(t, s2.Connections().SetMetadata(ctx, p.ID, nil, mesh.MetadataOptions{}))
		w.Eventually(time.Second, func() bool {
			data, err := s1.Connections().Metadata(ctx, p.ID)
			return err == nil && data == nil
		}, "nil removes")

		p.Close()
		w.Eventually(2*time.Second, func() bool {
			_, err := s2.Connections().Metadata(ctx, p.ID)
			return errors.Is(err, mesh.ErrUnknownConnection)
		}, "gone with the connection")
		require.ErrorIs(t, s2.Connections().SetMetadata(ctx, p.ID, 1, mesh.MetadataOptions{}), mesh.ErrUnknownConnection)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, p.ID, 1, mesh.MetadataOptions{}), mesh.ErrUnknownConnection)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, watcher.ID, make(chan int), mesh.MetadataOptions{}), mesh.ErrInvalidMetadata)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, watcher.ID, strings.Repeat("x", 17<<10), mesh.MetadataOptions{}), mesh.ErrTooLarge)
	})
}

func TestConnectionMetadataMergedAtOnceLosesNothing(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		servers := []*harness.Server{w.Tracked(), w.Tracked()}
		p := servers[0].Dial()
		p.Join("lobby")
		mergeAtOnce(t, func(server int, change map[string]any, strategy mesh.Strategy) error {
			return servers[server].Connections().SetMetadata(t.Context(), p.ID, change, mesh.MetadataOptions{Strategy: strategy})
		}, func(server int) json.RawMessage {
			// The owner's memory is told of the last change a moment later.
			data := func(s *harness.Server) string {
				data, err := s.Connections().Metadata(t.Context(), p.ID)
				require.NoError(t, err)
				return string(data)
			}
			w.Eventually(2*time.Second, func() bool { return data(servers[0]) == data(servers[1]) }, "both the same")
			return json.RawMessage(data(servers[server]))
		})
	})
}

func TestClosingAndRecheckingAcrossServers(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Server(), w.Server()
		var allowed atomic.Bool
		allowed.Store(true)
		for _, s := range []*harness.Server{s1, s2} {
			s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { return allowed.Load(), nil }})
		}
		p := s2.Dial()
		p.Subscribe("lobby")
		allowed.Store(false)
		p.Subscribe("lobby") // the verdict is kept
		require.NoError(t, s1.Connections().Recheck(t.Context(), p.ID))
		w.Eventually(time.Second, func() bool { return p.Pushed("mesh/presence-ended") == 1 }, "the end")
		require.ErrorIs(t, s1.Connections().Recheck(t.Context(), "nobody"), mesh.ErrUnknownConnection)

		require.NoError(t, s1.Connections().Close(t.Context(), p.ID))
		assert.Equal(t, 1000, p.Closed(2*time.Second))
	})
}

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
		w.Eventually(time.Second, func() bool { return s.Stats().CallbackPanics == 2 }, "both are counted")

		for _, name := range []string{"", "mesh/noop", "mesh/mine", "ping", "pong", "latency", "latency:request", "latency:response"} {
			require.ErrorIs(t, s.HandleCommand(name, func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { return nil, nil }), mesh.ErrInvalidCommand, "%q", name)
		}
		require.ErrorIs(t, s.HandleCommand("echo", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { return nil, nil }), mesh.ErrCommandExists)
		require.ErrorIs(t, s.HandleCommand("nil", nil), mesh.ErrInvalidOptions)
	})
}

func TestAHungHandlerDoesNotKeepItsConnectionPresent(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		release := make(chan struct{})
		require.NoError(t, s.HandleCommand("hang", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) {
			<-release // whatever its context says
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
			// The client's first command is on its way already.
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), map[string]any{"userId": "u1"}, mesh.MetadataOptions{}))
		})
		s.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			assert.JSONEq(t, `{"userId":"u1"}`, string(c.Member().Metadata), "in the order added")
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
		assert.JSONEq(t, `{"userId":"u1","second":true}`, string(e.member.Metadata), "what it was is still known")
		assert.Empty(t, e.present, "it has left by then")
		assert.ErrorContains(t, e.reason, "closed")

		p = s.Dial()
		p.Join("lobby")
		p.Close()
		e = <-ended
		assert.Empty(t, e.present)
		assert.ErrorContains(t, e.reason, "broken", "the client went without a word")
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

		// Nothing remains of a connection whose first function failed.
		p := s.Dial()
		begun := time.Now()
		_, err := p.TryCall("mesh/join-room", map[string]any{"roomName": "other"})
		require.Error(t, err, "no command is carried out")
		assert.Equal(t, websocket.CloseInternalServerErr, p.Closed(time.Second))
		assert.Zero(t, time.Since(begun), "a panic costs no time")
		w.Sleep(time.Second)
		assert.EqualValues(t, 100, after.Load(), "the functions after it are not called, those at the end are")
		require.ErrorIs(t, *reason.Load(), mesh.ErrClosed)
		assert.Contains(t, (*reason.Load()).Error(), "1011")
		assert.EqualValues(t, 2, s.Stats().CallbackPanics)
		assert.Equal(t, 1, watcher.Count("leave", p.ID), "it leaves what a function has joined")
		_, err = s.Connections().Metadata(t.Context(), p.ID)
		require.ErrorIs(t, err, mesh.ErrUnknownConnection)
		in, err := s.Rooms().ConnectionIDs(t.Context(), "other")
		require.NoError(t, err)
		assert.Empty(t, in)
		assert.Zero(t, s.Stats().Connections)

		// One that hangs holds up its own connection, for a while.
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

func TestAuthenticate(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		release := make(chan struct{})
		defer close(release)
		s := w.Tracked(func(o *mesh.Options) {
			o.HookTimeout = 300 * time.Millisecond
			o.Authenticate = func(ctx context.Context, r *http.Request) (any, error) {
				switch r.Header.Get("X-Who") {
				case "ann":
					return map[string]any{"userId": "ann"}, nil
				case "nobody":
					return nil, nil
				case "refused":
					return nil, mesh.Refuse(403, "not today")
				case "wrapped":
					return nil, errors.Join(errors.New("secret"), mesh.Refuse(429, "slow down"))
				case "panic":
					panic("secret")
				case "hang":
					<-release
				case "unencodable":
					return make(chan int), nil
				}
				return nil, errors.New("secret reason")
			}
		})
		header := func(who string) http.Header { return http.Header{"X-Who": {who}} }
		p := s.Dial(header("ann"))
		assert.JSONEq(t, `{"metadata":{"userId":"ann"}}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
		var present []mesh.Member
		require.NoError(t, json.Unmarshal(p.Join("lobby").Present, &present))
		assert.JSONEq(t, `{"userId":"ann"}`, string(present[0].Metadata))
		assert.JSONEq(t, `{"metadata":null}`, string(s.Dial(header("nobody")).Call("mesh/get-my-connection-metadata", nil)))
		for _, c := range []struct {
			who    string
			status int
			body   string
		}{
			{"other", 401, "Unauthorized"},
			{"refused", 403, "not today"},
			{"wrapped", 429, "slow down"},
			{"panic", 500, "Internal Server Error"},
			{"hang", 500, "Internal Server Error"},
			{"unencodable", 500, "Internal Server Error"},
		} {
			begun := time.Now()
			_, resp, err := s.TryDial(header(c.who))
			require.Error(t, err, c.who)
			require.NotNil(t, resp, c.who)
			assert.Equal(t, c.status, resp.StatusCode, c.who)
			body := make([]byte, 100)
			n, _ := resp.Body.Read(body)
			assert.Equal(t, c.body, strings.TrimSpace(string(body[:n])), c.who)
			assert.Less(t, time.Since(begun), w.Unhurried(2*time.Second))
		}
		assert.Equal(t, 2, s.Stats().Connections)
	})
}
