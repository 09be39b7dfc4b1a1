package local

import (
	"time"

	"github.com/meshpresence/mesh/internal/clock"
)

const (
	// paceStep is the step of the wheel for states that wait for their interval. The
	// wheel stands still while no state waits.
	paceStep = 5 * time.Millisecond
	// paceGrid is the coarsest grid of the times at which states are due.
	paceGrid = 50 * time.Millisecond
)

// pace is the pacing of an entry with a state interval.
type pace struct {
	began bool          // a write of a state has begun
	sent  uint64        // the newest version of which a write has begun
	last  time.Duration // when that was; since Registry.madeAt
	timer clock.Timer   // fires when the waiting state is due
}

// setPaced makes s the newest state. s supersedes the state before it unless that one may
// have reached Redis; in that case s waits for the interval. setPaced reports whether s
// supersedes it. Conn.mu is held.
func (e *entry) setPaced(s state) (superseded bool) {
	before := e.state
	switch {
	case e.stateWritten >= before.version:
		s.paced = !s.immediate && e.untilDue() > 0
	case e.queue != nil && e.queue.began && before.version <= e.queue.sent:
		// If Redis does not have it, it is written once more, unless s is due by then.
		e.queue.older = append(e.queue.older[:0], before)
		s.paced = !s.immediate && e.untilDue() > 0
	default:
		s.paced = before.paced && !s.immediate
		if superseded = before.rev > 0; superseded {
			e.c.registry.stats.superseded.Add(1)
		}
	}
	e.state = s
	e.rev++
	if !s.paced {
		e.writer.enqueue(e, asked)
	} else if !before.paced {
		e.armPace()
	}
	return superseded
}

// acceptPaced returns the Write of a state that waits for its interval. Its caller does
// not wait for Redis. If Redis is away, the Write returns that error.
func (e *entry) acceptPaced() Write {
	e.state.awaited = false
	w := Write{e: e, waitTicket: e.c.registry.ticket()}
	if e.writer.isDown() {
		w.done <- e.writer.unavailable()
	} else {
		w.done <- nil
	}
	return w
}

// noteSent notes that the write of a state begins.
func (e *entry) noteSent(version uint64) {
	if e.interval == 0 {
		return
	}
	if e.queue == nil {
		e.queue = new(stateQueue)
	}
	e.queue.began, e.queue.sent, e.queue.last = true, max(e.queue.sent, version), time.Since(e.c.registry.madeAt)
}

// untilDue returns the time until the next state is due. It is not positive if the state
// is due now.
func (e *entry) untilDue() time.Duration {
	if e.queue == nil || !e.queue.began {
		return 0
	}
	return e.queue.last + e.interval - time.Since(e.c.registry.madeAt)
}

// armPace arms the timer of the waiting state. Its time is on a grid, so that the states
// of members that move at the same time are written together.
func (e *entry) armPace() {
	wheel := e.c.registry.pacing()
	if wheel == nil {
		return // the registry has stopped
	}
	since := time.Since(e.c.registry.madeAt)
	grid := max(min(e.interval/8, paceGrid).Truncate(paceStep), paceStep)
	due := (since + e.untilDue() + grid - 1).Truncate(grid)
	wheel.Schedule(&e.queue.timer, due-since, e.intervalOver)
}

// intervalOver runs on the wheel.
func (e *entry) intervalOver() {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	e.endPacing()
}

// endPacing queues the waiting state if it is due. Conn.mu is held.
func (e *entry) endPacing() {
	if !e.state.paced {
		return
	}
	if e.interval > 0 && e.untilDue() > 0 { // the state before it was written once more
		e.armPace()
		return
	}
	e.state.paced = false
	e.writer.enqueue(e, asked)
}

// setInterval changes the interval. Conn.mu is held.
func (e *entry) setInterval(interval time.Duration) {
	if interval == e.interval || !e.wanted() {
		return
	}
	e.interval = interval
	e.endPacing()
}

func (e *entry) stopPace() {
	if e.queue != nil && e.queue.began {
		e.c.registry.mu.RLock()
		wheel := e.c.registry.paceWheel
		e.c.registry.mu.RUnlock()
		if wheel != nil {
			wheel.Cancel(&e.queue.timer)
		}
	}
}

// pacing returns the wheel for states that wait for their interval, and starts it at the
// first call. It returns nil if the registry has stopped.
func (r *Registry) pacing() *clock.Wheel {
	r.mu.RLock()
	wheel, closed := r.paceWheel, r.closed
	r.mu.RUnlock()
	if wheel != nil || closed {
		return wheel
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paceWheel == nil && !r.closed {
		r.paceWheel = clock.NewWheel(paceStep)
		r.paceWheel.Start()
	}
	return r.paceWheel
}
