package mesh

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// TestBlackHoleWithoutReadTimeout: every connection falls silent at once, and so
// does the next one of each kind, for good. A client that has no timeouts of its
// own goes by the deadlines of calls, also where it subscribes.
func TestBlackHoleWithoutReadTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		opts := mem.Options()
		opts.ReadTimeout, opts.WriteTimeout, opts.ContextTimeoutEnabled = -1, -1, true
		var hole atomic.Bool
		dial := opts.Dialer
		opts.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if err := ctx.Err(); err != nil {
				return nil, err // as a net.Dialer does
			}
			if hole.Load() {
				here, there := net.Pipe() // nothing is read or written at the other end
				t.Cleanup(func() { _ = there.Close() })
				return here, nil
			}
			return dial(ctx, network, addr)
		}
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		m, err := NewPresenceManager(Options{Redis: client})
		require.NoError(t, err)
		require.NoError(t, m.Start(t.Context()))
		defer func() { require.NoError(t, m.Shutdown(t.Context())) }()
		require.NoError(t, m.TrackPresence(Exact("room"), PresenceOptions{}))
		require.NoError(t, m.Connect(t.Context(), "a", nil))
		hole.Store(true)
		mem.CutOnce()
		time.Sleep(30 * time.Second)
		hole.Store(false)
		time.Sleep(20 * time.Second) // LeaseTTL, and the time of a call
		require.NoError(t, m.Join(t.Context(), "room", "a"))
		for event, err := range m.Subscribe(t.Context(), "room", SubscribeOptions{}) {
			require.NoError(t, err)
			require.Len(t, event.Snapshot.Members, 1)
			require.False(t, event.Snapshot.Stale)
			break
		}
	})
}
