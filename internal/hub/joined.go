package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// After maxTimeouts joins in a row that waited for their events in vain, joins do not
// wait for skipWaitFor. Otherwise, while events are late, a client that joins many
// rooms one after the other would wait for each.
const skipWaitFor, maxTimeouts = 2 * deliveryDelay, 2

// Joined returns the members of the room for a connection of this server that has
// just joined it. at is the position of the room right after the join, and total its
// number of members then. The listing shows the room at that position or later. It
// always contains the connection itself, even if it is bounded.
//
// Joined returns false if the room is not mirrored, if something may have been
// missed, or if the connection is no member (it has left since, or Redis went back
// to an older copy). The caller must then ask Redis. Joined waits up to 250 ms for
// events that are on their way.
func (h *Hub) Joined(room, conn string, at store.Position, total int) (Listing, bool) {
	m, watched := h.find(room)
	switch {
	case m != nil:
		m.lingerForJoin(watched, total)
		return m.awaitPosition(conn, at)
	case h.shouldMirror(room, total):
		m, err := h.acquire(room)
		if err != nil {
			break // the hub stops
		}
		m.lingerForJoin(false, total)
		h.release(m)
	}
	return Listing{}, false
}

// find returns the room's mirror, and whether the room is watched.
func (h *Hub) find(room string) (m *mirror, watched bool) {
	h.mu.RLock()
	defer h.mu.RUnlock()
	m = h.mirrors[room]
	return m, m != nil && m.refs > 0
}

// shouldMirror counts a join and reports whether its room is to be mirrored.
func (h *Hub) shouldMirror(room string, total int) bool {
	if total < minMembers || !h.joins.fits(0, total) {
		return false
	}
	listed := total
	if h.cfg.Listed > 0 {
		listed = min(listed, h.cfg.Listed)
	}
	return h.joins.note(room, time.Now())*(listed+callCost) >= total
}

// lingerForJoin restarts the mirror's linger because of a join. A watched mirror
// does not need it.
func (m *mirror) lingerForJoin(watched bool, total int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
	case watched:
		m.setShare(0)
	case m.hub.joins.fits(m.kept, total):
		m.setShare(shareOf(total))
		m.lastJoin.Store(int64(max(time.Since(m.hub.madeAt), 1)))
	}
}

// setShare sets the mirror's share of recentJoins.kept. The caller holds m.mu.
func (m *mirror) setShare(n int) {
	m.hub.joins.kept.Add(int64(n - m.kept))
	m.kept = n
}

// lingerUntil returns the time until which joins keep the mirror, or the zero time.
func (m *mirror) lingerUntil() time.Time {
	at := m.lastJoin.Load()
	if at == 0 {
		return time.Time{}
	}
	return m.hub.madeAt.Add(time.Duration(at) + m.hub.linger())
}

// awaitPosition waits until the mirror has reached a position, and returns the
// listing for a connection.
func (m *mirror) awaitPosition(conn string, at store.Position) (Listing, bool) {
	var timeout *time.Timer
	for {
		m.mu.Lock()
		if m.closed || m.stale() || at.None() {
			m.mu.Unlock()
			return Listing{}, false
		}
		if pos := &m.past.pos; pos.Epoch == at.Epoch && pos.Seq >= at.Seq {
			isMember, l := m.members.get(conn) != nil, Listing{}
			if isMember {
				l = m.listing(false, conn)
			}
			m.mu.Unlock()
			if timeout != nil {
				m.hub.joins.timeouts.Store(0)
			}
			return l, isMember
		}
		if timeout == nil && m.hub.skipsWait() {
			m.mu.Unlock()
			return Listing{}, false
		}
		reached := m.seqWaiters.add(at.Seq)
		m.mu.Unlock()
		if timeout == nil {
			timeout = time.NewTimer(deliveryDelay)
			defer timeout.Stop()
		}
		select {
		case <-reached:
		case <-timeout.C:
			m.hub.waitTimedOut()
			m.checkExpected()
			return Listing{}, false
		case <-m.hub.ctx.Done():
			return Listing{}, false
		}
	}
}

// waitTimedOut counts a join whose event did not arrive in time.
func (h *Hub) waitTimedOut() {
	h.joins.timedOutAt.Store(int64(time.Since(h.madeAt)))
	h.joins.timeouts.Add(1)
}

// skipsWait reports whether joins do not wait, because the last ones waited in vain.
func (h *Hub) skipsWait() bool {
	return h.joins.timeouts.Load() >= maxTimeouts &&
		time.Since(h.madeAt)-time.Duration(h.joins.timedOutAt.Load()) < skipWaitFor
}
