package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// burstGap is how long after one resubscription another one belongs to the
// same burst.
const burstGap = time.Second

// burst is a time in which subscriptions were lost and confirmed again.
type burst struct {
	began, last time.Time
}

// HandleSubscribed is called when Redis has confirmed the subscription to a
// room's events; again says that it had been confirmed before, so that events
// may have been lost in between.
func (h *Hub) HandleSubscribed(room string, again bool) {
	m := h.mirror(room)
	if m == nil {
		return
	}
	now := time.Now()
	since := now
	if again {
		since = h.joinBurst(now)
	}
	m.resubscribed(now, since)
}

// joinBurst returns when the burst of resubscriptions began that is going on.
// What Redis is gets asked once per burst.
func (h *Hub) joinBurst(now time.Time) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Sub(h.burst.last) > burstGap {
		h.burst.began = now
	}
	h.burst.last = now
	return h.burst.began
}

// resubscribed lets the mirror follow its events again.
func (m *mirror) resubscribed(now, since time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.subscribed = true
	m.missedSome(now)
	m.failed, m.retryAt = 0, time.Time{}
	if m.want == CauseVerify {
		m.want = causeNone
	}
	// Owners may have been cut off as well.
	m.putOffDoubts(now)
	if m.want != causeNone {
		m.needed = since
		if !m.live {
			m.needed = time.Time{} // there is nobody to tell a leave of
		}
		m.request(now)
	} else {
		m.hub.suspects.add(m, since)
	}
	m.rearm()
}

// missedSome notes that events may have been lost just now.
func (m *mirror) missedSome(now time.Time) {
	m.serial++
	m.compared = false
	m.checkpoint = checkpoint{}
	switch m.stage {
	case reading:
		m.spoiled = true
		m.pending.clear()
		m.worsen(CauseResubscribed, now)
	case folding:
		m.worsen(CauseResubscribed, now)
		m.stopReading(now)
	}
}

// HandleLost is called when the connection that carries events is gone. Until
// their subscriptions are confirmed again and they were compared with Redis,
// mirrors show what they knew, as stale.
func (h *Hub) HandleLost() {
	now := time.Now()
	h.joinBurst(now)
	h.counters.lost.Add(1)
	for _, m := range h.all() {
		m.cutOff(now)
	}
}

// cutOff notes that no events come any more.
func (m *mirror) cutOff(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.subscribed = false
	m.missedSome(now)
	if len(m.held.list) > 0 {
		m.held.clear()
		m.worsen(CauseGap, now)
	}
	m.retryAt = time.Time{}
	m.rearm()
	m.wakeWaiters()
}

// HandleAway is called where Redis did not answer this server. It does not
// answer owners either: members in doubt get their full time from when it is
// back, and everything is compared then.
func (h *Hub) HandleAway() {
	for _, m := range h.all() {
		m.mu.Lock()
		m.outage = m.outage || m.doubts != nil
		m.mu.Unlock()
	}
	h.Resync()
}

// Resync compares every watched room with Redis, because anything may have
// been missed.
func (h *Hub) Resync() {
	now := time.Now()
	for _, m := range h.all() {
		m.mu.Lock()
		if !m.closed && m.subscribed {
			m.missedSome(now)
			m.request(now)
			m.hub.suspects.add(m, now)
			m.rearm()
		}
		m.mu.Unlock()
	}
}

// HandleEvent takes one message of a room's channel.
func (h *Hub) HandleEvent(room, payload string) {
	m := h.mirror(room)
	if h.ctx.Err() != nil {
		return
	}
	if m == nil {
		h.counters.strays.Add(1)
		return
	}
	now := time.Now()
	ev, err := store.DecodeEvent(payload)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	if err != nil {
		h.counters.garbled.Add(1)
		h.warn("mesh: cannot read an event", "room", room, "error", err)
		m.garbled(now)
		return
	}
	m.receive(&ev, len(payload), now)
}

// garbled makes good for an event that could not be read.
func (m *mirror) garbled(now time.Time) {
	switch {
	case m.stage == reading:
		m.spoiled = true
		m.worsen(CauseGarbled, now)
	case m.stage == folding:
		m.discard(now)
	case m.live:
		m.fetch(CauseGarbled, now)
	}
	m.rearm()
}

// Expect tells the hub that the room has reached a position, because this
// server wrote it. Views and new watchers wait for the mirror to come there
// too, but not long.
func (h *Hub) Expect(room string, p store.Position) {
	m := h.mirror(room)
	if m == nil || p.None() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := &m.expected
	if e.pos.Epoch == p.Epoch && e.pos.Seq >= p.Seq {
		return
	}
	*e = expectation{pos: p, until: time.Now().Add(inFlight)}
}
