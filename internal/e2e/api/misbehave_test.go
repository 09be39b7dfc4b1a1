package api

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// rude is a server with app code in every place that has any. One place at a
// time misbehaves.
type rude struct {
	w     *harness.World
	s     *harness.Server
	app   *harness.Server // upgrades by itself, with rudeConn
	place atomic.Pointer[string]
	how   func()
	hits  atomic.Int64
}

// act misbehaves if it is that place's turn.
func (m *rude) act(place string) {
	if now := m.place.Load(); now != nil && *now == place {
		m.hits.Add(1)
		m.how()
	}
}

// blockRudely is found in the stack of a goroutine that blocks in app code.
//
//go:noinline
func blockRudely(release <-chan struct{}) { <-release }

type rudeHandler struct {
	slog.Handler
	m *rude
}

func (h rudeHandler) Enabled(context.Context, slog.Level) bool {
	h.m.act("slog.Enabled")
	return true
}

func (h rudeHandler) Handle(ctx context.Context, r slog.Record) error {
	h.m.act("slog.Handle")
	return h.Handler.Handle(ctx, r)
}

func (h rudeHandler) WithAttrs([]slog.Attr) slog.Handler { h.m.act("slog.WithAttrs"); return h }

// rudeJSON encodes rudely.
type rudeJSON struct {
	m     *rude
	place string
}

func (j rudeJSON) MarshalJSON() ([]byte, error) {
	j.m.act(j.place)
	return []byte(`{"x":1}`), nil
}

// rudeError is an error all of whose methods are rude.
type rudeError struct {
	m     *rude
	place string
}

func (e *rudeError) Error() string { e.m.act(e.place + ".Error"); return "rude" }

func (e *rudeError) Is(error) bool { e.m.act(e.place + ".Is"); return false }

func (e *rudeError) As(any) bool { e.m.act(e.place + ".As"); return false }

func (e *rudeError) Unwrap() []error { e.m.act(e.place + ".Unwrap"); return nil }

// rudeConn is a network connection of the app's. It is polite to net/http.
type rudeConn struct {
	net.Conn
	m      *rude
	served atomic.Bool
}

func (c *rudeConn) act(place string) {
	if c.served.Load() {
		c.m.act(place)
	}
}

func (c *rudeConn) Read(p []byte) (int, error) { c.act("net.Read"); return c.Conn.Read(p) }

func (c *rudeConn) Write(p []byte) (int, error) { c.act("net.Write"); return c.Conn.Write(p) }

func (c *rudeConn) Close() error { c.act("net.Close"); return c.Conn.Close() }

func (c *rudeConn) SetReadDeadline(t time.Time) error {
	c.act("net.SetReadDeadline")
	return c.Conn.SetReadDeadline(t)
}

func (c *rudeConn) SetWriteDeadline(t time.Time) error {
	c.act("net.SetWriteDeadline")
	return c.Conn.SetWriteDeadline(t)
}

type rudeListener struct {
	net.Listener
	m *rude
}

func (l rudeListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &rudeConn{Conn: c, m: l.m}, err
}

// rudeHook is a hook of the Redis client.
type rudeHook struct{ m *rude }

func (h rudeHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h rudeHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { h.m.act("redis"); return next(ctx, cmd) }
}

func (h rudeHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { h.m.act("redis"); return next(ctx, cmds) }
}

// rudeWriter is a response of the app's.
type rudeWriter struct {
	http.ResponseWriter
	m *rude
}

func (w rudeWriter) Header() http.Header { w.m.act("ResponseWriter"); return w.ResponseWriter.Header() }

func newRude(w *harness.World) *rude {
	m := &rude{w: w}
	m.s = w.Tracked(func(o *mesh.Options) {
		o.Redis.AddHook(rudeHook{m})
		o.Logger = slog.New(rudeHandler{slog.DiscardHandler, m})
		o.HookTimeout, o.GuardTimeout, o.PingInterval = harness.HookLimit, harness.GuardLimit, harness.PingEvery
		o.Authenticate = func(context.Context, *http.Request) (any, error) {
			m.act("Authenticate")
			if m.fails("Authenticate") {
				return nil, &rudeError{m, "Authenticate"}
			}
			return rudeJSON{m, "Authenticate.JSON"}, nil
		}
		o.ClientMetadata = func(context.Context, mesh.Member, json.RawMessage) (any, error) {
			m.act("ClientMetadata")
			if m.fails("ClientMetadata") {
				return nil, &rudeError{m, "ClientMetadata"}
			}
			return rudeJSON{m, "ClientMetadata.JSON"}, nil
		}
	})
	guard := func(place string) mesh.Guard {
		return func(context.Context, mesh.Member, string) (bool, error) {
			m.act(place)
			if m.fails(place) {
				return false, &rudeError{m, place}
			}
			return true, nil
		}
	}
	require.NoError(w.T, m.s.TrackPresence(mesh.Exact("guarded"), mesh.PresenceOptions{Guard: guard("Guard"), JoinGuard: guard("JoinGuard")}))
	m.s.OnConnection(func(context.Context, *mesh.Connection) { m.act("OnConnection") })
	m.s.OnDisconnection(func(context.Context, *mesh.Connection, error) { m.act("OnDisconnection") })
	require.NoError(w.T, m.s.HandleCommand("work", func(_ context.Context, c *mesh.Connection, _ json.RawMessage) (any, error) {
		m.act("command")
		if m.fails("command") {
			return nil, &rudeError{m, "command"}
		}
		_ = c.Send("got", rudeJSON{m, "Connection.Send"})
		return rudeJSON{m, "result"}, nil
	}))
	m.upgrading()
	return m
}

// fails tells whether a callback is to return a rudeError.
func (m *rude) fails(place string) bool {
	now := m.place.Load()
	return now != nil && strings.HasPrefix(*now, place+".") && !strings.HasSuffix(*now, "JSON")
}

// upgrading serves connections with ServeConn.
func (m *rude) upgrading() {
	up := websocket.Upgrader{}
	l := harness.NewPipeListener()
	m.app = &harness.Server{Server: m.s.Server, W: m.w, Listener: l, Done: make(chan struct{})}
	m.app.HTTP = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ws, err := up.Upgrade(w, r, nil); err == nil {
			ws.NetConn().(*rudeConn).served.Store(true)
			_ = m.s.ServeConn(context.WithoutCancel(r.Context()), ws, mesh.ConnOptions{
				Metadata: rudeJSON{m, "ConnOptions.Metadata"},
				Foreign:  func(*mesh.Connection, int, []byte) { m.act("Foreign") },
			})
		}
	})}
	go func() {
		defer close(m.app.Done)
		_ = m.app.HTTP.Serve(rudeListener{l, m})
	}()
	m.w.T.Cleanup(func() {
		_ = m.app.HTTP.Close()
		<-m.app.Done
	})
}

// use does everything that has app code called, each with a bound of its own.
func (m *rude) use() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	quiet := &websocket.Dialer{HandshakeTimeout: 10 * time.Second}
	for _, s := range []*harness.Server{m.s, m.app} {
		quiet.NetDialContext = s.Listener.Dial
		ws, _, err := quiet.DialContext(ctx, "ws://127.0.0.1/ws", nil)
		if err != nil {
			continue
		}
		go func() { // reads all frames
			for {
				if _, _, err := ws.ReadMessage(); err != nil {
					return
				}
			}
		}()
		for _, text := range []string{
			`{"id":1,"command":"mesh/join-room","payload":{"roomName":"guarded"}}`,
			`{"id":2,"command":"mesh/subscribe-presence","payload":{"roomName":"guarded"}}`,
			`{"id":3,"command":"mesh/set-my-connection-metadata","payload":{"metadata":{"a":1}}}`,
			`{"id":4,"command":"work"}`, `not mesh`,
		} {
			_ = ws.SetWriteDeadline(time.Now().Add(5 * time.Second))
			_ = ws.WriteMessage(websocket.TextMessage, []byte(text))
		}
		time.Sleep(5 * time.Second)
		_ = ws.Close()
	}
	m.direct(ctx)
}

// direct calls methods with values of the app's, each on a goroutine of its
// own: some places block it or end it.
func (m *rude) direct(ctx context.Context) {
	p, conns, rooms := m.s.Presence(), m.s.Connections(), m.s.Rooms()
	for _, f := range []func(){
		func() { _ = p.Connect(ctx, "own", rudeJSON{m, "Connect"}) },
		func() { _ = p.Connect(ctx, "own2", nil); _ = p.Join(ctx, "lobby", "own2") },
		func() { _ = p.PublishState(ctx, "lobby", "own2", rudeJSON{m, "PublishState"}, mesh.StateOptions{}) },
		func() { _ = conns.SetMetadata(ctx, "own2", rudeJSON{m, "SetMetadata"}, mesh.MetadataOptions{}) },
		func() { _ = rooms.SetMetadata(ctx, "lobby", rudeJSON{m, "Rooms.SetMetadata"}, mesh.MetadataOptions{}) },
		func() { _ = conns.Send(ctx, "own2", "x", rudeJSON{m, "Connections.Send"}) },
		func() { _ = rooms.Send(ctx, "lobby", "x", rudeJSON{m, "Rooms.Send"}) },
		func() {
			for range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
				defer func() { _ = recover() }() // the app's own panic, on its own goroutine
				m.act("Subscribe")
				break
			}
		},
		func() {
			m.s.ServeHTTP(rudeWriter{httptest.NewRecorder(), m}, httptest.NewRequest(http.MethodGet, "/", nil))
		},
	} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			f()
		}()
		select {
		case <-done:
		case <-time.After(5 * time.Second):
		}
	}
	if now := m.place.Load(); now != nil && *now == "slog.WithAttrs" {
		testhook.PartsOf(m.s.Server).Logger.With("a", 1).Info("line")
	}
}

var rudePlaces = func() []string {
	places := []string{
		"slog.Enabled", "slog.Handle", "slog.WithAttrs", "Authenticate", "Authenticate.JSON", "ClientMetadata", "ClientMetadata.JSON",
		"OnConnection", "OnDisconnection", "Guard", "JoinGuard", "command", "result", "Connection.Send", "ConnOptions.Metadata", "Foreign",
		"net.Read", "net.Write", "net.Close", "net.SetReadDeadline", "net.SetWriteDeadline", "redis", "ResponseWriter",
		"Connect", "PublishState", "SetMetadata", "Rooms.SetMetadata", "Connections.Send", "Rooms.Send", "Subscribe",
	}
	for _, callback := range []string{"Authenticate", "ClientMetadata", "Guard", "JoinGuard", "command"} {
		for _, method := range []string{"Error", "Is", "As", "Unwrap"} {
			places = append(places, callback+"."+method)
		}
	}
	return places
}()

// rudeValue is a value to panic with: printing it panics, too.
type rudeValue struct{}

func (rudeValue) Error() string { panic("again") }

// TestEveryPlaceMisbehaves: whatever code of the app's panics, ends its
// goroutine, blocks or shuts the server down, the process survives, connections
// end, and Shutdown returns by its bound and leaves nothing but what blocks.
func TestEveryPlaceMisbehaves(t *testing.T) {
	t.Parallel()
	for turn, how := range []string{"panic", "goexit", "block", "reenter"} {
		for i, place := range rudePlaces {
			if harness.Light() && (i+turn)%2 > 0 {
				continue // each place with half of the ways
			}
			t.Run(how+"/"+place, func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) { misbehaves(t, w, how, place) })
			})
		}
	}
}

func misbehaves(t *testing.T, w *harness.World, how, place string) {
	m := newRude(w)
	release := make(chan struct{})
	defer close(release) // before the servers are closed
	var reentered atomic.Int64
	m.how = map[string]func(){
		"panic":  func() { panic(rudeValue{}) },
		"goexit": runtime.Goexit,
		"block":  func() { blockRudely(release) },
		"reenter": func() {
			if reentered.Add(1) == 1 {
				assert.Error(t, m.s.Drain(context.Background(), -1))
				_ = m.s.Shutdown(context.Background())
				reentered.Add(-1000)
			}
		},
	}[how]
	m.place.Store(&place)
	m.use()
	assert.NotZero(t, m.hits.Load(), "nothing called it")
	w.Sleep(15 * time.Second)
	st := m.s.Stats()
	if how == "reenter" {
		assert.Negative(t, reentered.Load(), "Shutdown inside it has not returned")
	} else if place != "redis" { // without it nothing can leave
		assert.LessOrEqual(t, st.Connections, 2, "those of the app's own transport")
	}
	counts := st.CallbackPanics + st.CallbackTimeouts + st.RedisFailures + uint64(st.GuardsHanging)
	if how == "panic" && place != "Subscribe" {
		assert.NotZero(t, counts, "a counter tells")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	begun := time.Now()
	_ = m.s.Shutdown(ctx)
	assert.LessOrEqual(t, time.Since(begun), 10*time.Second+2*testhook.LimitsOf().Stop)
	m.s.Stop.Do(func() { _ = m.s.HTTP.Close(); <-m.s.Done })
	w.Sleep(5 * time.Second)
	assert.Empty(t, strays(), "goroutines that do not block in the app's code")
}

// strays returns the stacks of this bubble's goroutines that run the library's
// code and do not block in blockRudely.
func strays() (list []string) {
	buf := make([]byte, 4<<20)
	own := string(buf[:runtime.Stack(buf, false)])
	_, bubble, _ := strings.Cut(own[:strings.IndexByte(own, '\n')], "synctest bubble ")
	bubble = "synctest bubble " + strings.TrimSuffix(bubble, "]:")
	for stack := range bytes.SplitSeq(buf[:runtime.Stack(buf, true)], []byte("\n\n")) {
		head, body, _ := strings.Cut(string(stack), "\n")
		if strings.HasSuffix(head, bubble+"]:") && !strings.Contains(body, "blockRudely") &&
			(strings.Contains(body, "mesh.(*") || strings.Contains(body, "mesh/internal/")) &&
			!strings.Contains(body, "_test.go") && !strings.Contains(body, "askIdle") { // which waits for hooks that block
			list = append(list, head+"\n"+body)
		}
	}
	return list
}
