package api

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// Each call that ends a connection by its id closes the socket, makes the connection
// leave its rooms at once, and runs OnDisconnection once.
func TestEndingASocketByItsID(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(ctx context.Context, here, there *harness.Server, id string) error{
		"Presence.Disconnect": func(ctx context.Context, here, _ *harness.Server, id string) error {
			return here.Presence().Disconnect(ctx, id)
		},
		"Connections.Close": func(ctx context.Context, here, _ *harness.Server, id string) error {
			return here.Connections().Close(ctx, id)
		},
		"Connections.Close of a manager": func(ctx context.Context, here, _ *harness.Server, id string) error {
			return here.Presence().Connections().Close(ctx, id)
		},
		"Connections.Close, from another server": func(ctx context.Context, _, there *harness.Server, id string) error {
			return there.Connections().Close(ctx, id)
		},
		"both at once": func(ctx context.Context, here, there *harness.Server, id string) error {
			done := make(chan error, 1)
			go func() { done <- there.Connections().Close(ctx, id) }()
			_ = here.Presence().Disconnect(ctx, id) // fails if Close was faster
			<-done
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
				ctx := t.Context()
				here, there := w.Tracked(), w.Tracked()
				ended := make(chan string, 10)
				here.OnDisconnection(func(_ context.Context, c *mesh.Connection, reason error) {
					assert.ErrorIs(t, reason, mesh.ErrClosed)
					ended <- c.ID()
				})
				watcher, p, mute, stays := there.Dial(), here.Dial(), here.Raw(), here.Dial()
				watcher.Subscribe("lobby")
				p.Join("lobby")
				p.Subscribe("lobby")
				stays.Join("lobby")
				mute.Send(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
				mute.Next()
				watcher.Expect(2*time.Second, "join", mute.ID)

				require.NoError(t, end(ctx, here, there, p.ID))
				assert.Equal(t, 1000, p.Closed(2*time.Second))
				began := time.Now()
				require.NoError(t, end(ctx, here, there, mute.ID)) // does not read, so it does not answer the close frame
				watcher.Expect(time.Second, "leave", mute.ID)
				assert.Less(t, time.Since(began), w.Unhurried(time.Second))
				watcher.Expect(2*time.Second, "leave", p.ID)
				w.Eventually(5*time.Second, func() bool { return len(ended) == 2 }, "both connections have ended")
				w.Sleep(100 * time.Millisecond)
				assert.ElementsMatch(t, []string{p.ID, mute.ID}, []string{<-ended, <-ended})
				assert.Empty(t, ended, "OnDisconnection ran twice")
				assert.Equal(t, 1, here.Stats().Connections)
				for _, id := range []string{p.ID, mute.ID} {
					_, open := here.Connection(id)
					assert.False(t, open)
					require.ErrorIs(t, here.Presence().Disconnect(ctx, id), mesh.ErrUnknownConnection)
					w.Eventually(2*time.Second, func() bool {
						return there.Connections().Close(ctx, id) != nil
					}, "the id is unknown on the other server")
				}
				assert.Equal(t, 1, watcher.Count("leave", p.ID))
				assert.True(t, stays.Room("mesh/subscribe-presence", "lobby").Success, "other connections stay open")
			})
		})
	}
}

// A connection that is ended during its hooks, or by them, ends once.
func TestEndingASocketFromItsHooks(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		down := make(chan string, 10)
		s.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			assert.NoError(t, s.Presence().Disconnect(ctx, c.ID()))
		})
		s.OnDisconnection(func(ctx context.Context, c *mesh.Connection, _ error) {
			assert.ErrorIs(t, s.Presence().Disconnect(ctx, c.ID()), mesh.ErrUnknownConnection)
			down <- c.ID()
		})
		p := s.Dial()
		assert.Equal(t, 1000, p.Closed(2*time.Second))
		w.Sleep(time.Second)
		assert.Len(t, down, 1)
		assert.Zero(t, s.Stats().Connections)
	})
}
