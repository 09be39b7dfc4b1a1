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
	// mark returns what the lane keeps of the item.
	mark() *mark
	// pending reports whether there is something to write, or to wait for.
	// What is over without a word to Redis is let go.
	pending() bool
}

// mark is what a lane keeps of an item.
type mark struct {
	queued bool
	number uint64 // of the last batch that it was taken for; of run alone
}

// lane writes the items of one bucket, one batch at a time: callers that wait
// together go together. Because only one batch is under way and each has a
// higher number than the one before, Redis can tell a late one and drop it.
type lane struct {
	o      *Owner
	bucket int

	mu      sync.Mutex // guards the fields below, and mark.queued
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
	if l.closed || it.mark().queued {
		return
	}
	it.mark().queued = true
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

// batch is what goes in one call: ops, and the item that each is of.
type batch struct {
	number uint64
	items  []item
	ops    []store.Op
}

func (b *batch) add(it item, op store.Op) {
	b.items, b.ops = append(b.items, it), append(b.ops, op)
}

// run writes batches until nothing is queued. It ends then, so that a server
// whose connections are quiet has no goroutine here.
func (l *lane) run() {
	var backoff time.Duration
	limit := firstLimit
	for {
		inc := l.o.cfg.Incarnation()
		b := l.take(inc)
		if len(b.ops) == 0 {
			return
		}
		began := time.Now()
		err := l.commit(inc, b, limit)
		if err == nil {
			backoff, limit = 0, firstLimit
			continue
		}
		l.o.stats.retries.Add(1)
		l.again(b)
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
func (l *lane) take(inc string) batch {
	b, size := l.begin(), 0
	var again []item
	for {
		it, last := l.pop(b)
		if it == nil {
			break
		}
		// Changed and offered anew since it was taken. Twice in a batch it would
		// be written, and counted, on the assumption that nothing of it has run.
		if it.mark().number == b.number {
			again = append(again, it)
			continue
		}
		op, ok := it.next(inc, nil)
		if !ok {
			continue
		}
		it.mark().number = b.number
		full := false
		for n := 1; ok; n++ {
			b.add(it, op)
			size += op.Size()
			if full = len(b.ops) == store.MaxOps || size >= store.MaxBytes; full || n == together {
				break
			}
			op, ok = it.next(inc, &b.ops[len(b.ops)-1])
		}
		if full || last {
			break
		}
	}
	if len(b.ops) == 0 {
		return b // pop ended the run: another one may be under way already
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, it := range again {
		if !it.mark().queued {
			it.mark().queued = true
			l.queue.push(it)
		}
	}
	l.flying = len(b.ops)
	return b
}

// begin returns an empty batch with room for what is queued.
func (l *lane) begin() batch {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.number++
	room := min(l.queue.n, store.MaxOps)
	return batch{number: l.number, items: make([]item, 0, room), ops: make([]store.Op, 0, room)}
}

// pop takes the next item off the queue; where there is none and nothing was
// taken before it also ends the run.
func (l *lane) pop(b batch) (it item, last bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if it = l.queue.pop(); it == nil {
		if len(b.ops) == 0 {
			l.running = false
		}
		return nil, true
	}
	it.mark().queued = false
	return it, l.queue.n == 0
}

// again puts a batch whose outcome is unknown back, to be decided anew.
func (l *lane) again(b batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flying = 0
	if l.down.IsZero() {
		l.down = time.Now()
	}
	back := make([]item, 0, len(b.items))
	for _, it := range b.items {
		if !it.mark().queued {
			it.mark().queued = true
			back = append(back, it)
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
		it.mark().queued = false
	}
	l.mu.Unlock()
	for _, it := range queue {
		if it.pending() {
			l.offer(it)
		}
	}
}

func (l *lane) commit(inc string, b batch, limit time.Duration) error {
	l.mu.Lock()
	known := l.settled
	if l.settledOf != inc {
		known = 0
	}
	l.mu.Unlock()
	ctx, cancel := context.WithTimeout(l.o.stop, limit)
	defer cancel()
	results, err := l.o.cfg.Store.Commit(ctx, l.bucket, inc, b.number, known, b.ops)
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
		l.o.cfg.Logger.Debug("mesh: batch not written", "bucket", l.bucket, "ops", len(b.ops), "error", err)
		return err
	}
	l.settle(inc, b.number)
	l.o.past.LoadOrStore(inc, nil)
	l.o.stats.batches.Add(1)
	l.o.stats.ops.Add(uint64(len(b.ops)))
	for i, it := range b.items {
		it.done(b.ops[i], results[i])
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
