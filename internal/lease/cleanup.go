package lease

import (
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	maxCleaners  = 2   // dead incarnations cleaned up at a time
	maxBuckets   = 8   // buckets of one of them at a time
	maxPages     = 4   // pages of the index of one bucket at a time
	cleanUpBatch = 128 // entries or connections in one call
	maxRefused   = 3   // refused calls before a pass ends
	maxAttempts  = 10  // failed attempts in a row before an incarnation is left on the list of dead servers
)

// retry is the pause between failed attempts to clean up one bucket.
var retry = wait.Backoff{First: minRetry, Last: maxRetry}

// errStuck is the error of a bucket in which a pass ended nothing although it had
// entries.
var errStuck = errors.New("mesh: entries of a dead server do not go away")

// proofFunc returns the clock proof for one batch. It may wait for contact.
type proofFunc func(context.Context) (store.ClockProof, error)

// cleaner cleans up after dead incarnations, beside the loop, which never waits for it.
// Several servers may clean up after the same incarnation, and each may stop halfway. The
// incarnation stays on the list of dead servers until one server has finished.
type cleaner struct {
	l  *Lease
	wg sync.WaitGroup

	delays *histogram.Histogram // see Stats.Late

	mu      sync.Mutex // guards the fields below
	queue   []string
	known   map[string]deadServer // queued or in work
	workers int
}

// deadServer is a dead incarnation that waits for the cleaner.
type deadServer struct {
	declaredHere bool      // declared dead by this server
	leaseUntil   time.Time // when its lease ran out; zero: unknown
	// leaseEnd is when its lease ended (Redis time, unix ms), from which the grace of its
	// entries counts. 0: unknown.
	leaseEnd int64
	finished bool // nothing is left of it, and it is being taken off the list of dead servers
}

func newCleaner(l *Lease) *cleaner {
	return &cleaner{l: l, delays: histogram.New(histogram.Lags()...), known: make(map[string]deadServer)}
}

// add queues a dead incarnation. If it is known already, add only notes the end of its
// lease. Only the loop calls it, so that no worker starts after wait.
func (c *cleaner) add(ctx context.Context, inc string, as deadServer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if d, ok := c.known[inc]; ok && d.leaseEnd == 0 {
		d.leaseEnd = as.leaseEnd
		c.known[inc] = d
	}
	if _, ok := c.known[inc]; ok || ctx.Err() != nil {
		return
	}
	c.known[inc] = as
	c.queue = append(c.queue, inc)
	if c.workers < maxCleaners {
		c.workers++
		c.wg.Go(func() { c.work(ctx) })
	}
}

// working returns the incarnations that are queued or in work and not finished.
func (c *cleaner) working() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	list := make([]string, 0, len(c.known))
	for inc, d := range c.known {
		if !d.finished {
			list = append(list, inc)
		}
	}
	return list
}

// finish notes that nothing is left of an incarnation.
func (c *cleaner) finish(inc string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	d := c.known[inc]
	d.finished = true
	c.known[inc] = d
}

// wait waits for the workers, after their context has ended.
func (c *cleaner) wait() { c.wg.Wait() }

// work cleans up after one incarnation after the other until none is queued.
func (c *cleaner) work(ctx context.Context) {
	for {
		c.mu.Lock()
		if len(c.queue) == 0 || ctx.Err() != nil {
			c.workers--
			c.mu.Unlock()
			return
		}
		inc := c.queue[0]
		c.queue = c.queue[1:]
		declaredHere := c.known[inc].declaredHere
		c.mu.Unlock()

		done, err := c.cleanUp(ctx, inc)

		c.mu.Lock()
		delete(c.known, inc)
		c.mu.Unlock()
		c.report(ctx, inc, declaredHere, done, err)
	}
}

// report counts and logs the result of one cleanup.
func (c *cleaner) report(ctx context.Context, inc string, declaredHere bool, of tally, err error) {
	c.l.counters.add(func(n *counters) {
		n.cleanedUp += uint64(of.ended)
		n.placesKept += uint64(of.kept)
	})
	if err != nil {
		if ctx.Err() == nil { // the list of dead servers brings it back
			c.l.log.Warn("mesh: clean up after a dead server", "incarnation", inc, "entries", of.ended, "kept", of.kept, "error", err)
		}
		return
	}
	if declaredHere || of != (tally{}) {
		c.l.log.Info("mesh: cleaned up after a dead server", "incarnation", inc, "entries", of.ended, "kept", of.kept)
	}
}

// tally counts the entries of a dead server that need no more work.
type tally struct {
	ended int // ended by this call
	kept  int // their place is kept
}

func (t *tally) add(more tally) {
	t.ended += more.ended
	t.kept += more.kept
}

// cleanUp ends everything that a dead incarnation owned, except for places that are kept,
// and then takes it off the list of dead servers. It goes on after failures until there
// are too many in a row.
func (c *cleaner) cleanUp(ctx context.Context, inc string) (done tally, err error) {
	done, err = c.eachBucket(ctx, func(bucket int) (tally, error) {
		var sum tally
		for failures := 1; ; failures++ {
			some, err := c.bucket(ctx, bucket, inc, c.awaitProof)
			sum.add(some)
			if some != (tally{}) {
				failures = 1
			}
			if err == nil || ctx.Err() != nil || failures >= maxAttempts {
				return sum, err
			}
			if err := wait.For(ctx, retry.After(failures)); err != nil {
				return sum, err
			}
		}
	})
	if err != nil {
		return done, err
	}
	c.finish(inc)
	return done, c.call(ctx, func(ctx context.Context) error { return c.l.cfg.Store.RemoveDead(ctx, inc) })
}

// eachBucket calls work for all buckets, a few at a time. A failed bucket does not keep
// the others from their turn.
func (c *cleaner) eachBucket(ctx context.Context, work func(bucket int) (tally, error)) (sum tally, err error) {
	var mu sync.Mutex // guards sum and err
	stopped := wait.Each(ctx, c.l.cfg.Buckets, maxBuckets, func(bucket int) error {
		some, e := work(bucket)
		mu.Lock()
		defer mu.Unlock()
		sum.add(some)
		err = errors.Join(err, e)
		return nil
	})
	return sum, errors.Join(err, stopped)
}

// bucket fences inc in one bucket, and then ends what it owns there until nothing is
// left. Nothing can be added behind the fence.
func (c *cleaner) bucket(ctx context.Context, bucket int, inc string, getProof proofFunc) (done tally, err error) {
	s := c.l.cfg.Store
	if err := c.call(ctx, func(ctx context.Context) error { return s.Fence(ctx, bucket, inc) }); err != nil {
		return done, fmt.Errorf("fence bucket %d: %w", bucket, err)
	}
	for before := int64(math.MaxInt64); ; {
		var size int64
		err := c.call(ctx, func(ctx context.Context) (err error) {
			size, err = s.OwnedSize(ctx, bucket, inc)
			return err
		})
		if err != nil {
			return done, fmt.Errorf("size of bucket %d: %w", bucket, err)
		}
		if size <= 0 {
			return done, nil
		}
		if size >= before {
			return done, fmt.Errorf("bucket %d, %d of them: %w", bucket, size, errStuck)
		}
		before = size
		some, err := c.pass(ctx, bucket, inc, getProof)
		done.add(some)
		if err != nil {
			return done, fmt.Errorf("clean up bucket %d: %w", bucket, err)
		}
	}
}

// awaitProof waits for contact. An outage during a cleanup suspends the cleanup for one
// TTL.
func (c *cleaner) awaitProof(ctx context.Context) (store.ClockProof, error) {
	for {
		if proof, ok := c.l.ClockProof(); ok {
			return proof, nil
		}
		pause := min(max(c.l.contact.remaining(time.Now()), minRetry/2), c.l.cfg.TTL/4)
		if err := wait.For(ctx, pause); err != nil {
			return store.ClockProof{}, err
		}
	}
}

// call makes one call to Redis within its time limit.
func (c *cleaner) call(ctx context.Context, do func(context.Context) error) error {
	cctx, cancel := c.l.bound(ctx)
	defer cancel()
	return do(cctx)
}
