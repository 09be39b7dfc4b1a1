package mesh

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
	everywhereOn(t, nil, func(t *testing.T, w *world) {
		var log logbook
		opts := w.options()
		opts.Logger = slog.New(&log)
		srv, err := NewServer(opts)
		require.NoError(t, err)
		require.ErrorIs(t, srv.Ready(t.Context()), ErrNotStarted)
		require.ErrorIs(t, srv.Connections().SetMetadata(t.Context(), "x", 1, MetadataOptions{}), ErrNotStarted)
		rec := status(srv)
		assert.Equal(t, http.StatusServiceUnavailable, rec.Code)
		assert.NotEmpty(t, rec.Header().Get("Retry-After"))

		w.away()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		begun := time.Now()
		require.ErrorIs(t, srv.Start(ctx), ErrUnavailable)
		assert.Less(t, time.Since(begun), 2*time.Second, "bounded by its context")
		require.ErrorIs(t, srv.Ready(t.Context()), ErrNotStarted)

		started := make(chan error, 1)
		go func() { started <- srv.Start(t.Context()) }()
		w.sleep(300 * time.Millisecond)
		assert.Equal(t, http.StatusServiceUnavailable, status(srv).Code)
		select {
		case err := <-started:
			require.FailNow(t, "started without Redis", "%v", err)
		default:
		}
		w.eventually(10*time.Second, func() bool { return log.told("start waits for redis") > 0 }, "it says what it waits for")
		w.back()
		require.NoError(t, <-started)
		require.NoError(t, srv.Start(t.Context()), "once more does nothing")
		require.NoError(t, srv.Ready(t.Context()))
		assert.Equal(t, http.StatusBadRequest, status(srv).Code, "no upgrade")

		require.NoError(t, srv.Shutdown(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		require.ErrorIs(t, srv.Ready(t.Context()), ErrClosed)
		require.ErrorIs(t, srv.Start(t.Context()), ErrClosed)
		assert.Equal(t, http.StatusServiceUnavailable, status(srv).Code)
	})
}

func TestShutdownWithoutStart(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		srv, err := NewServer(Options{Redis: w.client()})
		require.NoError(t, err)
		require.NoError(t, srv.Shutdown(t.Context()))
		require.ErrorIs(t, srv.Start(t.Context()), ErrClosed)
	})
}

func TestBadOptions(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		for field, o := range map[string]Options{
			"Redis":             {},
			"Prefix":            {Redis: w.client(), Prefix: "a{b}"},
			"LeaseTTL":          {Redis: w.client(), LeaseTTL: time.Millisecond},
			"PingInterval":      {Redis: w.client(), PingInterval: -1},
			"AllowedOrigins":    {Redis: w.client(), AllowedOrigins: []string{"https://*"}},
			"Limits.StateBytes": {Redis: w.client(), Limits: Limits{StateBytes: 1 << 40}},
		} {
			_, err := NewServer(o)
			require.ErrorIs(t, err, ErrInvalidOptions, field)
			assert.ErrorContains(t, err, field)
			_, err = NewPresenceManager(o)
			require.ErrorIs(t, err, ErrInvalidOptions, field)
		}
		s := w.server()
		require.ErrorIs(t, s.TrackPresence(Pattern{}, PresenceOptions{}), ErrInvalidPattern)
		require.ErrorIs(t, s.TrackPresence(Exact("x"), PresenceOptions{TTL: time.Millisecond}), ErrInvalidOptions)
	})
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const sockets, others = 20, 300
		s1, s2 := w.tracked(), w.tracked()
		ctx := t.Context()
		watcher := s2.dial()
		watcher.subscribe("lobby")
		var peers []*peer
		for range sockets {
			p := s1.dial()
			p.join("lobby")
			p.subscribe("lobby")
			peers = append(peers, p)
		}
		var joined sync.WaitGroup
		for i := range others {
			joined.Go(func() {
				id := fmt.Sprintf("c%d", i)
				assert.NoError(t, s1.Presence().Connect(ctx, id, nil))
				assert.NoError(t, s1.Presence().Join(ctx, "lobby", id))
			})
		}
		joined.Wait()
		// Also to those who are about to be closed: how long a queue may get,
		// others test.
		w.eventually(w.unhurried(5*time.Second), func() bool {
			last := watcher.got()
			for _, p := range peers {
				got := p.got()
				if len(last) < sockets+others || len(got) == 0 || got[len(got)-1].Seq < last[len(last)-1].Seq {
					return false
				}
			}
			return watcher.count("join", "") == sockets+others
		}, "all joins")
		before := s1.Stats().Batches

		begun := time.Now()
		var ends sync.WaitGroup
		for range 3 {
			ends.Go(func() { assert.NoError(t, s1.Shutdown(ctx)) })
		}
		ends.Wait()
		assert.Less(t, time.Since(begun), w.unhurried(3*time.Second))
		for _, p := range peers {
			assert.Equal(t, websocket.CloseServiceRestart, p.closed(time.Second))
			assert.Zero(t, p.pushed("mesh/presence-ended"))
		}
		w.eventually(w.unhurried(2*time.Second), func() bool { return watcher.count("leave", "") == sockets+others }, "all leaves, at once and not by a lease")
		for _, u := range watcher.got() {
			assert.False(t, u.Repair, "%s", u)
		}
		// Each bucket has batches of its own, which are smaller on a cluster.
		ops := 128
		if w.keys().Buckets() > 1 {
			ops = 32
		}
		together := 4*(sockets+2*others)/ops + 20 + 3*(w.keys().Buckets()-1)
		assert.LessOrEqual(t, s1.Stats().Batches-before, uint64(together), "they leave together")

		_, resp, err := s1.tryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		require.ErrorIs(t, s1.Presence().Join(ctx, "lobby", "c1"), ErrClosed)
		require.ErrorIs(t, s1.Rooms().Clear(ctx, "lobby"), ErrClosed)
		for _, err := range s1.Presence().Subscribe(ctx, "lobby", SubscribeOptions{}) {
			require.ErrorIs(t, err, ErrClosed)
		}
		ids, err := s2.Rooms().Members(ctx, "lobby")
		require.NoError(t, err)
		assert.Empty(t, ids)
		// What is left in Redis is the other server's, or has a TTL.
		c := w.client()
		names := w.keys()
		for _, k := range w.inStore() {
			ttl, err := c.TTL(ctx, k).Result()
			require.NoError(t, err)
			fixed := k == names.Format() || k == names.Instances() || strings.Contains(k, s2.Stats().Incarnation) || strings.HasSuffix(k, watcher.id)
			assert.True(t, fixed || ttl > 0, "%s has no TTL", k)
		}
		watcher.call("mesh/noop", nil)
	})
}

func TestShutdownIsBounded(t *testing.T) {
	t.Parallel()
	release := func(t *testing.T) chan struct{} {
		c := make(chan struct{})
		t.Cleanup(func() { close(c) })
		return c
	}
	for name, hang := range map[string]func(t *testing.T, w *world, s *testServer){
		"Redis is away": func(t *testing.T, w *world, s *testServer) {
			w.away()
			t.Cleanup(w.back)
		},
		"a command hangs": func(t *testing.T, w *world, s *testServer) {
			c := release(t)
			require.NoError(t, s.HandleCommand("hang", func(context.Context, *Connection, json.RawMessage) (any, error) { <-c; return nil, nil }))
			require.NoError(t, s.dial().send(map[string]any{"id": 1, "command": "hang"}))
			w.sleep(10 * time.Millisecond)
		},
		"a guard hangs": func(t *testing.T, w *world, s *testServer) {
			c := release(t)
			require.NoError(t, s.TrackPresence(Exact("hang"), PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) { <-c; return true, nil }}))
			require.NoError(t, s.dial().send(map[string]any{"id": 1, "command": "mesh/subscribe-presence", "payload": inRoomPayload("hang")}))
			w.sleep(10 * time.Millisecond)
		},
		"a guard hangs that is asked again": func(t *testing.T, w *world, s *testServer) {
			c := release(t)
			require.NoError(t, s.TrackPresence(Exact("hang"), PresenceOptions{Guard: func(_ context.Context, m Member, _ string) (bool, error) {
				if m.Metadata != nil {
					<-c
				}
				return true, nil
			}}))
			require.NoError(t, s.Presence().Connect(t.Context(), "viewer", nil))
			go func() {
				for range s.Presence().Subscribe(context.Background(), "hang", SubscribeOptions{Viewer: "viewer"}) {
					continue
				}
			}()
			w.sleep(10 * time.Millisecond)
			require.NoError(t, s.Connections().SetMetadata(t.Context(), "viewer", 1, MetadataOptions{}))
		},
		"a hook hangs": func(t *testing.T, w *world, s *testServer) {
			c := release(t)
			s.OnDisconnection(func(context.Context, *Connection, error) { <-c })
			s.dial()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				long := func(o *Options) { o.GuardTimeout, o.HookTimeout = time.Hour, time.Hour }
				s := w.tracked(long)
				s.dial().join("lobby")
				hang(t, w, s)
				s.stop.Do(func() { // the harness's own would ask for a clean one
					t.Cleanup(func() { _ = s.http.Close(); <-s.done })
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
	everywhere(t, func(t *testing.T, w *world) {
		a, b := w.tracked(), w.tracked(func(o *Options) { o.Prefix += "other:" })
		pa, pb := a.dial(), b.dial()
		pa.subscribe("lobby")
		pb.subscribe("lobby")
		assert.Equal(t, []string{pa.id}, pa.join("lobby").ids(t))
		assert.Equal(t, []string{pb.id}, pb.join("lobby").ids(t))
		pa.expect(time.Second, "join", pa.id)
		pb.expect(time.Second, "join", pb.id)
		require.ErrorIs(t, a.Connections().SetMetadata(t.Context(), pb.id, 1, MetadataOptions{}), ErrUnknownConnection)
		w.sleep(100 * time.Millisecond)
		assert.Len(t, pa.got(), 1)
		assert.Len(t, pb.got(), 1)
	})
}

func TestForeignKeysUnderThePrefix(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		c := w.client()
		ctx := t.Context()
		under := func(prefix string) keyspace { k := w.keys(); k.prefix += prefix; return k }
		for name, put := range map[string]func() error{
			"a newer format": func() error { return c.Set(ctx, under("newer:").Format(), "99", 0).Err() },
			"no format":      func() error { return c.Set(ctx, under("odd:").Format(), "x", 0).Err() },
			"another type":   func() error { return c.SAdd(ctx, under("type:").Format(), "x").Err() },
			"foreign lists":  func() error { return c.SAdd(ctx, under("foreign:").Instances(), "x").Err() },
			// What the TypeScript server has while it runs, on a cluster too, and
			// what it leaves behind.
			"its instances":   func() error { return c.SAdd(ctx, under("ts:").prefix+"instances", "x").Err() },
			"its connections": func() error { return c.HSet(ctx, under("ts2:").prefix+"connections", "c", "x").Err() },
			"its metadata":    func() error { return c.HSet(ctx, under("ts3:").prefix+"connection-meta", "c", "{}").Err() },
		} {
			require.NoError(t, put(), name)
		}
		for prefix, key := range map[string]string{
			"newer:": "format", "odd:": "format", "type:": "format", "foreign:": "instances",
			"ts:": "instances", "ts2:": "connections", "ts3:": "connection-meta",
		} {
			srv, err := NewServer(Options{Redis: c, Prefix: under(prefix).prefix})
			require.NoError(t, err)
			begun := time.Now()
			err = srv.Start(ctx)
			require.ErrorIs(t, err, ErrIncompatible, prefix)
			assert.ErrorContains(t, err, "Prefix", "it says what to do")
			assert.Regexp(t, regexp.QuoteMeta(under(prefix).prefix)+`\S*`+key+" ", err.Error(), "and which key it is")
			assert.Less(t, time.Since(begun), time.Second, "there is no use in trying again")
			require.NoError(t, srv.Shutdown(ctx))
		}
	})
}

// upgrading is an app's own handler in front of ServeConn.
func upgrading(w *world, srv *Server, opts ConnOptions, ctx context.Context, ended chan<- error) *testServer {
	u := websocket.Upgrader{}
	s := &testServer{Server: srv, w: w, listener: newPipeListener(), done: make(chan struct{})}
	s.http = &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if ws, err := u.Upgrade(rw, r, nil); err == nil {
			ended <- srv.ServeConn(ctx, ws, opts)
		}
	})}
	go func() {
		defer close(s.done)
		_ = s.http.Serve(s.listener)
	}()
	w.t.Cleanup(s.shutdown)
	return s
}

func TestServeConn(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		opts := w.options()
		opts.LatencyInterval = -1
		srv, err := NewServer(opts)
		require.NoError(t, err)
		require.NoError(t, srv.TrackPresence(Exact("lobby"), PresenceOptions{}))
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		var mu sync.Mutex
		var foreign []string
		ended := make(chan error, 10)
		s := upgrading(w, srv, ConnOptions{
			Metadata: map[string]any{"userId": "u1"},
			Foreign: func(c *Connection, messageType int, data []byte) {
				mu.Lock()
				defer mu.Unlock()
				foreign = append(foreign, fmt.Sprintf("%d %s", messageType, data))
				assert.NoError(t, c.Send("app/got", string(data)))
			},
		}, ctx, ended)
		_, _, err = s.tryDial()
		require.Error(t, err)
		require.ErrorIs(t, <-ended, ErrNotStarted)

		require.NoError(t, srv.Start(t.Context()))
		p := s.dial()
		var present []Member
		require.NoError(t, json.Unmarshal(p.join("lobby").Present, &present))
		require.Len(t, present, 1)
		assert.JSONEq(t, `{"userId":"u1"}`, string(present[0].Metadata))
		require.NoError(t, p.send("just text"))
		require.NoError(t, p.send(map[string]any{"type": "app's own"}))
		p.writing.Lock()
		require.NoError(t, p.ws.WriteMessage(websocket.BinaryMessage, []byte("binary")))
		p.writing.Unlock()
		w.eventually(2*time.Second, func() bool { return p.pushed("app/got") == 3 }, "the frames")
		mu.Lock()
		assert.Equal(t, []string{"1 \"just text\"\n", "1 {\"type\":\"app's own\"}\n", "2 binary"}, foreign, "in order")
		mu.Unlock()
		assert.Equal(t, "true", string(p.call("mesh/noop", nil)))

		gone := errors.New("gone")
		cancel(gone)
		assert.Equal(t, websocket.CloseGoingAway, p.closed(2*time.Second))
		require.ErrorIs(t, <-ended, gone, "it says how it ended")
		ids, err := srv.Rooms().Members(t.Context(), "lobby")
		w.eventually(2*time.Second, func() bool {
			ids, err = srv.Rooms().Members(t.Context(), "lobby")
			return err == nil && len(ids) == 0
		}, "it has left")

		require.NoError(t, srv.Shutdown(t.Context()))
		_, _, err = s.tryDial()
		require.Error(t, err)
		require.ErrorIs(t, <-ended, ErrClosed)
	})
}

func TestServeConnRefusesBadMetadata(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		srv := w.server().Server
		for want, metadata := range map[error]any{ErrInvalidMetadata: make(chan int), ErrTooLarge: strings.Repeat("x", 20<<10)} {
			ended := make(chan error, 1)
			s := upgrading(w, srv, ConnOptions{Metadata: metadata}, t.Context(), ended)
			_, _, err := s.tryDial()
			require.Error(t, err)
			require.ErrorIs(t, <-ended, want)
		}
		assert.Zero(t, srv.Stats().Connections)
	})
}

func TestRedisAway(t *testing.T) {
	t.Parallel()
	// Not on a cluster: nodes that stood still depose each other when they go on.
	everywhereOn(t, nil, func(t *testing.T, w *world) {
		s := w.tracked()
		watcher, p, late := s.dial(), s.dial(), s.dial()
		var others []*peer
		for range 5 {
			others = append(others, s.dial())
		}
		watcher.subscribe("lobby")
		p.join("lobby")
		watcher.expect(time.Second, "join", p.id)
		require.Equal(t, "true", p.state("lobby", map[string]any{"a": 1}))
		watcher.expect(time.Second, "state", p.id)
		w.away()

		var wg sync.WaitGroup
		within := func(p *peer, command string, payload any, check func(answer json.RawMessage)) {
			wg.Go(func() {
				begun := time.Now()
				answer, err := p.tryCall(command, payload)
				if assert.NoError(t, err, command) {
					assert.LessOrEqual(t, time.Since(begun), 2100*time.Millisecond, command)
					check(answer)
				}
			})
		}
		unavailable := func(answer json.RawMessage) {
			assert.JSONEq(t, `{"error":"Temporarily unavailable","code":"EUNAVAILABLE","name":"CommandError"}`, string(answer))
		}
		within(late, "mesh/join-room", inRoomPayload("lobby"), unavailable)
		within(p, "mesh/publish-presence-state", map[string]any{"roomName": "lobby", "state": map[string]any{"a": 2}}, unavailable)
		within(others[0], "mesh/subscribe-presence", inRoomPayload("elsewhere"), unavailable)
		within(others[1], "mesh/get-presence-state", inRoomPayload("elsewhere"), unavailable)
		within(others[2], "mesh/get-room-metadata", inRoomPayload("lobby"), unavailable)
		within(others[3], "mesh/noop", nil, func(answer json.RawMessage) { assert.Equal(t, "true", string(answer)) })
		wg.Wait()
		// Before long it has been noticed that nothing is heard.
		for _, command := range []string{"mesh/subscribe-presence", "mesh/get-presence-state"} {
			c := others[4]
			w.eventually(6*time.Second, func() bool { return c.room(command, "lobby").Stale }, "%s: stale", command)
			v := c.room(command, "lobby")
			assert.True(t, v.Success)
			assert.True(t, v.Stale)
			assert.Contains(t, string(v.Present), p.id)
			assert.JSONEq(t, `{"a":1}`, string(v.States[p.id]))
		}
		assert.Zero(t, watcher.pushed("mesh/presence-ended"))
		assert.Zero(t, watcher.count("leave", ""))

		w.back()
		watcher.expect(8*time.Second, "join", late.id)
		w.eventually(8*time.Second, func() bool {
			got := watcher.got()
			return string(got[len(got)-1].State) == `{"a":2}` || watcher.count("state", p.id) == 2
		}, "what was asked for is made true")
		w.eventually(5*time.Second, func() bool { return s.Stats().Stale == 0 }, "in order again")
		assert.Zero(t, watcher.count("leave", ""), "%v", watcher.got())
		assert.ElementsMatch(t, []string{p.id, late.id}, s.dial().subscribe("lobby").ids(t))
		assert.Zero(t, s.Stats().Reborn)
	})
}
