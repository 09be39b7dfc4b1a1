package harness

import (
	"context"
	"encoding/json"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
)

// Misbehaving is a server with callbacks that can be made to fail, panic or hang.
type Misbehaving struct {
	W      *World
	S, App *Server // App uses the app's own upgrade handler
	Log    testlog.TextLog
	Name   atomic.Pointer[string] // name of the callback that misbehaves, or nil
	do     func(ctx context.Context) error
}

const (
	HookLimit  = 2 * time.Second
	GuardLimit = time.Second
	PingEvery  = time.Second
)

func NewMisbehaving(t *testing.T, w *World, do func(ctx context.Context) error) *Misbehaving {
	m := &Misbehaving{W: w, do: do}
	m.S = w.Tracked(func(o *mesh.Options) {
		o.HookTimeout, o.GuardTimeout, o.PingInterval, o.Logger = HookLimit, GuardLimit, PingEvery, m.Log.Logger()
		o.Authenticate = func(ctx context.Context, _ *http.Request) (any, error) { return nil, m.as(ctx, "Authenticate") }
		o.ClientMetadata = func(ctx context.Context, _ mesh.Member, proposed json.RawMessage) (any, error) {
			return proposed, m.as(ctx, "ClientMetadata")
		}
	})
	require.NoError(t, m.S.TrackPresence(mesh.Exact("guarded"), mesh.PresenceOptions{
		Guard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) { return true, m.as(ctx, "guard") },
	}))
	require.NoError(t, m.S.TrackPresence(mesh.Exact("closed"), mesh.PresenceOptions{
		JoinGuard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) { return true, m.as(ctx, "join guard") },
	}))
	m.S.OnConnection(func(ctx context.Context, _ *mesh.Connection) { _ = m.as(ctx, "OnConnection") })
	m.S.OnDisconnection(func(ctx context.Context, _ *mesh.Connection, _ error) { _ = m.as(ctx, "OnDisconnection") })
	require.NoError(t, m.S.HandleCommand("work", func(ctx context.Context, _ *mesh.Connection, _ json.RawMessage) (any, error) {
		return "done", m.as(ctx, "command")
	}))
	m.App = Upgrading(w, m.S.Server, mesh.ConnOptions{Foreign: func(c *mesh.Connection, _ int, _ []byte) {
		_ = m.as(context.Background(), "Foreign")
		_ = c.Send("got", nil)
	}}, context.Background(), make(chan error, 100))
	return m
}

// as misbehaves if it is called for the chosen callback.
func (m *Misbehaving) as(ctx context.Context, callback string) error {
	if name := m.Name.Load(); name != nil && *name == callback {
		return m.do(ctx)
	}
	return nil
}

// Asked sends a request and returns a short form of its answer.
func (p *Peer) Asked(command string, payload any) string {
	answer, err := p.TryCall(command, payload)
	if err != nil {
		return err.Error()
	}
	return string(answer)
}

// Rounds makes clients use a callback once while it works and three times while it
// misbehaves. It returns the duration of one of these calls. A neighbour must not notice
// anything.
func (m *Misbehaving) Rounds(t *testing.T, name string, use func(*testing.T, *Misbehaving) string, fine, bad string) time.Duration {
	neighbour, friend := m.S.Dial(), m.S.Dial()
	friend.Subscribe("next door")
	require.Equal(t, "true", neighbour.Asked("mesh/noop", nil)) // waits for its OnConnection
	assert.Equal(t, fine, use(t, m), "the callback works")
	m.W.Sleep(10 * time.Millisecond) // for work after the end of a connection
	m.Name.Store(&name)
	defer m.Name.Store(nil)
	var took time.Duration
	for range 3 {
		begun := time.Now()
		saw := make(chan string, 1)
		go func() {
			saw <- use(t, m)
			took = time.Since(begun)
		}()
		m.W.Sleep(20 * time.Millisecond) // for the callback to misbehave
		asked := time.Now()
		neighbour.Join("next door")
		assert.Equal(t, "true", neighbour.State("next door", map[string]any{"a": 1}))
		neighbour.Leave("next door")
		assert.Zero(t, time.Since(asked), "the neighbour does not wait")
		friend.Expect(10*time.Millisecond, "leave", neighbour.ID)
		assert.Equal(t, bad, <-saw)
	}
	m.W.Sleep(10 * time.Millisecond)
	assert.Equal(t, 3, friend.Count("join", neighbour.ID))
	assert.Equal(t, 3, friend.Count("leave", neighbour.ID))
	return took
}
