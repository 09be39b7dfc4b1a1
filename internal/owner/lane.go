package owner

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// item is something whose difference to Redis a lane writes.
type item interface {
	// next returns what has to be written now, if anything; after an op that it
	// has returned (nil: none), what is to follow that one in the same batch.
	next(inc string, after *store.Op) (store.Op, bool)
	// done takes the answer to what next returned, in the same order.
	done(op store.Op, res store.OpResult)
	// conn returns the connection that the item is of.
	conn() *Conn
	// mark returns where the lane keeps whether the item is in its queue.
	mark() *bool
	// pending reports whether there is something to write, or to wait for.
	// What is over without a word to Redis is let go.
	pending() bool
}

// lane writes the items of one bucket, one batch at a time: callers that wait
// together go together. Because only one batch is under way and each has a
// higher number than the one before, Redis can tell a late one and drop it.
type lane struct {
	o      *Owner
	bucket int

	mu      sync.Mutex // guards the fields below, and what item.mark points to
	queue   queue
	running bool
	closed  bool
	flying  int
	number  uint64
	moved   time.Time // when the last batch came back
	down    time.Time // since when batches fail; zero: they do not
	// settled is the number of the newest batch that is known to have run, and
	// settledOf its incarnation. A Redis that has not seen it takes no later one.
	settled   uint64
	settledOf string

	// How many entries and connections Redis is known to hold of heldOf.
	held   int64
	heldOf string

	// Guarded by Owner.auditing.
	troubled bool // since trouble was said to be its entries have not been compared
	deaf     bool // nor have its connections' metadata
	differs  int  // heartbeats in a row at which Redis held another number
	busy     int  // heartbeats in a row at which there was no comparing
}

// offer queues an item that may have something to write.
func (l *lane) offer(it item) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || *it.mark() {
		return
	}
	*it.mark() = true
	l.queue.push(it)
	if !l.running {
		l.running = true
		l.o.workers.Go(l.run)
	}
}

func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
}

// hold counts what Redis came to hold, or does not any more, of an
// incarnation. What an earlier one held is of no interest.
func (l *lane) hold(inc string, by int64) {
	if inc != l.o.cfg.Incarnation() {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.heldOf != inc {
		l.heldOf, l.held = inc, 0
	}
	l.held += by
}

// patience is how long it makes sense to wait for a write. Once batches have
// failed for a while the answer is known: nobody is kept waiting for it.
func (l *lane) patience() time.Duration {
	if l.away() {
		return downPatience
	}
	return answerWithin
}

// away reports whether batches have failed for a while.
func (l *lane) away() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.down.IsZero() && time.Since(l.down) > downAfter
}

func (l *lane) waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queue.n + l.flying
}

const (
	// downAfter is after how long of failures Redis is taken to be away, and
	// downPatience how long callers wait then.
	downAfter    = time.Second
	downPatience = 100 * time.Millisecond
)

// A batch that is not answered in time is made anew, over another connection:
// one that sits in the network must not hold up everybody's refreshes. Should
// it arrive after all, its number tells. Where Redis itself is slow, later
// attempts are given longer.
const (
	firstLimit = 600 * time.Millisecond
	lastLimit  = 2 * time.Second // the store gives up before
)

// together is how many ops of one item go into one batch: who has many to be
// written does not fill it alone.
const together = 16

type flight struct {
	it item
	op store.Op
}

// run writes batches until nothing is queued. It ends then, so that a server
// whose connections are quiet has no goroutine here.
func (l *lane) run() {
	var backoff time.Duration
	limit := firstLimit
	for {
		inc := l.o.cfg.Incarnation()
		number, batch := l.take(inc)
		if len(batch) == 0 {
			return
		}
		began := time.Now()
		err := l.commit(inc, number, batch, limit)
		if err == nil {
			backoff, limit = 0, firstLimit
			continue
		}
		l.o.stats.retries.Add(1)
		l.again(batch)
		l.sweep()
		// The client library may hand out, at once, the timeout of a dial that
		// it made before: that is no waiting. Nor need it have been the whole
		// limit: the store may give up before.
		if errors.Is(err, context.DeadlineExceeded) && time.Since(began) >= firstLimit {
			backoff, limit = 0, min(2*limit, lastLimit)
			continue // it has waited long enough
		}
		backoff = min(max(2*backoff, 25*time.Millisecond), time.Second)
		if !l.o.pause(backoff) {
			l.mu.Lock()
			l.running = false
			l.mu.Unlock()
			return
		}
	}
}

// take moves items from the queue into a batch of at most MaxOps and MaxBytes.
// An item without a difference is dropped from the queue. It ends the run,
// under the lock that offer takes, where nothing is left.
func (l *lane) take(inc string) (uint64, []flight) {
	var (
		batch []flight
		again []item
		size  int
		taken = make(map[item]struct{})
	)
	for {
		it, last := l.pop(len(batch) == 0)
		if it == nil {
			break
		}
		// Changed and offered anew since it was taken. Twice in a batch it would
		// be written, and counted, on the assumption that nothing of it has run.
		if _, ok := taken[it]; ok {
			again = append(again, it)
			continue
		}
		op, ok := it.next(inc, nil)
		if !ok {
			continue
		}
		taken[it] = struct{}{}
		full := false
		for n := 1; ok; n++ {
			batch = append(batch, flight{it, op})
			size += op.Size()
			if full = len(batch) == store.MaxOps || size >= store.MaxBytes; full || n == together {
				break
			}
			op, ok = it.next(inc, &batch[len(batch)-1].op)
		}
		if full || last {
			break
		}
	}
	if len(batch) == 0 {
		return 0, nil // pop ended the run: another one may be under way already
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, it := range again {
		if !*it.mark() {
			*it.mark() = true
			l.queue.push(it)
		}
	}
	l.flying = len(batch)
	l.number++
	return l.number, batch
}

// pop takes the next item off the queue; where there is none and nothing was
// taken before it also ends the run.
func (l *lane) pop(first bool) (it item, last bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if it = l.queue.pop(); it == nil {
		if first {
			l.running = false
		}
		return nil, true
	}
	*it.mark() = false
	return it, l.queue.n == 0
}

// again puts a batch whose outcome is unknown back, to be decided anew.
func (l *lane) again(batch []flight) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flying = 0
	if l.down.IsZero() {
		l.down = time.Now()
	}
	back := make([]item, 0, len(batch))
	for _, f := range batch {
		if !*f.it.mark() {
			*f.it.mark() = true
			back = append(back, f.it)
		}
	}
	l.queue.back(back)
}

// sweep lets go of queued items that are over: while Redis is away, clients
// that come and go must not fill the memory.
func (l *lane) sweep() {
	l.mu.Lock()
	queue := l.queue.clear()
	for _, it := range queue {
		*it.mark() = false
	}
	l.mu.Unlock()
	for _, it := range queue {
		if it.pending() {
			l.offer(it)
		}
	}
}

func (l *lane) commit(inc string, number uint64, batch []flight, limit time.Duration) error {
	ops := make([]store.Op, len(batch))
	for i := range batch {
		ops[i] = batch[i].op
	}
	l.mu.Lock()
	known := l.settled
	if l.settledOf != inc {
		known = 0
	}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(l.o.stop, limit)
	defer cancel()
	results, err := l.o.cfg.Store.Commit(ctx, l.bucket, inc, number, known, ops)
	if err != nil {
		switch {
		case errors.Is(err, store.ErrFenced):
			l.o.cfg.Fenced(inc)
		case errors.Is(err, store.ErrLost):
			// The fence ran out after a day without a write, or Redis lost
			// everything, or the last of what it had acknowledged. The lease is
			// being asked which, and after that everything is compared;
			// meanwhile this living server may begin anew.
			l.o.trouble.Store(true)
			l.o.cfg.Doubt()
			l.settle("", 0)
		}
		l.o.cfg.Logger.Debug("mesh: batch not written", "bucket", l.bucket, "ops", len(ops), "error", err)
		return err
	}
	l.settle(inc, number)
	l.o.past.LoadOrStore(inc, nil)
	l.o.stats.batches.Add(1)
	l.o.stats.ops.Add(uint64(len(ops)))
	for i, f := range batch {
		f.it.done(f.op, results[i])
	}
	l.mu.Lock()
	l.flying = 0
	l.moved, l.down = time.Now(), time.Time{}
	l.mu.Unlock()
	return nil
}

func (l *lane) settle(inc string, number uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.settledOf, l.settled = inc, number
}

// pause waits, unless the owner stops first.
func (o *Owner) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-o.stop.Done():
		return false
	}
}
