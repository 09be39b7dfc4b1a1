package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/store"
)

// status asks a server's handler without upgrading anything.
func status(s http.Handler) *httptest.ResponseRecorder {
	rec := httptest.NewRecorder()
	s.ServeHTTP(rec, httptest.NewRequest(http.MethodGet, "http://127.0.0.1/ws", nil))
	return rec
}

func TestStartWaitsForRedis(t *testing.T) {
	t.Parallel()
	// Not on a cluster: nodes that stood still depose each other when they go on.
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		var log testlog.Logbook
		opts := w.Options()
		opts.Logger = slog.New(&log)
		srv, err := mesh.NewServer(opts)
		require.NoError(t, err)
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrNotStarted)
		require.ErrorIs(t, srv.Connections().SetMetadata(t.Context(), "x", 1, mesh.MetadataOptions{}), mesh.ErrNotStarted)
		rec := status(srv)
		assert.Equal(t, http.StatusServiceUnavailable, rec.Code)
		assert.NotEmpty(t, rec.Header().Get("Retry-After"))

		w.Away()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		begun := time.Now()
		require.ErrorIs(t, srv.Start(ctx), mesh.ErrUnavailable)
		assert.Less(t, time.Since(begun), w.Unhurried(2*time.Second), "bounded by its context")
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrNotStarted)

		started := make(chan error, 1)
		go func() { started <- srv.Start(t.Context()) }()
		w.Sleep(300 * time.Millisecond)
		assert.Equal(t, http.StatusServiceUnavailable, status(srv).Code)
		select {
		case err := <-started:
			require.FailNow(t, "started without Redis", "%v", err)
		default:
		}
		w.Eventually(10*time.Second, func() bool { return log.Told("start waits for redis") > 0 }, "it says what it waits for")
		w.Back()
		require.NoError(t, <-started)
		require.NoError(t, srv.Start(t.Context()), "once more does nothing")
		require.NoError(t, srv.Ready(t.Context()))
		assert.Equal(t, http.StatusBadRequest, status(srv).Code, "no upgrade")

		require.NoError(t, srv.Shutdown(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrClosed)
		require.ErrorIs(t, srv.Start(t.Context()), mesh.ErrClosed)
		assert.Equal(t, http.StatusServiceUnavailable, status(srv).Code)
	})
}

func TestShutdownWithoutStart(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		srv, err := mesh.NewServer(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.NoError(t, srv.Shutdown(t.Context()))
		require.ErrorIs(t, srv.Start(t.Context()), mesh.ErrClosed)
	})
}

func TestBadOptions(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		for field, o := range map[string]mesh.Options{
			"Redis":             {},
			"Prefix":            {Redis: w.Client(), Prefix: "a{b}"},
			"LeaseTTL":          {Redis: w.Client(), LeaseTTL: time.Millisecond},
			"PingInterval":      {Redis: w.Client(), PingInterval: -1},
			"AllowedOrigins":    {Redis: w.Client(), AllowedOrigins: []string{"https://*"}},
			"Limits.StateBytes": {Redis: w.Client(), Limits: mesh.Limits{StateBytes: 1 << 40}},
		} {
			_, err := mesh.NewServer(o)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, field)
			assert.ErrorContains(t, err, field)
			_, err = mesh.NewPresenceManager(o)
			require.ErrorIs(t, err, mesh.ErrInvalidOptions, field)
		}
		s := w.Server()
		require.ErrorIs(t, s.TrackPresence(mesh.Pattern{}, mesh.PresenceOptions{}), mesh.ErrInvalidPattern)
		require.ErrorIs(t, s.TrackPresence(mesh.Exact("x"), mesh.PresenceOptions{TTL: time.Millisecond}), mesh.ErrInvalidOptions)
	})
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const sockets, others = 20, 300
		s1, s2 := w.Tracked(slowWrites(time.Millisecond)), w.Tracked()
		ctx := t.Context()
		watcher := s2.Dial()
		watcher.Subscribe("lobby")
		var peers []*harness.Peer
		for range sockets {
			p := s1.Dial()
			p.Join("lobby")
			p.Subscribe("lobby")
			peers = append(peers, p)
		}
		var joined sync.WaitGroup
		for i := range others {
			joined.Go(func() {
				id := fmt.Sprintf("c%d", i)
				assert.NoError(t, s1.Presence().Connect(ctx, id, nil))
				// On a busy machine Redis may have the join only after the call has ended.
				if err := s1.Presence().Join(ctx, "lobby", id); !errors.Is(err, mesh.ErrUnavailable) {
					assert.NoError(t, err)
				}
			})
		}
		joined.Wait()
		// Also to those who are about to be closed: how long a queue may get,
		// others test.
		w.Eventually(30*time.Second, func() bool {
			last := watcher.Got()
			for _, p := range peers {
				got := p.Got()
				if len(last) < sockets+others || len(got) == 0 || got[len(got)-1].Seq < last[len(last)-1].Seq {
					return false
				}
			}
			return watcher.Count("join", "") == sockets+others
		}, "all joins")
		before := s1.Stats().Batches

		begun := time.Now()
		var ends sync.WaitGroup
		for range 3 {
			ends.Go(func() { assert.NoError(t, s1.Shutdown(ctx)) })
		}
		ends.Wait()
		assert.Less(t, time.Since(begun), w.Unhurried(3*time.Second))
		for _, p := range peers {
			assert.Equal(t, websocket.CloseServiceRestart, p.Closed(time.Second))
			assert.Zero(t, p.Pushed("mesh/presence-ended"))
		}
		w.Eventually(2*time.Second, func() bool { return watcher.Count("leave", "") == sockets+others }, "all leaves, at once and not by a lease")
		for _, u := range watcher.Got() {
			assert.False(t, u.Repair, "%s", u)
		}
		w.LeftTogether(s1.Stats().Batches-before, sockets+2*others)

		_, resp, err := s1.TryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		require.ErrorIs(t, s1.Presence().Join(ctx, "lobby", "c1"), mesh.ErrClosed)
		require.ErrorIs(t, s1.Rooms().Clear(ctx, "lobby"), mesh.ErrClosed)
		for _, err := range s1.Presence().Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
			require.ErrorIs(t, err, mesh.ErrClosed)
		}
		ids, err := s2.Rooms().ConnectionIDs(ctx, "lobby")
		require.NoError(t, err)
		assert.Empty(t, ids)
		// What is left in Redis is the other server's, or has a TTL.
		c := w.Client()
		names := w.Keys()
		for _, k := range w.InStore() {
			ttl, err := c.TTL(ctx, k).Result()
			require.NoError(t, err)
			fixed := k == names.Format() || k == names.Instances() || strings.Contains(k, s2.Stats().Incarnation) || strings.HasSuffix(k, watcher.ID)
			assert.True(t, fixed || ttl > 0, "%s has no TTL", k)
		}
		watcher.Call("mesh/noop", nil)
	})
}

func TestShutdownIsBounded(t *testing.T) {
	t.Parallel()
	release := func(t *testing.T) chan struct{} {
		c := make(chan struct{})
		t.Cleanup(func() { close(c) })
		return c
	}
	for name, hang := range map[string]func(t *testing.T, w *harness.World, s *harness.Server){
		"Redis is away": func(t *testing.T, w *harness.World, s *harness.Server) {
			w.Away()
			t.Cleanup(w.Back)
		},
		"a command hangs": func(t *testing.T, w *harness.World, s *harness.Server) {
			c := release(t)
			require.NoError(t, s.HandleCommand("hang", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { <-c; return nil, nil }))
			require.NoError(t, s.Dial().Send(map[string]any{"id": 1, "command": "hang"}))
			w.Sleep(10 * time.Millisecond)
		},
		"a guard hangs": func(t *testing.T, w *harness.World, s *harness.Server) {
			c := release(t)
			require.NoError(t, s.TrackPresence(mesh.Exact("hang"), mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { <-c; return true, nil }}))
			require.NoError(t, s.Dial().Send(map[string]any{"id": 1, "command": "mesh/subscribe-presence", "payload": harness.InRoomPayload("hang")}))
			w.Sleep(10 * time.Millisecond)
		},
		"a guard hangs that is asked again": func(t *testing.T, w *harness.World, s *harness.Server) {
			c, asked := release(t), make(chan struct{})
			require.NoError(t, s.TrackPresence(mesh.Exact("hang"), mesh.PresenceOptions{Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
				if m.Metadata != nil {
					close(asked)
					<-c
				}
				return true, nil
			}}))
			require.NoError(t, s.Presence().Connect(t.Context(), "viewer", nil))
			go func() {
				for range s.Presence().Subscribe(context.Background(), "hang", mesh.SubscribeOptions{Viewer: "viewer"}) {
					continue
				}
			}()
			w.Sleep(10 * time.Millisecond)
			require.NoError(t, s.Connections().SetMetadata(t.Context(), "viewer", 1, mesh.MetadataOptions{}))
			<-asked
		},
		"a hook hangs": func(t *testing.T, w *harness.World, s *harness.Server) {
			c := release(t)
			s.OnDisconnection(func(context.Context, *mesh.Connection, error) { <-c })
			s.Dial()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				long := func(o *mesh.Options) { o.GuardTimeout, o.HookTimeout = time.Hour, time.Hour }
				s := w.Tracked(long)
				s.Dial().Join("lobby")
				hang(t, w, s)
				s.Stop.Do(func() { // the harness's own would ask for a clean one
					t.Cleanup(func() { _ = s.HTTP.Close(); <-s.Done })
				})
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				begun := time.Now()
				require.Error(t, s.Shutdown(ctx))
				assert.LessOrEqual(t, time.Since(begun), 3300*time.Millisecond)
			})
		})
	}
}

func TestTwoPrefixesOnOneRedis(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		a, b := w.Tracked(), w.Tracked(func(o *mesh.Options) { o.Prefix += "other:" })
		pa, pb := a.Dial(), b.Dial()
		pa.Subscribe("lobby")
		pb.Subscribe("lobby")
		assert.Equal(t, []string{pa.ID}, pa.Join("lobby").IDs(t))
		assert.Equal(t, []string{pb.ID}, pb.Join("lobby").IDs(t))
		pa.Expect(time.Second, "join", pa.ID)
		pb.Expect(time.Second, "join", pb.ID)
		require.ErrorIs(t, a.Connections().SetMetadata(t.Context(), pb.ID, 1, mesh.MetadataOptions{}), mesh.ErrUnknownConnection)
		w.Sleep(100 * time.Millisecond)
		assert.Len(t, pa.Got(), 1)
		assert.Len(t, pb.Got(), 1)
	})
}

func TestForeignKeysUnderThePrefix(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		c := w.Client()
		ctx := t.Context()
		under := func(prefix string) store.Keys { return w.KeysUnder(w.KeyPrefix() + prefix) }
		for name, put := range map[string]func() error{
			"a newer format": func() error { return c.Set(ctx, under("newer:").Format(), "99", 0).Err() },
			"no format":      func() error { return c.Set(ctx, under("odd:").Format(), "x", 0).Err() },
			"another type":   func() error { return c.SAdd(ctx, under("type:").Format(), "x").Err() },
			"foreign lists":  func() error { return c.SAdd(ctx, under("foreign:").Instances(), "x").Err() },
			// What the TypeScript server has while it runs, on a cluster too, and
			// what it leaves behind.
			"its instances":   func() error { return c.SAdd(ctx, w.KeyPrefix()+"ts:instances", "x").Err() },
			"its connections": func() error { return c.HSet(ctx, w.KeyPrefix()+"ts2:connections", "c", "x").Err() },
			"its metadata":    func() error { return c.HSet(ctx, w.KeyPrefix()+"ts3:connection-meta", "c", "{}").Err() },
		} {
			require.NoError(t, put(), name)
		}
		for prefix, key := range map[string]string{
			"newer:": "format", "odd:": "format", "type:": "format", "foreign:": "instances",
			"ts:": "instances", "ts2:": "connections", "ts3:": "connection-meta",
		} {
			srv, err := mesh.NewServer(mesh.Options{Redis: c, Prefix: w.KeyPrefix() + prefix})
			require.NoError(t, err)
			begun := time.Now()
			err = srv.Start(ctx)
			require.ErrorIs(t, err, mesh.ErrIncompatible, prefix)
			assert.ErrorContains(t, err, "Prefix", "it says what to do")
			assert.Regexp(t, regexp.QuoteMeta(w.KeyPrefix()+prefix)+`\S*`+key+" ", err.Error(), "and which key it is")
			assert.Less(t, time.Since(begun), w.Unhurried(time.Second), "there is no use in trying again")
			require.NoError(t, srv.Shutdown(ctx))
		}
	})
}

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
		p.Writing.Lock()
		require.NoError(t, p.WS.WriteMessage(websocket.BinaryMessage, []byte("binary")))
		p.Writing.Unlock()
		w.Eventually(2*time.Second, func() bool { return p.Pushed("app/got") == 3 }, "the frames")
		mu.Lock()
		assert.Equal(t, []string{"1 \"just text\"\n", "1 {\"type\":\"app's own\"}\n", "2 binary"}, foreign, "in order")
		mu.Unlock()
		assert.Equal(t, "true", string(p.Call("mesh/noop", nil)))

		gone := errors.New("gone")
		cancel(gone)
		assert.Equal(t, websocket.CloseGoingAway, p.Closed(2*time.Second))
		require.ErrorIs(t, <-ended, gone, "it says how it ended")
		ids, err := srv.Rooms().ConnectionIDs(t.Context(), "lobby")
		w.Eventually(2*time.Second, func() bool {
			ids, err = srv.Rooms().ConnectionIDs(t.Context(), "lobby")
			return err == nil && len(ids) == 0
		}, "it has left")

		require.NoError(t, srv.Shutdown(t.Context()))
		_, _, err = s.TryDial()
		require.Error(t, err)
		require.ErrorIs(t, <-ended, mesh.ErrClosed)
	})
}

// A WebSocket of the app's that is not served is closed with a code that says why, and
// the log says it, too: most apps do not look at the error.
func TestNotServedSaysWhy(t *testing.T) {
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
		"the level":           {start, mesh.ConnOptions{Level: 7}, 1011, "the connection could not be set up", slog.LevelWarn, "it could not be set up error=mesh: invalid options: ConnOptions.Level is 7"},
		"the metadata":        {start, mesh.ConnOptions{Metadata: make(chan int)}, 1011, "the connection could not be set up", slog.LevelWarn, "it could not be set up"},
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
				var closed *websocket.CloseError
				require.ErrorAs(t, err, &closed)
				assert.Equal(t, c.code, closed.Code)
				assert.Equal(t, c.reason, closed.Text)
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

func TestRedisAway(t *testing.T) {
	t.Parallel()
	// Not on a cluster: nodes that stood still depose each other when they go on.
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		watcher, p, late := s.Dial(), s.Dial(), s.Dial()
		var others []*harness.Peer
		for range 5 {
			others = append(others, s.Dial())
		}
		watcher.Subscribe("lobby")
		p.Join("lobby")
		watcher.Expect(time.Second, "join", p.ID)
		require.Equal(t, "true", p.State("lobby", map[string]any{"a": 1}))
		watcher.Expect(time.Second, "state", p.ID)
		w.Away()

		var wg sync.WaitGroup
		within := func(p *harness.Peer, command string, payload any, check func(answer json.RawMessage)) {
			wg.Go(func() {
				begun := time.Now()
				answer, err := p.TryCall(command, payload)
				if assert.NoError(t, err, command) {
					assert.LessOrEqual(t, time.Since(begun), w.Unhurried(2100*time.Millisecond), command)
					check(answer)
				}
			})
		}
		unavailable := func(answer json.RawMessage) {
			assert.JSONEq(t, `{"error":"Temporarily unavailable","code":"EUNAVAILABLE","name":"CommandError"}`, string(answer))
		}
		stale := func(answer json.RawMessage) {
			var v harness.View
			if assert.NoError(t, json.Unmarshal(answer, &v)) {
				assert.True(t, v.Success && v.Stale, "%s", answer)
			}
		}
		within(late, "mesh/join-room", harness.InRoomPayload("lobby"), stale)
		within(p, "mesh/publish-presence-state", map[string]any{"roomName": "lobby", "state": map[string]any{"a": 2}},
			func(answer json.RawMessage) { assert.Equal(t, "false", string(answer)) })
		within(others[0], "mesh/subscribe-presence", harness.InRoomPayload("elsewhere"), stale)
		within(others[1], "mesh/get-presence-state", harness.InRoomPayload("elsewhere"), unavailable)
		within(others[2], "mesh/get-room-metadata", harness.InRoomPayload("lobby"), unavailable)
		within(others[3], "mesh/noop", nil, func(answer json.RawMessage) { assert.Equal(t, "true", string(answer)) })
		wg.Wait()
		// Before long it has been noticed that nothing is heard.
		for _, command := range []string{"mesh/subscribe-presence", "mesh/get-presence-state"} {
			c := others[4]
			w.Eventually(6*time.Second, func() bool { return c.Room(command, "lobby").Stale }, "%s: stale", command)
			v := c.Room(command, "lobby")
			assert.True(t, v.Success)
			assert.True(t, v.Stale)
			assert.Contains(t, string(v.Present), p.ID)
			assert.JSONEq(t, `{"a":1}`, string(v.States[p.ID]))
		}
		assert.Zero(t, watcher.Pushed("mesh/presence-ended"))
		assert.Zero(t, watcher.Count("leave", ""))

		w.Back()
		watcher.Expect(8*time.Second, "join", late.ID)
		w.Eventually(8*time.Second, func() bool {
			got := watcher.Got()
			return string(got[len(got)-1].State) == `{"a":2}` || watcher.Count("state", p.ID) == 2
		}, "what was asked for is made true")
		w.Eventually(5*time.Second, func() bool { return s.Stats().Stale == 0 }, "in order again")
		assert.Zero(t, watcher.Count("leave", ""), "%v", watcher.Got())
		assert.ElementsMatch(t, []string{p.ID, late.ID}, s.Dial().Subscribe("lobby").IDs(t))
		assert.Zero(t, s.Stats().Reregistered)
	})
}
