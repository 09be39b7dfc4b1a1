package store

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// maxProbes limits the connections of one node that are probed at once.
	maxProbes = 256
	// suspectAfter is the duration after which an unanswered call may be due to a dead
	// connection. A caller may give up earlier for reasons of its own.
	suspectAfter = 500 * time.Millisecond
)

// idleProbe looks for idle connections that are dead without a sign, for example
// because a firewall has forgotten them or the other machine has lost power. If a call
// over one of them times out, the other idle connections of the pool are probably dead
// too. Without a probe each of them would cost one more call its time, one after the
// other, for longer than a lease lasts.
type idleProbe struct {
	asking atomic.Bool // one probe at a time
}

// probeIdle pings idle connections, many at once, without blocking the caller. It
// leaves some connections to other calls in case nothing is wrong; each of those that
// is dead shows by itself. The client drops a connection if its PING times out. Until
// then no other call gets that connection, and new ones are made. If Redis itself is
// slow, the only cost is these PINGs.
func (s *Store) probeIdle(ctx context.Context) {
	if !s.idle.asking.CompareAndSwap(false, true) {
		return
	}
	s.calls.Go(func() {
		defer s.idle.asking.Store(false)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout) // no retries after that
		defer cancel()
		switch c := s.client.(type) {
		case *redis.Client:
			askIdle(ctx, c)
		case *redis.ClusterClient:
			// An error here means that the nodes could not be listed. Then there is
			// nothing to probe.
			_ = c.ForEachShard(ctx, func(ctx context.Context, node *redis.Client) error {
				askIdle(ctx, node)
				return nil
			})
		}
	})
}

func askIdle(ctx context.Context, c *redis.Client) {
	var wg sync.WaitGroup
	for range probeCount(int(c.PoolStats().IdleConns), c.Options().PoolSize) {
		wg.Go(func() {
			defer func() { _ = recover() }() // hooks of the app may panic; the calls that count report it
			_ = c.Ping(ctx).Err()            // the client drops the connection if this fails
		})
	}
	wg.Wait()
}

// probeCount returns how many idle connections of a pool to probe. A quarter of the
// pool, idle or not yet made, stays free for other calls.
func probeCount(idle, size int) int { return min(idle, size-(size+3)/4, maxProbes) }
