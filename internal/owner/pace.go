package owner

import (
	"time"

	"github.com/meshpresence/mesh/internal/clock"
)

const (
	// paceStep is how fine the clock is of states that wait for their interval.
	// It does not tick while none does.
	paceStep = 5 * time.Millisecond
	// paceGrid is how coarse the times are, at most, at which their waiting ends.
	paceGrid = 50 * time.Millisecond
)

// pace is what an entry with an interval between its states remembers.
type pace struct {
	began bool          // a state was begun to be written
	sent  uint64        // the newest such
	last  time.Duration // when that was, the last time; since Owner.born
	timer clock.Timer   // ends the waiting of a state
}

// setPaced puts s in the place of the newest state, which it supersedes unless
// that may have reached Redis: then it waits until the interval is over.
// Conn.mu is held.
func (e *entry) setPaced(s state) {
	before := e.state
	switch {
	case e.stateWritten >= before.version:
		s.held = !s.now && e.untilDue() > 0
	case e.flow != nil && e.flow.began && before.version <= e.flow.sent:
		// Should Redis not have it, it is written once more, unless s is due by
		// then.
		e.flow.older = append(e.flow.older[:0], before)
		s.held = !s.now && e.untilDue() > 0
	default:
		s.held = before.held && !s.now
		if before.rev > 0 {
			e.c.o.stats.superseded.Add(1)
		}
	}
	e.state = s
	e.rev++
	if !s.held {
		e.lane.offer(e, asked)
	} else if !before.held {
		e.armPace()
	}
}

// taken answers who has set a state that waits for its interval: that it has
// been taken is all there is to wait for. Where Redis is away he hears it.
func (e *entry) taken() Write {
	e.state.awaited = false
	w := Write{e: e, ticket: e.c.o.ticket()}
	if e.lane.away() {
		w.done <- e.lane.unavailable()
	} else {
		w.done <- nil
	}
	return w
}

// noteSent: a state is being written.
func (e *entry) noteSent(version uint64) {
	if e.interval == 0 {
		return
	}
	if e.flow == nil {
		e.flow = new(flow)
	}
	e.flow.began, e.flow.sent, e.flow.last = true, max(e.flow.sent, version), time.Since(e.c.o.born)
}

// untilDue is how long the next state has to wait; not positive: it need not.
func (e *entry) untilDue() time.Duration {
	if e.flow == nil || !e.flow.began {
		return 0
	}
	return e.flow.last + e.interval - time.Since(e.c.o.born)
}

// armPace ends the waiting of the newest state when the interval is over, on a
// grid, so that members who move at the same time are told of together.
func (e *entry) armPace() {
	wheel := e.c.o.pacing()
	if wheel == nil {
		return // the owner has stopped
	}
	since := time.Since(e.c.o.born)
	grid := max(min(e.interval/8, paceGrid).Truncate(paceStep), paceStep)
	due := (since + e.untilDue() + grid - 1).Truncate(grid)
	wheel.Schedule(&e.flow.timer, due-since, e.intervalOver)
}

// intervalOver runs on the clock.
func (e *entry) intervalOver() {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.release()
}

// release ends the waiting of the newest state if it has waited for long
// enough. Conn.mu is held.
func (e *entry) release() {
	if !e.state.held {
		return
	}
	if e.interval > 0 && e.untilDue() > 0 { // what was before it has been written once more
		e.armPace()
		return
	}
	e.state.held = false
	e.lane.offer(e, asked)
}

// repace takes another interval. Conn.mu is held.
func (e *entry) repace(interval time.Duration) {
	if interval == e.interval || !e.want {
		return
	}
	e.interval = interval
	e.release()
}

func (e *entry) stopPace() {
	if e.flow != nil && e.flow.began {
		e.c.o.mu.RLock()
		wheel := e.c.o.pace
		e.c.o.mu.RUnlock()
		if wheel != nil {
			wheel.Cancel(&e.flow.timer)
		}
	}
}

// pacing returns the clock of states that wait for their interval, which the
// first of them starts; nil: the owner has stopped.
func (o *Owner) pacing() *clock.Wheel {
	o.mu.RLock()
	wheel, closed := o.pace, o.closed
	o.mu.RUnlock()
	if wheel != nil || closed {
		return wheel
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.pace == nil && !o.closed {
		o.pace = clock.NewWheel(paceStep)
		o.pace.Start()
	}
	return o.pace
}
