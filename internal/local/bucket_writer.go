package local

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// writable is an item with changes that a writer writes.
type writable interface {
	// next returns the op to write now, if any. after is the op that it returned before
	// for the same batch, or nil; then it returns the op that follows in that batch.
	next(inc string, after *store.Op) (store.Op, bool)
	// done takes the result of an op that next returned, in the same order.
	done(op store.Op, res store.OpResult)
	// conn returns the connection of the item.
	conn() *Conn
	// key returns the key of the item's turn: its room or its connection.
	key() queueKey
	// queueState returns the part of the item that belongs to the writer.
	queueState() *queueState
	// pending reports whether the item has something to write or to wait for. An ended
	// item that Redis never saw is dropped.
	pending() bool
}

// queueState is what a writer keeps of an item.
type queueState struct {
	queued   bool
	priority priority // of the item in the queue, or when it was last taken
	stays    uint32   // counts the times that it was in a queue
	number   uint64   // of the last batch that took the item; used by run only
	takenAs  priority // priority with which that batch took it; used by run only
}

// bucketWriter writes the items of one bucket, one batch at a time (see inflight.go), so
// that callers that wait together share a batch. Batches have rising numbers and only one
// is in flight, so Redis can recognise a late batch and drop it.
type bucketWriter struct {
	registry *Registry
	bucket   int
	sweptAt  time.Time // when ended items were last dropped; used by run only

	mu           sync.Mutex // guards the fields below, and queueState except number and takenAs
	queue        priorityQueue
	running      bool
	closed       bool
	takenOps     int // ops of the batches that were taken and are not done
	number       uint64
	lastBatchAt  time.Time // when the last batch was answered
	failingSince time.Time // first failure of the batches since the last success; zero: none
	failure      error     // reason of the last failure as Redis or the network reported it; nil if there is none
	// confirmed is the number of the newest batch that Redis is known to have run, and
	// confirmedOf is its incarnation. A Redis that does not know that batch refuses later
	// ones.
	confirmed   uint64
	confirmedOf string

	// The number of entries and connections of storedOf that Redis is known to hold.
	stored   int64
	storedOf string
	changes  uint64 // of stored

	// Guarded by Registry.reconciling.
	reconcileDue   bool // entries are to be compared since Redis may have lost data
	metadataDue    bool // metadata of the connections is to be read for the same reason
	mismatches     int  // heartbeats in a row at which Redis held another number
	busyHeartbeats int  // heartbeats in a row at which the writer was too busy to compare
}

// enqueue queues an item that may have something to write. A queued item keeps the higher
// of the two priorities.
func (w *bucketWriter) enqueue(it writable, p priority) {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := it.queueState()
	if w.closed {
		return
	}
	if s.queued {
		if p < s.priority {
			w.queue.move(it, s.priority, p)
			s.priority = p
		}
		return
	}
	w.enqueueLocked(it, p)
	if !w.running {
		w.running = true
		w.registry.workers.Go(w.run)
	}
}

// enqueueAgain queues an item that a batch did not write completely.
func (w *bucketWriter) enqueueAgain(it writable) {
	w.mu.Lock()
	p := it.queueState().priority
	w.mu.Unlock()
	w.enqueue(it, p)
}

// enqueueLocked queues an item that is not queued. w.mu is held.
func (w *bucketWriter) enqueueLocked(it writable, p priority) {
	s := it.queueState()
	s.queued, s.priority = true, p
	w.queue.push(it, p)
}

func (w *bucketWriter) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
}

// addStored counts what Redis came to hold of an incarnation, or lost. Earlier
// incarnations are not counted.
func (w *bucketWriter) addStored(inc string, by int64) {
	if inc != w.registry.cfg.Incarnation() {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.storedOf != inc {
		w.storedOf, w.stored = inc, 0
	}
	w.stored += by
	w.changes++
}

// waitLimit returns the longest time to wait for a write. It is short after batches have
// failed for a while, because the answer is known then.
func (w *bucketWriter) waitLimit() time.Duration {
	if w.isDown() {
		return downWaitLimit
	}
	return answerTimeout
}

// isDown reports whether batches have failed for a while.
func (w *bucketWriter) isDown() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.failingSince.IsZero() && time.Since(w.failingSince) > downAfter
}

// Away reports whether the writes of a bucket have failed for a while.
func (r *Registry) Away(bucket int) bool { return r.writers[bucket].isDown() }

// unavailable returns the error for callers that give up waiting. It wraps the reason
// that Redis or the network reported.
func (w *bucketWriter) unavailable() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.failure != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, w.failure)
	}
	return ErrUnavailable
}

// noteFailure notes why a batch failed. A timeout is not kept as the reason: callers
// would take it for the end of their own context.
func (w *bucketWriter) noteFailure(err error) {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || !errors.Is(err, store.ErrUnavailable) {
		err = nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failure = err
}

func (w *bucketWriter) unwritten() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.queue.n + w.takenOps
}

const (
	// After downAfter of failures Redis counts as away, and callers wait no longer than
	// downWaitLimit.
	downAfter     = time.Second
	downWaitLimit = 100 * time.Millisecond
)

// A batch that is not answered in time is sent again over another connection, so that a
// packet lost in the network does not delay all refreshes. A late batch is recognised by
// its number. Later attempts get more time in case Redis itself is slow.
const (
	firstLimit = 600 * time.Millisecond
	lastLimit  = 2 * time.Second // the store gives up earlier
)

// While Redis answers nothing at all, attempts are short, so that one begins soon after
// Redis answers again (see maxBackoff). But Redis may also be so slow that each answer
// comes too late and is not seen. So the attempts after maxSilent short ones get more
// time.
const (
	silentLimit = 350 * time.Millisecond
	maxSilent   = 8
)

// nextLimit returns the time limit of the attempt after one that began at the given time
// and timed out. silent is the number of short attempts in a row.
func (w *bucketWriter) nextLimit(limit time.Duration, silent int, began time.Time) (time.Duration, int) {
	if answered := w.registry.cfg.Answered; answered != nil && silent < maxSilent && answered(w.bucket).Before(began) {
		return silentLimit, silent + 1
	}
	return min(2*max(limit, firstLimit), lastLimit), silent
}

// retry puts a batch with an unknown outcome back into the queue. Its ops are made again
// from the state of their items.
func (w *bucketWriter) retry(b *batch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.takenOps -= len(b.ops)
	if w.failingSince.IsZero() {
		w.failingSince = time.Now()
	}
	w.requeue(b)
}

// requeue puts the items of a batch at the front of the queue. An item that was queued in
// the time between keeps the higher of the two priorities. w.mu is held.
func (w *bucketWriter) requeue(b *batch) {
	back := make([]writable, 0, len(b.items))
	for _, it := range b.items {
		switch s := it.queueState(); {
		case !s.queued:
			s.queued = true
			back = append(back, it)
		case s.takenAs < s.priority:
			w.queue.move(it, s.priority, s.takenAs)
			s.priority = s.takenAs
		}
	}
	w.queue.putBack(back)
}

// sweepEvery is the interval at which ended items are dropped while Redis is away.
const sweepEvery = time.Second

// sweep drops ended items from the queue. Otherwise clients that come and go while Redis
// is away would fill the memory.
func (w *bucketWriter) sweep() {
	if time.Since(w.sweptAt) < sweepEvery {
		return // it looks at every queued item
	}
	w.sweptAt = time.Now()
	w.mu.Lock()
	queue := w.queue.clear()
	for _, it := range queue {
		it.queueState().queued = false
	}
	w.mu.Unlock()
	for _, it := range queue {
		if it.pending() {
			w.enqueueAgain(it)
		}
	}
}

func (w *bucketWriter) noteConfirmed(inc string, number uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.confirmedOf, w.confirmed = inc, number
}
