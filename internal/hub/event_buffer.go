package hub

import (
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// Bounds of the buffered events of one mirror.
const (
	maxEarly        = 256
	maxPending      = 8192
	maxWaitingBytes = 4 << 20
)

// bufferedEvent is an event that waits.
type bufferedEvent struct {
	ev   *store.Event
	size int       // of the message
	at   time.Time // when it arrived
}

// newBufferedEvent makes a buffered event of a copy of ev. Most events never wait
// and need no memory of their own.
func newBufferedEvent(ev *store.Event, size int, now time.Time) bufferedEvent {
	kept := *ev
	return bufferedEvent{ev: &kept, size: size, at: now}
}

// eventBuffer is a bounded list of buffered events.
type eventBuffer struct {
	list  []bufferedEvent
	bytes int
}

// add adds an event. It returns false if the buffer is full.
func (b *eventBuffer) add(e bufferedEvent, limit int) bool {
	if len(b.list) >= limit || b.bytes+e.size > maxWaitingBytes {
		return false
	}
	b.list = append(b.list, e)
	b.bytes += e.size
	return true
}

// takeAll empties the buffer and returns its events.
func (b *eventBuffer) takeAll() []bufferedEvent {
	list := b.list
	b.clear()
	return list
}

// clear drops all events.
func (b *eventBuffer) clear() { *b = eventBuffer{} }

// take removes and returns the first event with that seq, or nil if there is none.
func (b *eventBuffer) take(seq uint64) *bufferedEvent {
	for i := range b.list {
		if b.list[i].ev.Seq != seq {
			continue
		}
		found := b.list[i]
		b.list = slices.Delete(b.list, i, i+1)
		b.bytes -= found.size
		return &found
	}
	return nil
}

// drop removes the first n events.
func (b *eventBuffer) drop(n int) {
	for i := range n {
		b.bytes -= b.list[i].size
	}
	b.list = slices.Delete(b.list, 0, n)
}

// has reports whether an event with that seq is in the buffer.
func (b *eventBuffer) has(seq uint64) bool {
	for i := range b.list {
		if b.list[i].ev.Seq == seq {
			return true
		}
	}
	return false
}

// oldest returns the arrival time of the oldest event, or the zero time if the
// buffer is empty. Events are added in the order of their arrival and taken in any
// order, so the first one is the oldest.
func (b *eventBuffer) oldest() time.Time {
	if len(b.list) == 0 {
		return time.Time{}
	}
	return b.list[0].at
}
