package mesh

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
)

func TestConnectionMetadataAcrossServers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		ctx := t.Context()
		p, watcher, late := s1.dial(), s2.dial(), s2.dial()
		p.join("lobby")
		watcher.join("lobby")
		watcher.subscribe("lobby")
		// From the server that does not have the connection.
		require.NoError(t, s2.Connections().SetMetadata(ctx, p.id, map[string]any{"name": "ann", "n": json.RawMessage(`1.10`)}, MetadataOptions{}))
		for _, s := range []*testServer{s1, s2} {
			w.eventually(time.Second, func() bool {
				data, err := s.Connections().Metadata(ctx, p.id)
				return err == nil && string(data) == `{"n":1.10,"name":"ann"}`
			}, "the metadata")
		}
		w.eventually(2*time.Second, func() bool {
			members, err := s2.Presence().Members(ctx, "lobby")
			require.NoError(t, err)
			for _, m := range members {
				if m.ID == p.id && m.Metadata != nil {
					return true
				}
			}
			return false
		}, "members lists show it")
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(p.call("mesh/get-my-connection-metadata", nil)))
		ask := map[string]any{"connectionId": p.id}
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(watcher.call("mesh/get-connection-metadata", ask)))
		assert.JSONEq(t, `{"metadata":null}`, string(late.call("mesh/get-connection-metadata", ask)), "no room in common")
		var shown json.RawMessage
		w.eventually(2*time.Second, func() bool { // the change comes to the mirror as an event
			var present []Member
			require.NoError(t, json.Unmarshal(late.subscribe("lobby").Present, &present))
			for _, m := range present {
				if m.ID == p.id {
					shown = m.Metadata
				}
			}
			return shown != nil && string(shown) != "null"
		}, "the room's watchers are shown it")
		assert.JSONEq(t, `{"name":"ann","n":1.10}`, string(shown))
		assert.JSONEq(t, `{"metadata":{"name":"ann","n":1.10}}`, string(late.call("mesh/get-connection-metadata", ask)), "watching is enough")
		all, err := s2.Connections().RoomMetadata(ctx, "lobby")
		require.NoError(t, err)
		assert.Len(t, all, 2)
		assert.JSONEq(t, `{"name":"ann","n":1.10}`, string(all[p.id]))
		assert.Nil(t, all[watcher.id])
		w.sleep(50 * time.Millisecond)
		assert.Empty(t, watcher.got(), "subscribers are told of joins, leaves and states")

		require.NoError(t, s2.Connections().SetMetadata(ctx, p.id, nil, MetadataOptions{}))
		w.eventually(time.Second, func() bool {
			data, err := s1.Connections().Metadata(ctx, p.id)
			return err == nil && data == nil
		}, "nil removes")

		p.close()
		w.eventually(2*time.Second, func() bool {
			_, err := s2.Connections().Metadata(ctx, p.id)
			return errors.Is(err, ErrUnknownConnection)
		}, "gone with the connection")
		require.ErrorIs(t, s2.Connections().SetMetadata(ctx, p.id, 1, MetadataOptions{}), ErrUnknownConnection)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, p.id, 1, MetadataOptions{}), ErrUnknownConnection)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, watcher.id, make(chan int), MetadataOptions{}), ErrInvalidMetadata)
		require.ErrorIs(t, s1.Connections().SetMetadata(ctx, watcher.id, strings.Repeat("x", 17<<10), MetadataOptions{}), ErrTooLarge)
	})
}

func TestConnectionMetadataMergedAtOnceLosesNothing(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		servers := []*testServer{w.tracked(), w.tracked()}
		p := servers[0].dial()
		p.join("lobby")
		mergeAtOnce(t, func(server int, change map[string]any, strategy Strategy) error {
			return servers[server].Connections().SetMetadata(t.Context(), p.id, change, MetadataOptions{Strategy: strategy})
		}, func(server int) json.RawMessage {
			// The owner's memory is told of the last change a moment later.
			data := func(s *testServer) string {
				data, err := s.Connections().Metadata(t.Context(), p.id)
				require.NoError(t, err)
				return string(data)
			}
			w.eventually(2*time.Second, func() bool { return data(servers[0]) == data(servers[1]) }, "both the same")
			return json.RawMessage(data(servers[server]))
		})
	})
}

func TestClosingAndRecheckingAcrossServers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.server(), w.server()
		var allowed atomic.Bool
		allowed.Store(true)
		for _, s := range []*testServer{s1, s2} {
			s.track(".*", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) { return allowed.Load(), nil }})
		}
		p := s2.dial()
		p.subscribe("lobby")
		allowed.Store(false)
		p.subscribe("lobby") // the verdict is kept
		require.NoError(t, s1.Connections().Recheck(t.Context(), p.id))
		w.eventually(time.Second, func() bool { return p.pushed("mesh/presence-ended") == 1 }, "the end")
		require.ErrorIs(t, s1.Connections().Recheck(t.Context(), "nobody"), ErrUnknownConnection)

		require.NoError(t, s1.Connections().Close(t.Context(), p.id))
		assert.Equal(t, 1000, p.closed(2*time.Second))
	})
}

func TestAppCommands(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked()
		handle := func(name string, h CommandHandler) {
			require.NoError(t, s.HandleCommand(name, h))
		}
		handle("echo", func(_ context.Context, c *Connection, payload json.RawMessage) (any, error) {
			return map[string]any{"id": c.ID(), "payload": payload, "rooms": c.Rooms()}, nil
		})
		handle("nothing", func(context.Context, *Connection, json.RawMessage) (any, error) { return nil, nil })
		handle("fail", func(context.Context, *Connection, json.RawMessage) (any, error) { return nil, errors.New("no luck") })
		handle("coded", func(context.Context, *Connection, json.RawMessage) (any, error) {
			return nil, &CommandError{Code: "ETEAPOT", Name: "Teapot", Message: "short and stout"}
		})
		handle("panic", func(context.Context, *Connection, json.RawMessage) (any, error) { panic("secret") })
		handle("goexit", func(context.Context, *Connection, json.RawMessage) (any, error) { runtime.Goexit(); return nil, nil })
		handle("unencodable", func(context.Context, *Connection, json.RawMessage) (any, error) { return make(chan int), nil })
		p := s.dial()
		p.join("lobby")
		for command, want := range map[string]string{
			"echo":    `{"id":"` + p.id + `","payload":{"n":1.0},"rooms":["lobby"]}`,
			"nothing": `null`,
			"fail":    `{"error":"no luck","code":"ESERVER","name":"Error"}`,
			"coded":   `{"error":"short and stout","code":"ETEAPOT","name":"Teapot"}`,
			"panic":   `{"error":"Internal error","code":"ESERVER","name":"Error"}`,
			"goexit":  `{"error":"Internal error","code":"ESERVER","name":"Error"}`,
		} {
			assert.JSONEq(t, want, string(p.call(command, json.RawMessage(`{"n":1.0}`))), command)
		}
		assert.Contains(t, string(p.call("unencodable", nil)), `"ESERVER"`)
		w.eventually(time.Second, func() bool { return s.Stats().CallbackPanics == 2 }, "both are counted")

		for _, name := range []string{"", "mesh/noop", "mesh/mine", "ping", "pong", "latency", "latency:request", "latency:response"} {
			require.ErrorIs(t, s.HandleCommand(name, func(context.Context, *Connection, json.RawMessage) (any, error) { return nil, nil }), ErrInvalidCommand, "%q", name)
		}
		require.ErrorIs(t, s.HandleCommand("echo", func(context.Context, *Connection, json.RawMessage) (any, error) { return nil, nil }), ErrCommandExists)
		require.ErrorIs(t, s.HandleCommand("nil", nil), ErrInvalidOptions)
	})
}

func TestAHungHandlerDoesNotKeepItsConnectionPresent(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		release := make(chan struct{})
		require.NoError(t, s.HandleCommand("hang", func(context.Context, *Connection, json.RawMessage) (any, error) {
			<-release // whatever its context says
			return nil, nil
		}))
		watcher, p := s.dial(), s.dial()
		watcher.subscribe("lobby")
		p.join("lobby")
		require.NoError(t, p.send(map[string]any{"id": 1000, "command": "hang"}))
		p.call("mesh/noop", nil)
		p.close()
		watcher.expect(2*time.Second, "leave", p.id)
		close(release)
	})
}

func TestConnectionHooks(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked()
		type ending struct {
			member  Member
			present []string
			reason  error
		}
		ended := make(chan ending, 10)
		s.OnConnection(func(ctx context.Context, c *Connection) {
			// The client's first command is on its way already.
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), map[string]any{"userId": "u1"}, MetadataOptions{}))
		})
		s.OnConnection(func(ctx context.Context, c *Connection) {
			assert.JSONEq(t, `{"userId":"u1"}`, string(c.Member().Metadata), "in the order added")
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), map[string]any{"second": true}, MetadataOptions{Strategy: Merge}))
			assert.NotNil(t, c.RemoteAddr())
		})
		s.OnDisconnection(func(ctx context.Context, c *Connection, reason error) {
			present, err := s.Presence().PresentConnections(ctx, "lobby")
			assert.NoError(t, err)
			ended <- ending{c.Member(), present, reason}
		})
		var present []Member
		p := s.dial()
		require.NoError(t, json.Unmarshal(p.join("lobby").Present, &present))
		require.Len(t, present, 1)
		assert.JSONEq(t, `{"userId":"u1","second":true}`, string(present[0].Metadata))

		require.NoError(t, s.Connections().Close(t.Context(), p.id))
		p.closed(2 * time.Second)
		e := <-ended
		assert.Equal(t, p.id, e.member.ID)
		assert.JSONEq(t, `{"userId":"u1","second":true}`, string(e.member.Metadata), "what it was is still known")
		assert.Empty(t, e.present, "it has left by then")
		assert.ErrorContains(t, e.reason, "closed")

		p = s.dial()
		p.join("lobby")
		p.close()
		e = <-ended
		assert.Empty(t, e.present)
		assert.ErrorContains(t, e.reason, "broken", "the client went without a word")
		_, open := s.Connection(p.id)
		assert.False(t, open)
	})
}

func TestHooksThatFail(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(func(o *Options) { o.HookTimeout = time.Second })
		release := make(chan struct{})
		var after atomic.Int32
		var reason atomic.Pointer[error]
		s.OnConnection(func(ctx context.Context, c *Connection) {
			assert.NoError(t, s.Connections().SetMetadata(ctx, c.ID(), "half", MetadataOptions{}))
			assert.NoError(t, s.Presence().Join(ctx, "lobby", c.ID()))
			panic("up")
		})
		s.OnConnection(func(context.Context, *Connection) { after.Add(1) })
		s.OnDisconnection(func(_ context.Context, _ *Connection, err error) { reason.Store(&err); panic("down") })
		s.OnDisconnection(func(context.Context, *Connection, error) { after.Add(100) })
		watcher := w.tracked().dial()
		watcher.subscribe("lobby")

		// Nothing remains of a connection whose first function failed.
		p := s.dial()
		begun := time.Now()
		_, err := p.tryCall("mesh/join-room", map[string]any{"roomName": "other"})
		require.Error(t, err, "no command is carried out")
		assert.Equal(t, websocket.CloseInternalServerErr, p.closed(time.Second))
		assert.Zero(t, time.Since(begun), "a panic costs no time")
		w.sleep(time.Second)
		assert.EqualValues(t, 100, after.Load(), "the functions after it are not called, those at the end are")
		require.ErrorIs(t, *reason.Load(), ErrClosed)
		assert.Contains(t, (*reason.Load()).Error(), "1011")
		assert.EqualValues(t, 2, s.Stats().CallbackPanics)
		assert.Equal(t, 1, watcher.count("leave", p.id), "it leaves what a function has joined")
		_, err = s.Connections().Metadata(t.Context(), p.id)
		require.ErrorIs(t, err, ErrUnknownConnection)
		in, err := s.Rooms().Members(t.Context(), "other")
		require.NoError(t, err)
		assert.Empty(t, in)
		assert.Zero(t, s.Stats().Connections)

		// One that hangs holds up its own connection, for a while.
		s2 := w.tracked(func(o *Options) {
			o.HookTimeout = time.Second
			o.Authenticate = func(_ context.Context, r *http.Request) (any, error) { return r.Header.Get("X-Kind"), nil }
		})
		s2.OnConnection(func(_ context.Context, c *Connection) {
			if strings.Contains(string(c.Member().Metadata), "slow") {
				<-release
			}
		})
		slow, quick := s2.dial(http.Header{"X-Kind": {"slow"}}), s2.dial(http.Header{"X-Kind": {"quick"}})
		begun = time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := slow.tryCall("mesh/join-room", map[string]any{"roomName": "lobby"})
			assert.Error(t, err)
			assert.Equal(t, websocket.CloseInternalServerErr, slow.closed(time.Second))
			assert.InDelta(t, 1, time.Since(begun).Seconds(), 0.1)
		})
		quick.join("lobby")
		assert.Zero(t, time.Since(begun))
		wg.Wait()
		assert.EqualValues(t, 1, s2.Stats().CallbackTimeouts)
		close(release)
	})
}

func TestAuthenticate(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		release := make(chan struct{})
		defer close(release)
		s := w.tracked(func(o *Options) {
			o.HookTimeout = 300 * time.Millisecond
			o.Authenticate = func(ctx context.Context, r *http.Request) (any, error) {
				switch r.Header.Get("X-Who") {
				case "ann":
					return map[string]any{"userId": "ann"}, nil
				case "nobody":
					return nil, nil
				case "refused":
					return nil, Refuse(403, "not today")
				case "wrapped":
					return nil, errors.Join(errors.New("secret"), Refuse(429, "slow down"))
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
		p := s.dial(header("ann"))
		assert.JSONEq(t, `{"metadata":{"userId":"ann"}}`, string(p.call("mesh/get-my-connection-metadata", nil)))
		var present []Member
		require.NoError(t, json.Unmarshal(p.join("lobby").Present, &present))
		assert.JSONEq(t, `{"userId":"ann"}`, string(present[0].Metadata))
		assert.JSONEq(t, `{"metadata":null}`, string(s.dial(header("nobody")).call("mesh/get-my-connection-metadata", nil)))
		for _, c := range []struct {
			who    string
			status int
			body   string
		}{
			{"other", 401, "Unauthorized"},
			{"refused", 403, "not today"},
			{"wrapped", 429, "slow down"},
			{"panic", 401, "Unauthorized"},
			{"hang", 401, "Unauthorized"},
			{"unencodable", 401, "Unauthorized"},
		} {
			begun := time.Now()
			_, resp, err := s.tryDial(header(c.who))
			require.Error(t, err, c.who)
			require.NotNil(t, resp, c.who)
			assert.Equal(t, c.status, resp.StatusCode, c.who)
			body := make([]byte, 100)
			n, _ := resp.Body.Read(body)
			assert.Equal(t, c.body, strings.TrimSpace(string(body[:n])), c.who)
			assert.Less(t, time.Since(begun), 2*time.Second)
		}
		assert.Equal(t, 2, s.Stats().Connections)
	})
}
