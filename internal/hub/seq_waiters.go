package hub

import (
	"math"
	"slices"
)

// seqWaiters are the joins that wait until a mirror reaches a position, ordered by
// seq. A waiter that has given up stays in the list until the mirror reaches its
// seq or all waiters are woken. Both happen soon.
type seqWaiters []seqWaiter

// seqWaiter waits for one seq.
type seqWaiter struct {
	seq     uint64
	reached chan struct{} // closed by wake
}

// add returns a channel that is closed when the mirror has reached seq, or when
// something happens that the waiter must look at.
func (w *seqWaiters) add(seq uint64) <-chan struct{} {
	reached, i := make(chan struct{}), len(*w)
	for i > 0 && (*w)[i-1].seq > seq { // short: joins arrive almost in order
		i--
	}
	*w = slices.Insert(*w, i, seqWaiter{seq, reached})
	return reached
}

// wake wakes the waiters for a seq up to the given one, and no others: if many
// connections join at once, each waits for its own event.
func (w *seqWaiters) wake(seq uint64) {
	list := *w
	for len(list) > 0 && list[0].seq <= seq {
		close(list[0].reached)
		list[0] = seqWaiter{}
		list = list[1:]
	}
	if *w = list; len(list) == 0 {
		*w = nil
	}
}

// wakeAll wakes all waiters.
func (w *seqWaiters) wakeAll() { w.wake(math.MaxUint64) }
