package owner

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// together is how many ops of one item go into one batch: who has many to be
	// written does not fill it alone.
	together = 16
	// aheadFor is how old a batch may be that was taken ahead: what it says of
	// time was true when it was taken.
	aheadFor = 50 * time.Millisecond
	// maxBackoff is the longest pause after a batch that Redis refused. When it
	// takes writes again, all refreshes have to be there well before another
	// server acts on a key that ran out in between, half a second later.
	maxBackoff = 200 * time.Millisecond
)

// batch is what goes in one call: ops, and the item that each is of.
type batch struct {
	number uint64
	inc    string
	at     time.Time // when it was taken
	items  []item
	ops    []store.Op
}

func (b *batch) add(it item, op store.Op) {
	b.items, b.ops = append(b.items, it), append(b.ops, op)
}

// flight is a batch on its way to Redis.
type flight struct {
	*batch
	beside  bool // something is done meanwhile
	began   time.Time
	landed  chan struct{} // closed when the answer is there
	results []store.OpResult
	err     error
}

// run writes batches until nothing is queued. It ends then, so that a server
// whose connections are quiet has no goroutine here. Under a load that fills
// batches the next one is taken while one flies, and sent before those who
// waited for that one are told: neither Redis nor this process waits for the
// other.
func (l *lane) run() {
	var backoff time.Duration
	limit, silent := firstLimit, 0
	for f := l.send(l.take(nil), limit); f != nil; {
		var next *batch
		if f.beside {
			next = l.ahead(f)
		}
		<-f.landed
		if f.err == nil {
			backoff, limit, silent = 0, firstLimit, 0
			l.settle(f.inc, f.number)
			follow := l.start(l.stillGood(next), limit, true)
			l.over(f)
			if follow == nil {
				follow = l.send(l.take(nil), limit)
			}
			f = follow
			continue
		}
		l.lost(f)
		if next != nil {
			l.again(next)
		}
		l.again(f.batch)
		l.sweep()
		// The client library may hand out, at once, the timeout of a dial that
		// it made before: that is no waiting. Nor need it have been the whole
		// limit: the store may give up before.
		if errors.Is(f.err, context.DeadlineExceeded) && time.Since(f.began) >= min(limit, firstLimit) {
			backoff = 0
			limit, silent = l.nextLimit(limit, silent, f.began)
		} else if backoff = min(max(2*backoff, 25*time.Millisecond), maxBackoff); !l.o.pause(backoff - rand.N(backoff/8)) {
			l.mu.Lock()
			l.running = false
			l.mu.Unlock()
			return
		}
		f = l.send(l.take(nil), limit)
	}
}

// full reports whether enough is queued to fill a batch: to wait for more would
// not make it larger. While batches fail nothing is taken ahead: what has been
// taken counts as tried, and sweep cannot let go of it.
func (l *lane) full() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queue.n >= l.o.most && l.down.IsZero()
}

// ahead takes a batch while another one flies; nil: there is none to be taken.
func (l *lane) ahead(f *flight) *batch {
	if !l.full() {
		return nil
	}
	return l.take(f)
}

// stillGood returns a batch that was taken ahead, if it may go as it is.
func (l *lane) stillGood(b *batch) *batch {
	if b == nil || b.inc == l.o.cfg.Incarnation() && time.Since(b.at) < aheadFor {
		return b
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken -= len(b.ops)
	l.back(b)
	return nil
}

// take moves items from the queue into a batch of at most Owner.most ops and MaxBytes,
// but for those of the one that flies (nil: none does). An item without a
// difference is dropped from the queue. It returns nil, and ends the run under
// the lock that offer takes, where nothing is left and none flies.
func (l *lane) take(flying *flight) *batch {
	b, size, patient := l.begin(), 0, 0
	var again []item
	for {
		it, u, last := l.pop(b, patient < l.o.portion, flying == nil && len(again) == 0)
		if it == nil {
			break
		}
		// Changed and offered anew since it was taken. Twice in a batch, or in two
		// of which neither is over, it would be written, and counted, on the
		// assumption that nothing of it has run.
		if n := it.mark().number; n == b.number || flying != nil && n == flying.number {
			again = append(again, it)
			continue
		}
		op, ok := it.next(b.inc, nil)
		if !ok {
			continue
		}
		it.mark().number, it.mark().taken = b.number, u
		full := false
		for n := 1; ok; n++ {
			b.add(it, op)
			size += op.Size()
			if !u.pressing() {
				patient++
			}
			if full = len(b.ops) == l.o.most || size >= store.MaxBytes; full || n == together {
				break
			}
			op, ok = it.next(b.inc, &b.ops[len(b.ops)-1])
		}
		if full || last {
			break
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, it := range again {
		if !it.mark().queued {
			l.enqueue(it, it.mark().urgency)
		}
	}
	if len(b.ops) == 0 {
		return nil // where pop has ended the run another one may be under way already
	}
	l.taken += len(b.ops)
	return b
}

// begin returns an empty batch with room for what is queued.
func (l *lane) begin() *batch {
	inc := l.o.cfg.Incarnation()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.number++
	room := min(l.queue.n, l.o.most)
	return &batch{
		number: l.number, inc: inc, at: time.Now(), items: make([]item, 0, room), ops: make([]store.Op, 0, room),
	}
}

// pop takes the next item off the queue (all: also one that is not pressing)
// with its urgency. If there is none and nothing was taken before, it also ends
// the run, if it may.
func (l *lane) pop(b *batch, all, mayEnd bool) (it item, u urgency, last bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if it = l.queue.pop(all); it == nil {
		if mayEnd && len(b.ops) == 0 {
			l.running = false
		}
		return nil, 0, true
	}
	it.mark().queued = false
	return it, it.mark().urgency, l.queue.n == 0
}

// send has the store commit a batch (nil: there is none), and waits for it
// unless the next one can be taken meanwhile.
func (l *lane) send(b *batch, limit time.Duration) *flight {
	return l.start(b, limit, b != nil && l.full())
}

// start is send for callers that know whether they have something to do
// meanwhile.
func (l *lane) start(b *batch, limit time.Duration, beside bool) *flight {
	if b == nil {
		return nil
	}
	l.mu.Lock()
	known := l.settled
	if l.settledOf != b.inc {
		known = 0
	}
	l.mu.Unlock()
	f := &flight{batch: b, beside: beside, began: time.Now(), landed: make(chan struct{})}
	fly := func() {
		defer close(f.landed)
		ctx, cancel := context.WithTimeout(l.o.stop, limit)
		defer cancel()
		f.results, f.err = l.o.cfg.Store.Commit(ctx, l.bucket, b.inc, b.number, known, b.ops)
	}
	if beside {
		go fly() // run waits for it
	} else {
		fly()
	}
	return f
}

// over hands out the answers to a batch.
func (l *lane) over(f *flight) {
	l.o.past.LoadOrStore(f.inc, nil)
	l.o.stats.batches.Add(1)
	l.o.stats.ops.Add(uint64(len(f.ops)))
	for i, it := range f.items {
		it.done(f.ops[i], f.results[i])
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken -= len(f.ops)
	l.moved, l.down, l.failure = time.Now(), time.Time{}, nil
}

// lost notes that a batch has not been written, as far as is known.
func (l *lane) lost(f *flight) {
	l.failed(f.err)
	l.o.stats.retries.Add(1)
	switch {
	case errors.Is(f.err, store.ErrFenced):
		l.o.cfg.Fenced(f.inc)
	case errors.Is(f.err, store.ErrLost):
		// The fence ran out after a day without a write, or Redis lost
		// everything, or the last of what it had acknowledged. The lease is
		// being asked which, and after that everything is compared;
		// meanwhile this living server may begin anew.
		l.o.trouble.Store(true)
		l.o.cfg.Doubt()
		l.settle("", 0)
	}
	l.o.cfg.Logger.Debug("mesh: batch not written", "bucket", l.bucket, "ops", len(f.ops), "error", f.err)
}
