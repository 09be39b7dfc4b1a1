package local

import (
	"context"
	"errors"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// maxOpsPerItem limits one item's share of a batch.
	maxOpsPerItem = 16
	// maxAheadAge is the longest time that a batch taken ahead may wait. Its ops hold
	// times that were right when it was taken.
	maxAheadAge = 50 * time.Millisecond
	// maxBackoff is the longest pause after a batch that Redis refused. When Redis takes
	// writes again, all refreshes have to be there well before another server acts on an
	// expired key, half a second later.
	maxBackoff = 200 * time.Millisecond
)

// backoff is the pause between batches that Redis refused.
var backoff = wait.Backoff{First: 25 * time.Millisecond, Last: maxBackoff}

// batch is the ops of one call and the items that they are of.
type batch struct {
	number  uint64
	inc     string
	takenAt time.Time
	items   []writable
	ops     []store.Op
	size    int // of the ops, in bytes
	routine int // ops that are routine or background
}

func (b *batch) add(it writable, op store.Op, p priority) {
	b.items, b.ops = append(b.items, it), append(b.ops, op)
	b.size += op.Size()
	b.routine += one(!p.unlimited())
}

// inflight is a batch on its way to Redis.
type inflight struct {
	*batch
	concurrent bool // other work is done at the same time
	began      time.Time
	answered   chan struct{} // closed when the answer is there
	results    []store.OpResult
	err        error
}

// run writes batches until the queue is empty. Then it ends, so that a server with quiet
// connections has no goroutine here. Under a load that fills batches it takes the next
// batch while one is in flight, and sends it before it answers the callers of the first.
// So neither Redis nor this process waits for the other.
func (w *bucketWriter) run() {
	failures, limit, silent := 0, firstLimit, 0
	for f := w.send(w.take(nil), limit); f != nil; {
		var next *batch
		if f.concurrent {
			next = w.takeAhead(f)
		}
		<-f.answered
		if f.err == nil {
			failures, limit, silent = 0, firstLimit, 0
			w.noteConfirmed(f.inc, f.number)
			follow := w.start(w.reuse(next), limit, true)
			w.handleResults(f)
			if follow == nil {
				follow = w.send(w.take(nil), limit)
			}
			f = follow
			continue
		}
		w.batchFailed(f)
		if next != nil {
			w.retry(next)
		}
		w.retry(f.batch)
		w.sweep()
		// An immediate timeout does not count as a wait: the Redis client may return the
		// timeout of an earlier dial. The store may also time out earlier than the limit.
		if errors.Is(f.err, context.DeadlineExceeded) && time.Since(f.began) >= min(limit, firstLimit) {
			failures = 0
			limit, silent = w.nextLimit(limit, silent, f.began)
		} else if failures++; wait.For(w.registry.stop, wait.Jitter(backoff.After(failures), 1.0/8)) != nil {
			w.mu.Lock()
			w.running = false
			w.mu.Unlock()
			return
		}
		f = w.send(w.take(nil), limit)
	}
}

// hasFullBatch reports whether the queue fills a batch, so that waiting would not make
// the batch larger. While batches fail, none is taken ahead: ops that were taken count as
// tried, and sweep cannot drop them.
func (w *bucketWriter) hasFullBatch() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.queue.n >= w.registry.maxOps && w.failingSince.IsZero()
}

// takeAhead takes a batch while another one is in flight, or returns nil.
func (w *bucketWriter) takeAhead(f *inflight) *batch {
	if !w.hasFullBatch() {
		return nil
	}
	return w.take(f)
}

// reuse returns a batch that was taken ahead if it may be sent as it is.
func (w *bucketWriter) reuse(b *batch) *batch {
	if b == nil || b.inc == w.registry.cfg.Incarnation() && time.Since(b.takenAt) < maxAheadAge {
		return b
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takenOps -= len(b.ops)
	w.requeue(b)
	return nil
}

// take moves items from the queue into a batch of at most maxOps ops and store.MaxBytes.
// It leaves out the items of the batch in flight (nil: none). An item without changes is
// dropped from the queue. If nothing is left and nothing is in flight, take ends the run
// under the lock of enqueue and returns nil.
func (w *bucketWriter) take(prior *inflight) *batch {
	b := w.newBatch()
	full := func() bool { return len(b.ops) == w.registry.maxOps || b.size >= store.MaxBytes }
	var again []writable
	for {
		it, p, last := w.pop(b, b.routine < w.registry.maxRoutineOps, prior == nil && len(again) == 0)
		if it == nil {
			break
		}
		// The item has changed and was queued again since it was taken. An item must not
		// be twice in a batch, or in two batches that are not done: its second op would
		// be made as if the first had not run.
		if n := it.queueState().number; n == b.number || prior != nil && n == prior.number {
			again = append(again, it)
			continue
		}
		op, ok := it.next(b.inc, nil)
		if !ok {
			continue
		}
		it.queueState().number, it.queueState().takenAs = b.number, p
		for n := 1; ok; n++ {
			b.add(it, op, p)
			if full() || n == maxOpsPerItem {
				break
			}
			op, ok = it.next(b.inc, &b.ops[len(b.ops)-1])
		}
		if full() || last {
			break
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, it := range again {
		if !it.queueState().queued {
			w.enqueueLocked(it, it.queueState().priority)
		}
	}
	if len(b.ops) == 0 {
		return nil // pop may have ended this run, and another one may have begun
	}
	w.takenOps += len(b.ops)
	return b
}

// newBatch returns an empty batch with room for the queued items.
func (w *bucketWriter) newBatch() *batch {
	inc := w.registry.cfg.Incarnation()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.number++
	room := min(w.queue.n, w.registry.maxOps)
	return &batch{
		number: w.number, inc: inc, takenAt: time.Now(), items: make([]writable, 0, room), ops: make([]store.Op, 0, room),
	}
}

// pop removes the next item from the queue and returns it with its priority. Without all,
// it leaves out routine and background items. If the queue is empty, nothing was taken
// before and mayEnd is set, pop ends the run.
func (w *bucketWriter) pop(b *batch, all, mayEnd bool) (it writable, p priority, last bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if it = w.queue.pop(all); it == nil {
		if mayEnd && len(b.ops) == 0 {
			w.running = false
		}
		return nil, 0, true
	}
	it.queueState().queued = false
	return it, it.queueState().priority, w.queue.n == 0
}

// send commits a batch (nil: none). It waits for the answer unless the next batch can be
// taken in the meantime.
func (w *bucketWriter) send(b *batch, limit time.Duration) *inflight {
	return w.start(b, limit, b != nil && w.hasFullBatch())
}

// start is send for callers that know whether they have other work to do at the same
// time.
func (w *bucketWriter) start(b *batch, limit time.Duration, concurrent bool) *inflight {
	if b == nil {
		return nil
	}
	w.mu.Lock()
	known := w.confirmed
	if w.confirmedOf != b.inc {
		known = 0
	}
	w.mu.Unlock()
	f := &inflight{batch: b, concurrent: concurrent, began: time.Now(), answered: make(chan struct{})}
	commit := func() {
		defer close(f.answered)
		ctx, cancel := context.WithTimeout(w.registry.stop, limit)
		defer cancel()
		f.results, f.err = w.registry.cfg.Store.Commit(ctx, w.bucket, b.inc, b.number, known, b.ops)
	}
	if concurrent {
		go commit() // run waits for it
	} else {
		commit()
	}
	return f
}

// handleResults hands the results of a batch to its items.
func (w *bucketWriter) handleResults(f *inflight) {
	w.registry.ownIncarnations.LoadOrStore(f.inc, nil)
	w.registry.stats.batches.Add(1)
	w.registry.stats.ops.Add(uint64(len(f.ops)))
	for i, it := range f.items {
		it.done(f.ops[i], f.results[i])
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takenOps -= len(f.ops)
	w.lastBatchAt, w.failingSince, w.failure = time.Now(), time.Time{}, nil
}

// batchFailed handles the failure of a batch. Redis may still have run it.
func (w *bucketWriter) batchFailed(f *inflight) {
	w.noteFailure(f.err)
	w.registry.stats.retries.Add(1)
	switch {
	case errors.Is(f.err, store.ErrFenced):
		w.registry.cfg.Fenced(f.inc)
	case errors.Is(f.err, store.ErrForgotten):
		// Either the fence expired after a day without a write, or Redis lost everything
		// or its last acknowledged writes. A renewal of the lease finds out which, and
		// then everything is compared. Until then this server, which is alive, may start
		// a new fence.
		w.registry.reconcileAll.Store(true)
		w.registry.cfg.RenewLease()
		w.noteConfirmed("", 0)
	}
	w.registry.cfg.Logger.Debug("mesh: batch not written", "bucket", w.bucket, "ops", len(f.ops), "error", f.err)
}
