package lease

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/store"
)

const (
	maxReapers  = 2   // dead incarnations cleaned up at a time
	maxBuckets  = 8   // buckets of one of them at a time
	maxPages    = 4   // pages of one bucket's index at a time
	reapBatch   = 128 // entries or connections in one call
	maxRefused  = 3   // refused calls before a pass is given up
	maxAttempts = 10  // failed attempts in a row before one is left on the dead list
)

// errStuck says that a pass over a bucket ended nothing although there was
// something.
var errStuck = errors.New("mesh: entries of a dead server do not go away")

// judgeFunc gives the judgment for one batch; it may wait until patience allows
// one.
type judgeFunc func(context.Context) (store.Judgment, error)

// reaper cleans up after the dead, beside the loop, which never waits for it.
// All it does may be done by several servers at once, and left half done: the
// dead list keeps an incarnation until somebody got through.
type reaper struct {
	l  *Lease
	wg sync.WaitGroup

	late *histogram.Histogram // see Stats.Late

	mu      sync.Mutex // guards the fields below
	queue   []string
	known   map[string]deceased // queued or in work
	workers int
}

// deceased is what is known of a dead incarnation.
type deceased struct {
	buried  bool      // by this server
	leaseTo time.Time // when its lease ran out; zero: not known
	over    bool      // nothing is left of it, it is being taken off the list
}

func newReaper(l *Lease) *reaper {
	return &reaper{l: l, late: histogram.New(histogram.Lags()...), known: make(map[string]deceased)}
}

// add hands over a dead incarnation; one that is already here is not taken
// twice. Only the loop calls it, so that no worker starts after wait.
func (r *reaper) add(ctx context.Context, inc string, buried bool, leaseTo time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.known[inc]; ok || ctx.Err() != nil {
		return
	}
	r.known[inc] = deceased{buried: buried, leaseTo: leaseTo}
	r.queue = append(r.queue, inc)
	if r.workers < maxReapers {
		r.workers++
		r.wg.Go(func() { r.work(ctx) })
	}
}

// working returns the incarnations that are queued or in work, without those that
// nothing is left of.
func (r *reaper) working() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]string, 0, len(r.known))
	for inc, d := range r.known {
		if !d.over {
			list = append(list, inc)
		}
	}
	return list
}

// finish notes that an incarnation is being taken off the list of the dead.
func (r *reaper) finish(inc string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := r.known[inc]
	d.over = true
	r.known[inc] = d
}

// wait waits for the workers, after their context has ended.
func (r *reaper) wait() { r.wg.Wait() }

// work cleans up after one incarnation after the other until none is left.
func (r *reaper) work(ctx context.Context) {
	for {
		r.mu.Lock()
		if len(r.queue) == 0 || ctx.Err() != nil {
			r.workers--
			r.mu.Unlock()
			return
		}
		inc := r.queue[0]
		r.queue = r.queue[1:]
		buried := r.known[inc].buried
		r.mu.Unlock()

		ended, err := r.cleanUp(ctx, inc)

		r.mu.Lock()
		delete(r.known, inc)
		r.mu.Unlock()
		r.report(ctx, inc, buried, ended, err)
	}
}

// report tells how a cleaning ended.
func (r *reaper) report(ctx context.Context, inc string, buried bool, ended int, err error) {
	cfg := &r.l.cfg
	r.l.tally.add(func(t *tally) { t.reaped += uint64(ended) })
	if err != nil {
		if ctx.Err() == nil { // the dead list brings it back
			r.l.log.Warn("mesh: clean up after a dead server", "incarnation", inc, "entries", ended, "error", err)
		}
		return
	}
	if !buried && ended == 0 {
		return
	}
	r.l.log.Info("mesh: cleaned up after a dead server", "incarnation", inc, "entries", ended)
	if cfg.OnBuried != nil {
		cfg.OnBuried(inc, ended)
	}
}

// cleanUp ends everything that a dead incarnation owned, and then takes it off
// the dead list. It goes on after failures until there are too many in a row.
func (r *reaper) cleanUp(ctx context.Context, inc string) (ended int, err error) {
	ended, err = r.everywhere(ctx, func(bucket int) (int, error) {
		sum := 0
		for failures := 1; ; failures++ {
			n, err := r.bucket(ctx, bucket, inc, r.patientJudge)
			sum += n
			if n > 0 {
				failures = 1
			}
			if err == nil || ctx.Err() != nil || failures >= maxAttempts {
				return sum, err
			}
			if err := sleep(ctx, min(minRetry<<(failures-1), maxRetry)); err != nil {
				return sum, err
			}
		}
	})
	if err != nil {
		return ended, err
	}
	r.finish(inc)
	return ended, r.call(ctx, func(ctx context.Context) error { return r.l.cfg.Store.Cleaned(ctx, inc) })
}

// everywhere calls work for all buckets, a few at a time, and returns when all
// have returned.
func (r *reaper) everywhere(ctx context.Context, work func(bucket int) (int, error)) (sum int, err error) {
	var (
		wg   sync.WaitGroup
		next atomic.Int64
		mu   sync.Mutex // guards sum and err
	)
	for range min(maxBuckets, r.l.cfg.Buckets) {
		wg.Go(func() {
			for ctx.Err() == nil {
				bucket := int(next.Add(1)) - 1
				if bucket >= r.l.cfg.Buckets {
					return
				}
				n, e := work(bucket)
				mu.Lock()
				sum += n
				err = errors.Join(err, e)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return sum, errors.Join(err, ctx.Err())
}

// bucket fences inc in one bucket, and then ends what it owns there until
// nothing is left. Behind the fence nothing can be added.
func (r *reaper) bucket(ctx context.Context, bucket int, inc string, judge judgeFunc) (ended int, err error) {
	s := r.l.cfg.Store
	if err := r.call(ctx, func(ctx context.Context) error { return s.Fence(ctx, bucket, inc) }); err != nil {
		return 0, fmt.Errorf("fence bucket %d: %w", bucket, err)
	}
	for before := int64(math.MaxInt64); ; {
		var size int64
		err := r.call(ctx, func(ctx context.Context) (err error) {
			size, err = s.OwnedSize(ctx, bucket, inc)
			return err
		})
		if err != nil {
			return ended, fmt.Errorf("size of bucket %d: %w", bucket, err)
		}
		if size <= 0 {
			return ended, nil
		}
		if size >= before {
			return ended, fmt.Errorf("bucket %d, %d of them: %w", bucket, size, errStuck)
		}
		before = size
		n, err := r.pass(ctx, bucket, inc, judge)
		ended += n
		if err != nil {
			return ended, fmt.Errorf("reap bucket %d: %w", bucket, err)
		}
	}
}

// pass goes once through what inc owns in a bucket: it reads pages, and ends
// what they hold beside that, so that round trips add up less.
func (r *reaper) pass(ctx context.Context, bucket int, inc string, judge judgeFunc) (ended int, err error) {
	var (
		out   passed
		wg    sync.WaitGroup
		slots = make(chan struct{}, maxPages)
	)
	for cursor := uint64(0); ; {
		var refs []store.OwnedRef
		err := r.call(ctx, func(ctx context.Context) (err error) {
			refs, cursor, err = r.l.cfg.Store.OwnedPage(ctx, bucket, inc, cursor)
			return err
		})
		if err != nil {
			out.add(0, err)
			break
		}
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			r.page(ctx, bucket, inc, refs, judge, &out)
		})
		if cursor == 0 || !out.add(0, nil) {
			break
		}
	}
	wg.Wait()
	return out.ended, out.err
}

// passed is what has come of a pass so far.
type passed struct {
	mu      sync.Mutex // guards the fields below
	ended   int
	refused int
	err     error // the last one
}

// add adds the outcome of a call and reports whether to go on. What Redis
// refuses to end does not keep the rest from ending; but a few refusals, or one
// on account of the clock, end the pass.
func (p *passed) add(ended int, err error) (goOn bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended += ended
	if err != nil {
		p.err = err
		p.refused++
	}
	if errors.Is(err, store.ErrClock) || errors.Is(err, context.Canceled) {
		p.refused = maxRefused
	}
	return p.refused < maxRefused
}

// page ends what one page of an index names.
func (r *reaper) page(ctx context.Context, bucket int, inc string, refs []store.OwnedRef, judge judgeFunc, out *passed) {
	items, conns := split(refs, inc)
	for batch := range slices.Chunk(items, reapBatch) {
		if !out.add(r.end(ctx, batch, judge)) {
			return
		}
	}
	for batch := range slices.Chunk(conns, reapBatch) {
		err := r.call(ctx, func(ctx context.Context) error {
			return r.l.cfg.Store.ForgetConnections(ctx, bucket, inc, batch)
		})
		if !out.add(0, err) {
			return
		}
	}
}

// split sorts a page into entries and connections.
func split(refs []store.OwnedRef, inc string) (items []store.ReapItem, conns []string) {
	for _, ref := range refs {
		if ref.Room == "" && ref.Entry == "" {
			conns = append(conns, ref.Conn)
			continue
		}
		items = append(items, store.ReapItem{
			Mode: store.ReapDead, Room: ref.Room, Conn: ref.Conn, Entry: ref.Entry, Incarnation: inc,
		})
	}
	return items, conns
}

// end reaps what fits into one call, and counts what this call ended.
func (r *reaper) end(ctx context.Context, items []store.ReapItem, judge judgeFunc) (ended int, err error) {
	j, err := judge(ctx)
	if err != nil {
		return 0, err
	}
	sent := time.Now()
	var answers []store.ReapStatus
	err = r.call(ctx, func(ctx context.Context) (err error) {
		answers, err = r.l.cfg.Store.Reap(ctx, j, items)
		return err
	})
	for _, status := range answers {
		if status == store.Ended {
			ended++
		}
	}
	r.ended(items[0].Incarnation, ended)
	if errors.Is(err, store.ErrClock) {
		r.l.ClockRefused(time.Since(sent))
	}
	return ended, err
}

// ended notes how late it is for entries that have been ended just now.
func (r *reaper) ended(inc string, entries int) {
	r.mu.Lock()
	leaseTo := r.known[inc].leaseTo
	r.mu.Unlock()
	if !leaseTo.IsZero() {
		r.late.ObserveN(time.Since(leaseTo), entries)
	}
}

// patientJudge waits until patience allows a judgment: an outage in the middle
// of the cleaning suspends it for one TTL.
func (r *reaper) patientJudge(ctx context.Context) (store.Judgment, error) {
	for {
		if j, ok := r.l.Judge(); ok {
			return j, nil
		}
		wait := min(max(r.l.patience.left(time.Now()), minRetry/2), r.l.cfg.TTL/4)
		if err := sleep(ctx, wait); err != nil {
			return store.Judgment{}, err
		}
	}
}

// call bounds one call to Redis.
func (r *reaper) call(ctx context.Context, do func(context.Context) error) error {
	cctx, cancel := r.l.bound(ctx)
	defer cancel()
	return do(cctx)
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
