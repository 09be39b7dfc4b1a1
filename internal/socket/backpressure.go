package socket

import (
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/clock"
)

// stopLimit is the longest time for which the reader waits for space without reading.
// Then the connection is closed. Its commands have made no progress for that time, and a
// peer that has gone would not be noticed.
const stopLimit = 2 * time.Minute

// awaitBytes makes the reader wait until there is space for a command of that cost, see
// Config.QueueBytes. It returns false if the connection ends. The caller holds mu, which
// is released during the wait.
func (s *Socket) awaitBytes(cost int) bool {
	if s.fits(cost) {
		return s.ending == nil
	}
	s.stats().paused.Add(1)
	at := int64(s.offset(time.Now()))
	s.stoppedAt.Store(at)
	overdue := new(clock.Timer)
	s.cfg.Wheel.Schedule(overdue, stopLimit, func() { s.endStopped(at) })
	for !s.fits(cost) {
		sc := s.commands
		if sc.space == nil {
			sc.space = make(chan struct{})
		}
		space := sc.space
		s.mu.Unlock()
		<-space
		s.assumeAlive()
		s.mu.Lock()
	}
	s.stoppedAt.Store(0)
	s.cfg.Wheel.Cancel(overdue)
	s.latencyAt = 0 // the response is unread: its time would include the wait
	return s.ending == nil
}

// fits reports whether the reader need not wait: there is space for the command, or the
// connection ends. The caller holds mu.
func (s *Socket) fits(cost int) bool {
	limit, sc := s.cfg.QueueBytes, s.commands
	return s.ending != nil || limit <= 0 || sc == nil || sc.bytes == 0 || sc.bytes+cost <= limit
}

// assumeAlive records a sign of life while the reader waits, because frames of the peer
// may be unread.
func (s *Socket) assumeAlive() {
	if s.stoppedAt.Load() == 0 || s.closed.Load() {
		return
	}
	now := time.Now()
	s.seen.Store(int64(s.offset(now)))
	s.handler.Seen(now)
}

// endStopped ends the connection if the reader has waited since the given time.
func (s *Socket) endStopped(since int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stoppedAt.Load() == since {
		s.endLocked(&End{Cause: CauseSlow, Code: websocket.CloseTryAgainLater, Reason: "commands wait for too long"})
	}
}
