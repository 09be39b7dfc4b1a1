package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// misbehaving is a server whose callbacks all do what a test tells them to.
type misbehaving struct {
	w      *world
	s, app *testServer // app upgrades by itself
	log    textLog
	name   atomic.Pointer[string] // of the callback that misbehaves; nil: none
	do     func(ctx context.Context) error
}

const (
	hookLimit  = 2 * time.Second
	guardLimit = time.Second
	pingEvery  = time.Second
)

func newMisbehaving(t *testing.T, w *world, do func(ctx context.Context) error) *misbehaving {
	m := &misbehaving{w: w, do: do}
	m.s = w.tracked(func(o *Options) {
		o.HookTimeout, o.GuardTimeout, o.PingInterval, o.Logger = hookLimit, guardLimit, pingEvery, m.log.logger()
		o.Authenticate = func(ctx context.Context, _ *http.Request) (any, error) { return nil, m.as(ctx, callbackAuthenticate) }
		o.ClientMetadata = func(ctx context.Context, _ Member, proposed json.RawMessage) (any, error) {
			return proposed, m.as(ctx, callbackMetadata)
		}
	})
	require.NoError(t, m.s.TrackPresence(Exact("guarded"), PresenceOptions{
		Guard: func(ctx context.Context, _ Member, _ string) (bool, error) { return true, m.as(ctx, callbackGuard) },
	}))
	require.NoError(t, m.s.TrackPresence(Exact("closed"), PresenceOptions{
		JoinGuard: func(ctx context.Context, _ Member, _ string) (bool, error) { return true, m.as(ctx, callbackJoinGuard) },
	}))
	m.s.OnConnection(func(ctx context.Context, _ *Connection) { _ = m.as(ctx, callbackConnection) })
	m.s.OnDisconnection(func(ctx context.Context, _ *Connection, _ error) { _ = m.as(ctx, callbackDisconnection) })
	require.NoError(t, m.s.HandleCommand("work", func(ctx context.Context, _ *Connection, _ json.RawMessage) (any, error) {
		return "done", m.as(ctx, callbackCommand)
	}))
	m.app = upgrading(w, m.s.Server, ConnOptions{Foreign: func(c *Connection, _ int, _ []byte) {
		_ = m.as(context.Background(), callbackForeign)
		_ = c.Send("got", nil)
	}}, context.Background(), make(chan error, 100))
	return m
}

// as misbehaves, if that is the callback's turn to.
func (m *misbehaving) as(ctx context.Context, callback string) error {
	if name := m.name.Load(); name != nil && *name == callback {
		return m.do(ctx)
	}
	return nil
}

// asked is what a client is answered, in short.
func (p *peer) asked(command string, payload any) string {
	answer, err := p.tryCall(command, payload)
	if err != nil {
		return err.Error()
	}
	return string(answer)
}

// callbackCases are all callbacks: what a client does that has it called, and
// what it sees then, when the callback panics and when it hangs, and how long
// the latter takes.
var callbackCases = []struct {
	name   string
	use    func(t *testing.T, m *misbehaving) string
	fine   string
	panics string
	hangs  string
	limit  time.Duration
	left   bool // a call that hangs is no timeout: it is left behind when its connection ends
}{
	{
		callbackAuthenticate, func(_ *testing.T, m *misbehaving) string {
			_, resp, err := m.s.tryDial()
			if err == nil {
				return "connected"
			}
			return resp.Status
		},
		"connected", "401 Unauthorized", "401 Unauthorized", hookLimit, false,
	},
	{
		callbackMetadata, func(_ *testing.T, m *misbehaving) string {
			return m.s.dial().asked("mesh/set-my-connection-metadata", map[string]any{"metadata": 1})
		},
		`{"success":true}`, `{"error":"Internal error","code":"ESERVER","name":"Error"}`,
		`{"error":"Timed out","code":"ETIMEOUT","name":"CommandError"}`, hookLimit, false,
	},
	{
		callbackGuard, func(_ *testing.T, m *misbehaving) string {
			v := m.s.dial().room("mesh/subscribe-presence", "guarded")
			return fmt.Sprint(v.Success, " ", string(v.Present))
		},
		"true []", "false []", "false []", guardLimit, false,
	},
	{
		callbackJoinGuard, func(_ *testing.T, m *misbehaving) string {
			v := m.s.dial().room("mesh/join-room", "closed")
			return fmt.Sprint(v.Success, " ", len(v.ids(m.w.t)) > 0)
		},
		"true true", "false false", "false false", hookLimit, false,
	},
	{
		// Its first command waits. If the function fails, nothing is served.
		callbackConnection, func(_ *testing.T, m *misbehaving) string {
			p := m.s.dial()
			if answer := p.asked("mesh/noop", nil); answer != "connection ended" {
				return answer
			}
			return fmt.Sprint("closed ", p.closed(time.Second))
		},
		"true", "closed 1011", "closed 1011", hookLimit, false,
	},
	{
		// Who is in its room sees it leave before the hook is called.
		callbackDisconnection, func(t *testing.T, m *misbehaving) string {
			p, watcher := m.s.dial(), m.app.dial()
			watcher.subscribe("lobby")
			p.join("lobby")
			p.close()
			watcher.expect(100*time.Millisecond, "leave", p.id)
			return "left"
		},
		"left", "left", "left", 0, false,
	},
	{
		// One that hangs holds up nothing, until there are too many.
		callbackCommand, func(t *testing.T, m *misbehaving) string {
			p, watcher := m.s.dial(), m.s.dial()
			watcher.subscribe("lobby")
			p.join("lobby")
			for range 7 {
				require.NoError(t, p.send(map[string]any{"command": "work"}))
			}
			answers := make(chan string, 1)
			go func() { answers <- p.asked("work", nil) }()
			m.w.sleep(10 * time.Millisecond)
			saw := p.asked("work", nil)
			p.close() // the context of its handlers ends, and it leaves
			watcher.expect(100*time.Millisecond, "leave", p.id)
			return saw + ", " + <-answers
		},
		`"done", "done"`,
		`{"error":"Internal error","code":"ESERVER","name":"Error"}, {"error":"Internal error","code":"ESERVER","name":"Error"}`,
		`{"error":"too many commands are running","code":"EBUSY","name":"CommandError"}, connection ended`, 0, true,
	},
	{
		// While it hangs nothing is read, so that the connection is silent.
		callbackForeign, func(t *testing.T, m *misbehaving) string {
			p, watcher := m.app.dial(), m.s.dial()
			watcher.subscribe("lobby")
			p.join("lobby")
			p.mute() // a pong would wait for somebody to read it
			p.writing.Lock()
			require.NoError(t, p.ws.WriteMessage(websocket.BinaryMessage, []byte("x")))
			p.writing.Unlock()
			m.w.sleep(10 * time.Millisecond)
			if p.pushed("got") == 1 {
				return "got"
			}
			if m.s.Stats().CallbackPanics > 0 {
				return "lost, " + p.asked("mesh/noop", nil)
			}
			code := p.closed(10 * time.Second)
			watcher.expect(100*time.Millisecond, "leave", p.id)
			return fmt.Sprint("closed ", code)
		},
		"got", "lost, true", "closed 1011", 3 * pingEvery, true,
	},
}

// TestEveryCallback: whatever an app's callback does, it is recovered, limited,
// counted and logged, and only its own connection notices.
func TestEveryCallback(t *testing.T) {
	t.Parallel()
	for _, c := range callbackCases {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			t.Parallel()
			panics := func(context.Context) error { panic("sesame") }
			exits := func(context.Context) error { runtime.Goexit(); return nil }
			for name, do := range map[string]func(context.Context) error{"panics": panics, "ends its goroutine": exits} {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					embedded(t, func(t *testing.T, w *world) {
						m := newMisbehaving(t, w, do)
						took := m.rounds(t, c.name, c.use, c.fine, c.panics)
						assert.Less(t, took, time.Second, "a panic costs no time")
						st := m.s.Stats()
						assert.GreaterOrEqual(t, st.CallbackPanics, uint64(3))
						assert.Zero(t, st.CallbackTimeouts)
						assert.Equal(t, 1, strings.Count(m.log.String(), "callback panicked"), "one line in ten seconds:\n%s", &m.log)
						assert.NotContains(t, m.log.String(), "handler panicked")
					})
				})
			}
			t.Run("hangs", func(t *testing.T) {
				t.Parallel()
				embedded(t, func(t *testing.T, w *world) {
					release := make(chan struct{})
					m := newMisbehaving(t, w, func(context.Context) error { <-release; return errors.New("too late") })
					defer close(release) // before the server is shut down
					took := m.rounds(t, c.name, c.use, c.fine, c.hangs)
					assert.InDelta(t, c.limit, took, float64(150*time.Millisecond))
					w.sleep(hookLimit)
					st := m.s.Stats()
					assert.Zero(t, st.CallbackPanics)
					if c.left {
						assert.Zero(t, st.CallbackTimeouts)
						return
					}
					assert.EqualValues(t, 3, st.CallbackTimeouts)
					assert.Equal(t, 1, strings.Count(m.log.String(), "callback timed out"), "one line in ten seconds:\n%s", &m.log)
				})
			})
		})
	}
}

// rounds has clients use a callback that is fine and then three times one that
// misbehaves, and returns how long one of these took. Meanwhile a neighbour
// goes on as if nothing were the matter.
func (m *misbehaving) rounds(t *testing.T, name string, use func(*testing.T, *misbehaving) string, fine, bad string) time.Duration {
	neighbour, friend := m.s.dial(), m.s.dial()
	friend.subscribe("next door")
	require.Equal(t, "true", neighbour.asked("mesh/noop", nil)) // its OnConnection is through
	assert.Equal(t, fine, use(t, m), "while all is well")
	m.w.sleep(10 * time.Millisecond) // what follows the end of a connection is through
	m.name.Store(&name)
	defer m.name.Store(nil)
	var took time.Duration
	for range 3 {
		begun := time.Now()
		saw := make(chan string, 1)
		go func() {
			saw <- use(t, m)
			took = time.Since(begun)
		}()
		m.w.sleep(20 * time.Millisecond) // it misbehaves now
		asked := time.Now()
		neighbour.join("next door")
		assert.Equal(t, "true", neighbour.state("next door", map[string]any{"a": 1}))
		neighbour.leave("next door")
		assert.Zero(t, time.Since(asked), "the neighbour does not wait")
		friend.expect(10*time.Millisecond, "leave", neighbour.id)
		assert.Equal(t, bad, <-saw)
	}
	m.w.sleep(10 * time.Millisecond)
	assert.Equal(t, 3, friend.count("join", neighbour.id))
	assert.Equal(t, 3, friend.count("leave", neighbour.id))
	return took
}

// With LatencyInterval off a connection that does nothing is sent pings alone.
func TestLatencyCanBeOff(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		for _, interval := range []time.Duration{-1, 5 * time.Second} {
			p := w.server(func(o *Options) { o.LatencyInterval = interval }).dial()
			w.sleep(10*time.Minute + time.Second)
			p.mu.Lock()
			counts := map[string]int{}
			for _, f := range p.frames {
				counts[f.Command]++
			}
			p.mu.Unlock()
			if interval < 0 {
				assert.Equal(t, map[string]int{"ping": 20}, counts)
			} else {
				assert.Equal(t, 20, counts["ping"])
				assert.Equal(t, 120, counts["latency:request"])
			}
		}
	})
}
