package mesh

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Every way of ending a connection by its id closes the socket, makes it leave its
// rooms at once, and runs OnDisconnection once.
func TestEndingASocketByItsID(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(ctx context.Context, here, there *testServer, id string) error{
		"Presence.Disconnect": func(ctx context.Context, here, _ *testServer, id string) error {
			return here.Presence().Disconnect(ctx, id)
		},
		"Connections.Close": func(ctx context.Context, here, _ *testServer, id string) error {
			return here.Connections().Close(ctx, id)
		},
		"Connections.Close of a manager": func(ctx context.Context, here, _ *testServer, id string) error {
			return here.Presence().Connections().Close(ctx, id)
		},
		"Connections.Close, from another server": func(ctx context.Context, _, there *testServer, id string) error {
			return there.Connections().Close(ctx, id)
		},
		"both at once": func(ctx context.Context, here, there *testServer, id string) error {
			done := make(chan error, 1)
			go func() { done <- there.Connections().Close(ctx, id) }()
			_ = here.Presence().Disconnect(ctx, id) // or the other one was faster
			<-done
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhereOn(t, nil, func(t *testing.T, w *world) {
				ctx := t.Context()
				here, there := w.tracked(), w.tracked()
				ended := make(chan string, 10)
				here.OnDisconnection(func(_ context.Context, c *Connection, reason error) {
					assert.ErrorIs(t, reason, ErrClosed)
					ended <- c.ID()
				})
				watcher, p, deaf, stays := there.dial(), here.dial(), here.raw(), here.dial()
				watcher.subscribe("lobby")
				p.join("lobby")
				p.subscribe("lobby")
				stays.join("lobby")
				deaf.send(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
				deaf.next()
				watcher.expect(w.unhurried(2*time.Second), "join", deaf.id)

				require.NoError(t, end(ctx, here, there, p.id))
				assert.Equal(t, 1000, p.closed(w.unhurried(2*time.Second)))
				began := time.Now()
				require.NoError(t, end(ctx, here, there, deaf.id)) // does not read: it answers no close frame
				watcher.expect(w.unhurried(time.Second), "leave", deaf.id)
				assert.Less(t, time.Since(began), w.unhurried(time.Second))
				watcher.expect(w.unhurried(2*time.Second), "leave", p.id)
				w.eventually(w.unhurried(5*time.Second), func() bool { return len(ended) == 2 }, "both have ended")
				w.sleep(100 * time.Millisecond)
				assert.ElementsMatch(t, []string{p.id, deaf.id}, []string{<-ended, <-ended})
				assert.Empty(t, ended, "once each")
				assert.Equal(t, 1, here.Stats().Connections)
				for _, id := range []string{p.id, deaf.id} {
					_, open := here.Connection(id)
					assert.False(t, open)
					require.ErrorIs(t, here.Presence().Disconnect(ctx, id), ErrUnknownConnection)
					w.eventually(w.unhurried(2*time.Second), func() bool {
						return there.Connections().Close(ctx, id) != nil
					}, "unknown everywhere")
				}
				assert.Equal(t, 1, watcher.count("leave", p.id))
				assert.True(t, stays.room("mesh/subscribe-presence", "lobby").Success, "other connections stay")
			})
		})
	}
}

// A connection that is ended while its hooks run, or by them, ends once, too.
func TestEndingASocketFromItsHooks(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		down := make(chan string, 10)
		s.OnConnection(func(ctx context.Context, c *Connection) {
			assert.NoError(t, s.Presence().Disconnect(ctx, c.ID()))
		})
		s.OnDisconnection(func(ctx context.Context, c *Connection, _ error) {
			assert.ErrorIs(t, s.Presence().Disconnect(ctx, c.ID()), ErrUnknownConnection)
			down <- c.ID()
		})
		p := s.dial()
		assert.Equal(t, 1000, p.closed(2*time.Second))
		w.sleep(time.Second)
		assert.Len(t, down, 1)
		assert.Zero(t, s.Stats().Connections)
	})
}
