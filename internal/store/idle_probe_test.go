package store

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// All connections of the pool die at once without a sign. One call finds out, and pays
// for all of them.
func TestDeadConnectionsCostOneCall(t *testing.T) {
	t.Parallel()
	for name, half := range map[string]redistest.Half{"requests": redistest.Requests, "replies": redistest.Replies} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			proxy := redistest.Proxy(t, redistest.Start(t).Addr())
			client := redis.NewClient(&redis.Options{Addr: proxy.Addr(), PoolSize: 40, ReadTimeout: time.Second})
			s := New(client, testKeys{buckets: 1})
			defer func() {
				require.NoError(t, client.Close())
				require.NoError(t, s.Wait(t.Context()))
			}()
			const conns = 12
			fill(t, client, conns)
			proxy.HalfOpen(half)
			ping := func(within time.Duration) error {
				ctx, cancel := context.WithTimeout(t.Context(), within)
				defer cancel()
				return s.Ping(ctx)
			}
			require.ErrorIs(t, ping(20*time.Millisecond), ErrUnavailable)
			require.False(t, s.idle.asking.Load(), "the caller gave up early, which shows nothing")
			require.ErrorIs(t, ping(suspectAfter+100*time.Millisecond), ErrUnavailable)
			require.Eventually(t, func() bool { return client.PoolStats().IdleConns == 0 }, 2*time.Minute, time.Millisecond,
				"all are being asked")
			for range 3 {
				require.NoError(t, ping(time.Minute), "over a new one")
			}
			require.Eventually(t, func() bool { return client.PoolStats().TotalConns < conns }, 2*time.Minute, 10*time.Millisecond,
				"the dead ones are dropped")
		})
	}
}

// If all connections of the pool are idle, some are left to other calls.
func TestSomeConnectionsAreLeft(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ idle, size, want int }{
		{0, 10, 0}, {1, 10, 1}, {7, 10, 7}, {10, 10, 7}, {40, 40, 30}, {12, 40, 12}, {1, 1, 0}, {2, 2, 1}, {1000, 1000, maxProbes},
	} {
		require.Equal(t, tt.want, probeCount(tt.idle, tt.size), "%d of %d idle", tt.idle, tt.size)
	}
}

// fill makes the client hold at least n idle connections.
func fill(t *testing.T, c *redis.Client, n int) {
	t.Helper()
	for int(c.PoolStats().IdleConns) < n {
		var wg sync.WaitGroup
		for range n {
			wg.Go(func() { _ = c.BLPop(t.Context(), 50*time.Millisecond, "nothing").Err() })
		}
		wg.Wait()
	}
}
