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
	"github.com/meshpresence/mesh/meshtest"
)

// badApp is a server with app code in every possible place. One place at a time
// misbehaves.
type badApp struct {
	w     *harness.World
	s     *harness.Server
	app   *harness.Server // the app upgrades, with badConn
	place atomic.Pointer[string]
	do    func() // how the place misbehaves
	hits  atomic.Int64
}

// act misbehaves if the place is the chosen one.
func (m *badApp) act(place string) {
	if now := m.place.Load(); now != nil && *now == place {
		m.hits.Add(1)
		m.do()
	}
}

// blockInApp blocks. Its name in a stack shows that a goroutine blocks in app code.
//
//go:noinline
func blockInApp(release <-chan struct{}) { <-release }

type badHandler struct {
	slog.Handler
	m *badApp
}

func (h badHandler) Enabled(context.Context, slog.Level) bool {
	h.m.act("slog.Enabled")
	return true
}

func (h badHandler) Handle(ctx context.Context, r slog.Record) error {
	h.m.act("slog.Handle")
	return h.Handler.Handle(ctx, r)
}

func (h badHandler) WithAttrs([]slog.Attr) slog.Handler { h.m.act("slog.WithAttrs"); return h }

// badJSON misbehaves when it is encoded.
type badJSON struct {
	m     *badApp
	place string
}

func (j badJSON) MarshalJSON() ([]byte, error) {
	j.m.act(j.place)
	return []byte(`{"x":1}`), nil
}

// badError is an error whose methods misbehave.
type badError struct {
	m     *badApp
	place string
}

func (e *badError) Error() string { e.m.act(e.place + ".Error"); return "bad" }

func (e *badError) Is(error) bool { e.m.act(e.place + ".Is"); return false }

func (e *badError) As(any) bool { e.m.act(e.place + ".As"); return false }

func (e *badError) Unwrap() []error { e.m.act(e.place + ".Unwrap"); return nil }

// badConn is a network connection of the app. It behaves until the upgrade.
type badConn struct {
	net.Conn
	m      *badApp
	served atomic.Bool
}

func (c *badConn) act(place string) {
	if c.served.Load() {
		c.m.act(place)
	}
}

func (c *badConn) Read(p []byte) (int, error) { c.act("net.Read"); return c.Conn.Read(p) }

func (c *badConn) Write(p []byte) (int, error) { c.act("net.Write"); return c.Conn.Write(p) }

func (c *badConn) Close() error { c.act("net.Close"); return c.Conn.Close() }

func (c *badConn) SetReadDeadline(t time.Time) error {
	c.act("net.SetReadDeadline")
	return c.Conn.SetReadDeadline(t)
}

func (c *badConn) SetWriteDeadline(t time.Time) error {
	c.act("net.SetWriteDeadline")
	return c.Conn.SetWriteDeadline(t)
}

type badListener struct {
	net.Listener
	m *badApp
}

func (l badListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	return &badConn{Conn: c, m: l.m}, err
}

// badHook is a hook of the Redis client.
type badHook struct{ m *badApp }

func (h badHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h badHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { h.m.act("redis"); return next(ctx, cmd) }
}

func (h badHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { h.m.act("redis"); return next(ctx, cmds) }
}

// badWriter is a ResponseWriter of the app.
type badWriter struct {
	http.ResponseWriter
	m *badApp
}

func (w badWriter) Header() http.Header { w.m.act("ResponseWriter"); return w.ResponseWriter.Header() }

func newBadApp(w *harness.World) *badApp {
	m := &badApp{w: w}
	m.s = w.Tracked(func(o *mesh.Options) {
		o.Redis.AddHook(badHook{m})
		o.Logger = slog.New(badHandler{slog.DiscardHandler, m})
		o.HookTimeout, o.GuardTimeout, o.PingInterval = harness.HookLimit, harness.GuardLimit, harness.PingEvery
		o.Authenticate = func(context.Context, *http.Request) (any, error) {
			m.act("Authenticate")
			if m.fails("Authenticate") {
				return nil, &badError{m, "Authenticate"}
			}
			return badJSON{m, "Authenticate.JSON"}, nil
		}
		o.ClientMetadata = func(context.Context, mesh.Member, json.RawMessage) (any, error) {
			m.act("ClientMetadata")
			if m.fails("ClientMetadata") {
				return nil, &badError{m, "ClientMetadata"}
			}
			return badJSON{m, "ClientMetadata.JSON"}, nil
		}
	})
	guard := func(place string) mesh.Guard {
		return func(context.Context, mesh.Member, string) (bool, error) {
			m.act(place)
			if m.fails(place) {
				return false, &badError{m, place}
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
			return nil, &badError{m, "command"}
		}
		_ = c.Send("got", badJSON{m, "Connection.Send"})
		return badJSON{m, "result"}, nil
	}))
	m.upgrading()
	return m
}

// fails reports whether a callback has to return a badError.
func (m *badApp) fails(place string) bool {
	now := m.place.Load()
	return now != nil && strings.HasPrefix(*now, place+".") && !strings.HasSuffix(*now, "JSON")
}

// upgrading serves connections with ServeConn.
func (m *badApp) upgrading() {
	up := websocket.Upgrader{}
	l := harness.NewPipeListener()
	m.app = &harness.Server{Server: m.s.Server, W: m.w, Listener: l, Done: make(chan struct{})}
	m.app.HTTP = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if ws, err := up.Upgrade(w, r, nil); err == nil {
			ws.NetConn().(*badConn).served.Store(true)
			_ = m.s.ServeConn(context.WithoutCancel(r.Context()), ws, mesh.ConnOptions{
				Metadata: badJSON{m, "ConnOptions.Metadata"},
				Foreign:  func(*mesh.Connection, int, []byte) { m.act("Foreign") },
			})
		}
	})}
	go func() {
		defer close(m.app.Done)
		_ = m.app.HTTP.Serve(badListener{l, m})
	}()
	m.w.T.Cleanup(func() {
		_ = m.app.HTTP.Close()
		<-m.app.Done
	})
}

// use causes calls of all app code, each with a time limit.
func (m *badApp) use() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, s := range []*harness.Server{m.s, m.app} {
		c, err := meshtest.Dial("ws://127.0.0.1/ws", meshtest.WithNetDial(s.Listener.Dial), meshtest.WithEarlyReturn(),
			meshtest.WithTimeout(5*time.Second), meshtest.WithFrames(func(meshtest.Frame) bool { return true }))
		if err != nil {
			continue
		}
		for _, text := range []string{
			`{"id":1,"command":"mesh/join-room","payload":{"roomName":"guarded"}}`,
			`{"id":2,"command":"mesh/subscribe-presence","payload":{"roomName":"guarded"}}`,
			`{"id":3,"command":"mesh/set-my-connection-metadata","payload":{"metadata":{"a":1}}}`,
			`{"id":4,"command":"work"}`, `not mesh`,
		} {
			_ = c.Write(websocket.TextMessage, []byte(text))
		}
		time.Sleep(5 * time.Second)
		c.Kill()
	}
	m.direct(ctx)
}

// direct calls methods with values of the app, each on its own goroutine, because some
// places block it or end it.
func (m *badApp) direct(ctx context.Context) {
	p, conns, rooms := m.s.Presence(), m.s.Connections(), m.s.Rooms()
	for _, f := range []func(){
		func() { _ = p.Connect(ctx, "own", badJSON{m, "Connect"}) },
		func() { _ = p.Connect(ctx, "own2", nil); _ = p.Join(ctx, "lobby", "own2") },
		func() { _ = p.PublishState(ctx, "lobby", "own2", badJSON{m, "PublishState"}, mesh.StateOptions{}) },
		func() { _ = conns.SetMetadata(ctx, "own2", badJSON{m, "SetMetadata"}, mesh.MetadataOptions{}) },
		func() { _ = rooms.SetMetadata(ctx, "lobby", badJSON{m, "Rooms.SetMetadata"}, mesh.MetadataOptions{}) },
		func() { _ = conns.Send(ctx, "own2", "x", badJSON{m, "Connections.Send"}) },
		func() { _ = rooms.Send(ctx, "lobby", "x", badJSON{m, "Rooms.Send"}) },
		func() {
			for range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
				defer func() { _ = recover() }() // a panic of the app on its own goroutine
				m.act("Subscribe")
				break
			}
		},
		func() {
			m.s.ServeHTTP(badWriter{httptest.NewRecorder(), m}, httptest.NewRequest(http.MethodGet, "/", nil))
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

var appPlaces = func() []string {
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

// panicValue is a value to panic with. Printing it panics, too.
type panicValue struct{}

func (panicValue) Error() string { panic("again") }

// TestMisbehavingAppCode checks app code that panics, ends its goroutine, blocks or
// shuts the server down. The process must survive and connections must end. Shutdown
// must return in time, and leave only goroutines that block in app code.
func TestMisbehavingAppCode(t *testing.T) {
	t.Parallel()
	for turn, how := range []string{"panic", "goexit", "block", "reenter"} {
		for i, place := range appPlaces {
			if harness.Light() && (i+turn)%2 > 0 {
				continue // half of the combinations
			}
			t.Run(how+"/"+place, func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) { misbehaves(t, w, how, place) })
			})
		}
	}
}

func misbehaves(t *testing.T, w *harness.World, how, place string) {
	m := newBadApp(w)
	release := make(chan struct{})
	defer close(release) // before the servers are closed
	var reentered atomic.Int64
	m.do = map[string]func(){
		"panic":  func() { panic(panicValue{}) },
		"goexit": runtime.Goexit,
		"block":  func() { blockInApp(release) },
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
	assert.NotZero(t, m.hits.Load(), "the place was not called")
	w.Sleep(15 * time.Second)
	st := m.s.Stats()
	if how == "reenter" {
		assert.Negative(t, reentered.Load(), "Shutdown inside the callback has not returned")
	} else if place != "redis" { // without Redis, connections cannot leave
		assert.LessOrEqual(t, st.Connections, 2, "only connections of the app's own transport remain")
	}
	counts := st.CallbackPanics + st.CallbackTimeouts + st.RedisFailures + uint64(st.GuardsHanging)
	if how == "panic" && place != "Subscribe" {
		assert.NotZero(t, counts, "no counter has changed")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	begun := time.Now()
	_ = m.s.Shutdown(ctx)
	assert.LessOrEqual(t, time.Since(begun), 10*time.Second+2*testhook.LimitsOf().Stop)
	m.s.Stop.Do(func() { _ = m.s.HTTP.Close(); <-m.s.Done })
	w.Sleep(5 * time.Second)
	assert.Empty(t, leftGoroutines(), "goroutines that do not block in app code")
}

// leftGoroutines returns the stacks of goroutines of this bubble that run the library's
// code and do not block in blockInApp.
func leftGoroutines() (list []string) {
	buf := make([]byte, 4<<20)
	own := string(buf[:runtime.Stack(buf, false)])
	_, bubble, _ := strings.Cut(own[:strings.IndexByte(own, '\n')], "synctest bubble ")
	bubble = "synctest bubble " + strings.TrimSuffix(bubble, "]:")
	for stack := range bytes.SplitSeq(buf[:runtime.Stack(buf, true)], []byte("\n\n")) {
		head, body, _ := strings.Cut(string(stack), "\n")
		if strings.HasSuffix(head, bubble+"]:") && !strings.Contains(body, "blockInApp") &&
			(strings.Contains(body, "mesh.(*") || strings.Contains(body, "mesh/internal/")) &&
			!strings.Contains(body, "_test.go") && !strings.Contains(body, "askIdle") { // which waits for blocking hooks
			list = append(list, head+"\n"+body)
		}
	}
	return list
}
