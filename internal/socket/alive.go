package socket

import (
	"fmt"
	"os"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/clock"
)

// armTimers starts the socket's timers. The caller holds mu.
func (s *Socket) armTimers() {
	s.armRegular(&s.pings, s.cfg.PingInterval, s.onPing)
	s.armRegular(&s.latencies, s.cfg.LatencyInterval, s.onLatency)
	s.armExtra(s.extraEvery)
}

// armRegular schedules fire for the next whole multiple of interval since the beginning.
// Counting from the beginning prevents delays from adding up. After the process was
// stopped for a while, missed intervals are not made up for. The caller holds mu.
func (s *Socket) armRegular(t *clock.Timer, interval time.Duration, fire func()) {
	if interval > 0 {
		s.cfg.Wheel.Schedule(t, interval-time.Since(s.begun)%interval, fire)
	}
}

var errStuck = fmt.Errorf("a write does not return: %w", os.ErrDeadlineExceeded)

// onPing checks for a sign of life of the peer, and pings it.
func (s *Socket) onPing() {
	s.assumeAlive()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return
	}
	// After a stall, frames may be unread and pings were sent late. A peer that seems
	// silent gets another interval.
	stalled := s.cfg.Wheel.LastStall().After(s.begun.Add(s.tickAt))
	s.tickAt = time.Since(s.begun)
	switch unanswered := s.pingAt > 0 && time.Duration(s.seen.Load()) < s.pingAt; {
	case !unanswered:
		s.missed = 0
	case !stalled:
		s.missed++
	}
	// A network connection of the app's own may ignore deadlines.
	if limit := s.cfg.WriteTimeout; s.writingAt > 0 && limit > 0 && s.tickAt-s.writingAt > limit+closeGrace {
		s.endLocked(&End{Cause: CauseStuck, Err: errStuck})
		return
	}
	if int(s.missed) > s.cfg.MaxMissedPongs {
		s.endLocked(&End{Cause: CauseSilent, Code: websocket.CloseInternalServerErr, Reason: "no sign of life"})
		return
	}
	s.request(duePing)
	s.armRegular(&s.pings, s.cfg.PingInterval, s.onPing)
}

// MinTTL sets the shortest TTL of the connection's rooms. The connection is then pinged
// whenever it has been silent for a third of that TTL, in addition to the regular pings.
// Zero means that none of its rooms has a TTL.
func (s *Socket) MinTTL(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	every := max(d/3, 0)
	if every == s.extraEvery {
		return
	}
	s.extraEvery = every
	if s.running && s.ending == nil {
		s.armExtra(every - min(s.silence(), every))
	}
}

// silence returns the time since the last frame.
func (s *Socket) silence() time.Duration {
	return time.Since(s.begun) - time.Duration(s.seen.Load())
}

// armExtra schedules the check for an extra ping. It does nothing if no room has a TTL or
// the regular pings are frequent enough. The caller holds mu.
func (s *Socket) armExtra(after time.Duration) {
	regular := s.cfg.PingInterval
	if s.extraEvery == 0 || regular > 0 && regular <= s.extraEvery {
		if s.extra != nil {
			s.cfg.Wheel.Cancel(s.extra)
		}
		return
	}
	if s.extra == nil {
		s.extra = new(clock.Timer)
	}
	s.cfg.Wheel.Schedule(s.extra, after, s.onExtra)
}

// onExtra pings if no frame has come for extraEvery.
func (s *Socket) onExtra() {
	s.assumeAlive()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil || s.extraEvery == 0 {
		return
	}
	if left := s.extraEvery - s.silence(); left > 0 {
		s.armExtra(left)
		return
	}
	s.request(dueExtraPing)
	s.armExtra(s.extraEvery)
}

// onLatency sends a latency request.
func (s *Socket) onLatency() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return
	}
	s.request(dueLatencyRequest)
	s.armRegular(&s.latencies, s.cfg.LatencyInterval, s.onLatency)
}

// latencyResponse sends the client its round trip time. The time counts from the start of
// writing the oldest request without a response. A response without a request is ignored.
func (s *Socket) latencyResponse(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.latencyAt == 0 {
		return
	}
	s.latency = max(s.offset(now)-s.latencyAt, 0)
	s.latencyAt = 0
	s.request(dueLatency)
}
