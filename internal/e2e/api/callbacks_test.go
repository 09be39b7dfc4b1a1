package api

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// callbackCases has a case for each callback: how a client causes its call, the result
// for the client if the callback works, panics and hangs, and how long the call takes
// if it hangs.
var callbackCases = []struct {
	name   string
	use    func(t *testing.T, m *harness.Misbehaving) string
	works  string
	panics string
	hangs  string
	limit  time.Duration
	left   bool // a hanging call has no time limit, but is abandoned when its connection ends
}{
	{
		"Authenticate", func(_ *testing.T, m *harness.Misbehaving) string {
			_, resp, err := m.S.TryDial()
			if err == nil {
				return "connected"
			}
			return resp.Status
		},
		"connected", "500 Internal Server Error", "500 Internal Server Error", harness.HookLimit, false,
	},
	{
		"ClientMetadata", func(_ *testing.T, m *harness.Misbehaving) string {
			return m.S.Dial().Asked("mesh/set-my-connection-metadata", map[string]any{"metadata": 1})
		},
		`{"success":true}`, `{"error":"Internal error","code":"ESERVER","name":"Error"}`,
		`{"error":"Timed out","code":"ETIMEOUT","name":"CommandError"}`, harness.HookLimit, false,
	},
	{
		"guard", func(_ *testing.T, m *harness.Misbehaving) string {
			v := m.S.Dial().Room("mesh/subscribe-presence", "guarded")
			return fmt.Sprint(v.Success, " ", string(v.Present))
		},
		"true []", "false []", "false []", harness.GuardLimit, false,
	},
	{
		"join guard", func(_ *testing.T, m *harness.Misbehaving) string {
			v := m.S.Dial().Room("mesh/join-room", "closed")
			return fmt.Sprint(v.Success, " ", len(v.IDs(m.W.T)) > 0)
		},
		"true true", "false false", "false false", harness.HookLimit, false,
	},
	{
		// The first command of the client waits for it. If the callback fails, no
		// command is served.
		"OnConnection", func(_ *testing.T, m *harness.Misbehaving) string {
			p := m.S.Dial()
			if answer := p.Asked("mesh/noop", nil); answer != "connection ended" && answer != websocket.ErrCloseSent.Error() {
				return answer
			}
			return fmt.Sprint("closed ", p.Closed(time.Second))
		},
		"true", "closed 1011", "closed 1011", harness.HookLimit, false,
	},
	{
		// Other members see the leave before the hook is called.
		"OnDisconnection", func(t *testing.T, m *harness.Misbehaving) string {
			p, watcher := m.S.Dial(), m.App.Dial()
			watcher.Subscribe("lobby")
			p.Join("lobby")
			p.Close()
			watcher.Expect(100*time.Millisecond, "leave", p.ID)
			return "left"
		},
		"left", "left", "left", 0, false,
	},
	{
		// Hanging handlers only delay other handlers of the connection, if there are
		// too many of them.
		"command", func(t *testing.T, m *harness.Misbehaving) string {
			p, watcher := m.S.Dial(), m.S.Dial()
			watcher.Subscribe("lobby")
			p.Join("lobby")
			for range 7 {
				require.NoError(t, p.Send(map[string]any{"command": "work"}))
			}
			answers := make(chan string, 2)
			for range 2 { // one more than the limit
				go func() { answers <- p.Asked("work", nil) }()
				m.W.Sleep(5 * time.Millisecond)
			}
			require.Equal(t, "true", p.Asked("mesh/noop", nil))
			p.Close() // ends the context of its handlers and its entry
			watcher.Expect(100*time.Millisecond, "leave", p.ID)
			return <-answers + ", " + <-answers
		},
		`"done", "done"`,
		`{"error":"Internal error","code":"ESERVER","name":"Error"}, {"error":"Internal error","code":"ESERVER","name":"Error"}`,
		`connection ended, connection ended`, 0, true,
	},
	{
		// While the callback hangs, its connection is not read, so it becomes silent.
		"Foreign", func(t *testing.T, m *harness.Misbehaving) string {
			p, watcher := m.App.Dial(), m.S.Dial()
			watcher.Subscribe("lobby")
			p.Join("lobby")
			p.Mute() // the server reads no pong while Foreign hangs
			require.NoError(t, p.Client.Write(websocket.BinaryMessage, []byte("x")))
			m.W.Sleep(10 * time.Millisecond)
			if p.Pushed("got") == 1 {
				return "got"
			}
			if m.S.Stats().CallbackPanics > 0 {
				return "lost, " + p.Asked("mesh/noop", nil)
			}
			code := p.Closed(10 * time.Second)
			watcher.Expect(100*time.Millisecond, "leave", p.ID)
			return fmt.Sprint("closed ", code)
		},
		"got", "lost, true", "closed 1011", 3 * harness.PingEvery, true,
	},
}

// TestEveryCallback checks that every callback which panics, ends its goroutine or
// hangs is recovered, limited, counted and logged, and that other connections do not
// notice.
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
					harness.Embedded(t, func(t *testing.T, w *harness.World) {
						m := harness.NewMisbehaving(t, w, do)
						took := m.Rounds(t, c.name, c.use, c.works, c.panics)
						assert.Less(t, took, time.Second, "a panic costs no time")
						st := m.S.Stats()
						assert.GreaterOrEqual(t, st.CallbackPanics, uint64(3))
						assert.Zero(t, st.CallbackTimeouts)
						assert.Equal(t, 1, strings.Count(m.Log.String(), "callback panicked"), "one line in ten seconds:\n%s", &m.Log)
						assert.NotContains(t, m.Log.String(), "handler panicked")
					})
				})
			}
			t.Run("hangs", func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) {
					release := make(chan struct{})
					m := harness.NewMisbehaving(t, w, func(context.Context) error { <-release; return errors.New("too late") })
					defer close(release) // before the server is shut down
					took := m.Rounds(t, c.name, c.use, c.works, c.hangs)
					assert.InDelta(t, c.limit, took, float64(150*time.Millisecond))
					w.Sleep(harness.HookLimit)
					st := m.S.Stats()
					assert.Zero(t, st.CallbackPanics)
					if c.left {
						assert.Zero(t, st.CallbackTimeouts)
						return
					}
					assert.EqualValues(t, 3, st.CallbackTimeouts)
					assert.Equal(t, 1, strings.Count(m.Log.String(), "callback timed out"), "one line in ten seconds:\n%s", &m.Log)
				})
			})
		})
	}
}

// With LatencyInterval off, an idle connection receives only pings.
func TestLatencyCanBeOff(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		for _, interval := range []time.Duration{-1, 5 * time.Second} {
			p := w.Server(func(o *mesh.Options) { o.LatencyInterval = interval }).Dial()
			w.Sleep(10*time.Minute + time.Second)
			p.Mu.Lock()
			counts := map[string]int{}
			for _, f := range p.Frames {
				counts[f.Command]++
			}
			p.Mu.Unlock()
			if interval < 0 {
				assert.Equal(t, map[string]int{"ping": 20}, counts)
			} else {
				assert.Equal(t, 20, counts["ping"])
				assert.Equal(t, 120, counts["latency:request"])
			}
		}
	})
}
