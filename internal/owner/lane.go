package owner

import (
	"context"
	"errors"
	"fmt"
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
	// place returns the room that the item is of, or the connection.
	place() place
	// mark returns what the lane keeps of the item.
	mark() *mark
	// pending reports whether there is something to write, or to wait for.
	// What is over without a word to Redis is let go.
	pending() bool
}

// mark is what a lane keeps of an item.
type mark struct {
	queued  bool
	urgency urgency // with which it waits, or was taken the last time
	stay    uint32  // counts its stays in a line
	number  uint64  // of the last batch that it was taken for; of the lane's run alone
	taken   urgency // with which it was taken for that; of the lane's run alone
}

// lane writes the items of one bucket, one batch at a time (flight.go): callers
// that wait together go together. Because only one batch is under way and each
// has a higher number than the one before, Redis can tell a late one and drop it.
type lane struct {
	o      *Owner
	bucket int
	swept  time.Time // when items that are over were last let go; of the lane's run alone

	mu      sync.Mutex // guards the fields below, and mark but number
	queue   queue
	running bool
	closed  bool
	taken   int // ops of the batches that have been taken and are not over
	number  uint64
	moved   time.Time // when the last batch came back
	down    time.Time // since when batches fail; zero: they do not
	failure error     // why the last batch failed, if Redis or the network said so; nil while they do not fail
	// settled is the number of the newest batch that is known to have run, and
	// settledOf its incarnation. A Redis that has not seen it takes no later one.
	settled   uint64
	settledOf string

	// How many entries and connections Redis is known to hold of heldOf.
	held    int64
	heldOf  string
	changes uint64 // of held

	// Guarded by Owner.auditing.
	troubled bool // since trouble was said to be its entries have not been compared
	deaf     bool // nor have its connections' metadata
	differs  int  // heartbeats in a row at which Redis held another number
	busy     int  // heartbeats in a row at which there was no comparing
}

// offer queues an item that may have something to write. One that waits already
// keeps the higher of the two urgencies.
func (l *lane) offer(it item, u urgency) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := it.mark()
	if l.closed {
		return
	}
	if m.queued {
		if u < m.urgency {
			l.queue.move(it, m.urgency, u)
			m.urgency = u
		}
		return
	}
	l.enqueue(it, u)
	if !l.running {
		l.running = true
		l.o.workers.Go(l.run)
	}
}

// offerAgain queues an item of which a batch did not write everything.
func (l *lane) offerAgain(it item) {
	l.mu.Lock()
	u := it.mark().urgency
	l.mu.Unlock()
	l.offer(it, u)
}

// enqueue puts an item that is not queued into the queue. l.mu is held.
func (l *lane) enqueue(it item, u urgency) {
	m := it.mark()
	m.queued, m.urgency = true, u
	l.queue.push(it, u)
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
	l.changes++
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

// unavailable returns the error for callers that wait no longer: why batches
// fail, if there was an answer.
func (l *lane) unavailable() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failure != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, l.failure)
	}
	return ErrUnavailable
}

// failed notes why a batch failed. A missing answer is not reported as a reason:
// callers must not take it for the end of their own context.
func (l *lane) failed(err error) {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || !errors.Is(err, store.ErrUnavailable) {
		err = nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failure = err
}

func (l *lane) waiting() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.queue.n + l.taken
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

// While Redis answers nothing at all, attempts are short. One must begin soon
// after Redis answers again, for the same reason as maxBackoff. Redis may also be
// so slow that every answer comes too late and is not seen. So the attempts after
// maxSilent short ones are given longer.
const (
	silentLimit = 350 * time.Millisecond
	maxSilent   = 8
)

// nextLimit returns how long the attempt after one may take that began at the
// given time and was not answered, and how many in a row have met silence.
func (l *lane) nextLimit(limit time.Duration, silent int, began time.Time) (time.Duration, int) {
	if answered := l.o.cfg.Answered; answered != nil && silent < maxSilent && answered(l.bucket).Before(began) {
		return silentLimit, silent + 1
	}
	return min(2*max(limit, firstLimit), lastLimit), silent
}

// again puts a batch whose outcome is unknown back, to be decided anew.
func (l *lane) again(b *batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.taken -= len(b.ops)
	if l.down.IsZero() {
		l.down = time.Now()
	}
	l.back(b)
}

// back puts the items of a batch in front of the queue. One that was offered while
// the batch flew keeps the higher of the two urgencies. l.mu is held.
func (l *lane) back(b *batch) {
	back := make([]item, 0, len(b.items))
	for _, it := range b.items {
		switch m := it.mark(); {
		case !m.queued:
			m.queued = true
			back = append(back, it)
		case m.taken < m.urgency:
			l.queue.move(it, m.urgency, m.taken)
			m.urgency = m.taken
		}
	}
	l.queue.back(back)
}

// sweepEvery is the interval at which items that are over are removed while Redis is away.
const sweepEvery = time.Second

// sweep lets go of queued items that are over: while Redis is away, clients
// that come and go must not fill the memory.
func (l *lane) sweep() {
	if time.Since(l.swept) < sweepEvery {
		return // it looks at everything that waits
	}
	l.swept = time.Now()
	l.mu.Lock()
	queue := l.queue.clear()
	for _, it := range queue {
		it.mark().queued = false
	}
	l.mu.Unlock()
	for _, it := range queue {
		if it.pending() {
			l.offerAgain(it)
		}
	}
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
