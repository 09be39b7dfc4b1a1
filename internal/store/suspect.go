package store

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// maxSuspects bounds the connections of one node that are asked at once.
	maxSuspects = 256
	// suspicious is how long a call must have been under way without an answer
	// to say something about connections. A caller may have had less patience.
	suspicious = 500 * time.Millisecond
)

// suspects looks after connections that may be dead without a word: where a
// firewall has forgotten them, or the machine at the other end has lost its
// power. A call over one of them runs out of time. The idle ones of the pool
// are no better then, and each would cost one more call its time, one after the
// other, for longer than any lease.
type suspects struct {
	asking atomic.Bool // one time after the other
}

// suspect asks idle connections for a sign of life, many at once, and beside
// the caller. Some are left to whoever calls meanwhile, should nothing be wrong:
// each of those that is dead tells by itself. The client drops those that give none, when its read timeout runs
// out; meanwhile nobody gets them, and new ones are made. Where Redis itself
// is slow they answer late, and nothing is lost but as many PINGs.
func (s *Store) suspect(ctx context.Context) {
	if !s.suspects.asking.CompareAndSwap(false, true) {
		return
	}
	s.calls.Go(func() {
		defer s.suspects.asking.Store(false)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout) // no retries after that
		defer cancel()
		switch c := s.client.(type) {
		case *redis.Client:
			askIdle(ctx, c)
		case *redis.ClusterClient:
			// An error is one of learning the nodes: then there is nobody to ask.
			_ = c.ForEachShard(ctx, func(ctx context.Context, node *redis.Client) error {
				askIdle(ctx, node)
				return nil
			})
		}
	})
}

func askIdle(ctx context.Context, c *redis.Client) {
	var wg sync.WaitGroup
	for range suspected(int(c.PoolStats().IdleConns), c.Options().PoolSize) {
		wg.Go(func() {
			defer func() { _ = recover() }() // of the app's hooks; calls that count report it
			_ = c.Ping(ctx).Err()            // the client draws the consequences
		})
	}
	wg.Wait()
}

// suspected is how many of a pool's idle connections are asked: no more than
// leave a quarter of the pool to others, be it idle or yet to be made.
func suspected(idle, size int) int { return min(idle, size-(size+3)/4, maxSuspects) }
