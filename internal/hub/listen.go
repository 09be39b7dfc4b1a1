package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// burstGap is the longest time between two resubscriptions of one burst.
const burstGap = time.Second

// burst is the last resubscription burst.
type burst struct {
	began, last time.Time
}

// HandleSubscribed is called when Redis has confirmed the subscription to a room's
// events. again says that it had been confirmed before, so that events may have
// been missed since.
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

// joinBurst returns the start of the present resubscription burst. The generation is
// asked for once per burst.
func (h *Hub) joinBurst(now time.Time) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Sub(h.burst.last) > burstGap {
		h.burst.began = now
	}
	h.burst.last = now
	return h.burst.began
}

// resubscribed makes the mirror follow its events again.
func (m *mirror) resubscribed(now, since time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.sub.confirmed = true
	m.mayHaveMissed(now)
	m.read.failures, m.read.retryAt = 0, time.Time{}
	if m.read.want == CauseVerify {
		m.read.want = causeNone
	}
	// The owners may have been disconnected as well. This covers the time until now, in
	// which Redis may have been away.
	m.extendUnconfirmed(now)
	m.read.outage = false
	if m.read.want != causeNone {
		m.read.needed = since
		if !m.live {
			m.read.needed = time.Time{} // there are no members that could be lost
		}
		m.scheduleRead(now)
	} else {
		m.hub.toCompare.add(m.room, since)
	}
	m.rearm()
}

// mayHaveMissed notes that events may have been missed just now.
func (m *mirror) mayHaveMissed(now time.Time) {
	m.sub.serial++
	m.sub.compared = false
	m.sub.checkpoint = checkpoint{}
	switch m.read.stage {
	case stageReading:
		m.read.spoiled = true
		m.pending.clear()
		m.read.require(CauseResubscribed, now)
	case stageMerging:
		m.read.require(CauseResubscribed, now)
		m.stopReading(now)
	}
}

// HandleDisconnect is called when the listener's connection has ended. Until their
// subscriptions are confirmed again and they have been compared with Redis, mirrors
// show their last contents, as stale.
func (h *Hub) HandleDisconnect() {
	now := time.Now()
	h.joinBurst(now)
	h.counters.listenerDisconnects.Add(1)
	for _, m := range h.allMirrors() {
		m.disconnected(now)
	}
}

// disconnected notes that no events arrive.
func (m *mirror) disconnected(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.sub.confirmed = false
	m.mayHaveMissed(now)
	if len(m.early.list) > 0 {
		m.early.clear()
		m.read.require(CauseGap, now)
	}
	m.read.retryAt = time.Time{}
	m.rearm()
	m.wakeWaiters()
}

// HandleRedisAway is called if Redis did not answer this server. It probably does
// not answer owners either. So unconfirmed members get their full time when Redis is
// back, and every room is compared then.
func (h *Hub) HandleRedisAway() {
	for _, m := range h.allMirrors() {
		m.mu.Lock()
		m.read.outage = m.read.outage || !m.unconfirmed.empty()
		m.mu.Unlock()
	}
	h.Resync()
}

// Resync compares every room with Redis, because anything may have been missed.
func (h *Hub) Resync() {
	now := time.Now()
	for _, m := range h.allMirrors() {
		m.mu.Lock()
		if !m.closed && m.sub.confirmed {
			m.mayHaveMissed(now)
			m.scheduleRead(now)
			m.hub.toCompare.add(m.room, now)
			m.rearm()
		}
		m.mu.Unlock()
	}
}

// HandleEvent handles one message of a room's channel.
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
	if !h.cfg.CountUsers {
		ev.User = ""
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	if err != nil {
		h.counters.unreadable.Add(1)
		h.warn("mesh: cannot read an event", "room", room, "error", err)
		m.handleUnreadable(now)
		return
	}
	m.receive(&ev, len(payload), now)
}

// handleUnreadable handles an event that could not be decoded.
func (m *mirror) handleUnreadable(now time.Time) {
	switch {
	case m.read.stage == stageReading:
		m.read.spoiled = true
		m.read.require(CauseUnreadable, now)
	case m.read.stage == stageMerging:
		m.discard(now)
	case m.live:
		m.fetchSnapshot(CauseUnreadable, now)
	}
	m.rearm()
}

// Expect tells the hub that the room has reached a position with a write of this
// server. Views and new watchers wait a short time for the mirror to reach it, too.
func (h *Hub) Expect(room string, p store.Position) {
	m := h.mirror(room)
	if m == nil || p.None() {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := &m.sub.expected
	if e.pos.Epoch == p.Epoch && e.pos.Seq >= p.Seq {
		return
	}
	*e = expectation{pos: p, until: time.Now().Add(deliveryDelay)}
}
