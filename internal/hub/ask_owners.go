package hub

import (
	"slices"
	"time"
)

// maxAskedConns bounds the members of one question.
const maxAskedConns = 256

// markAllUnconfirmed makes every member unconfirmed, for the full time.
func (m *mirror) markAllUnconfirmed(now time.Time) {
	for _, member := range m.members.list {
		m.markUnconfirmed(member.Conn, now)
	}
	m.unconfirmed.schedule()
}

// markUnconfirmed makes a member unconfirmed. The caller schedules the check.
func (m *mirror) markUnconfirmed(conn string, now time.Time) {
	m.unconfirmed.mark(conn, now, m.hub.cfg.UnconfirmedFor)
	m.hub.counters.unconfirmed.Add(1)
}

// extendUnconfirmed gives every unconfirmed member the full time again.
func (m *mirror) extendUnconfirmed(now time.Time) {
	m.unconfirmed.extend(now, m.hub.cfg.UnconfirmedFor)
}

// askOwners asks the owners of the unconfirmed members whether those have left. A
// snapshot of a Redis that lost writes does not show which missing members have
// left and which were lost. Without the question, a member that left while Redis
// was away would stay listed until its time is over.
func (m *mirror) askOwners(now time.Time) {
	if m.unconfirmed.empty() {
		return
	}
	m.unconfirmed.askAt = now.Add(askAfter)
	if m.hub.cfg.AskOwner == nil || !m.sub.confirmed { // without the listener no answer would arrive
		return
	}
	asked := make(map[string]time.Time, len(m.unconfirmed.until))
	owners := make(map[string][]string)
	for conn, until := range m.unconfirmed.until {
		// No server owns a kept place: only Redis knows about it.
		if member := m.members.get(conn); member != nil && !member.Disconnected() {
			asked[conn] = until
			owner := member.owner.Value()
			owners[owner] = append(owners[owner], conn)
		}
	}
	for owner, conns := range owners {
		for some := range slices.Chunk(conns, maxAskedConns) {
			m.hub.cfg.AskOwner(m.room, owner, some, func(left []string) { m.endUnconfirmed(left, asked) })
		}
	}
}

// endUnconfirmed removes unconfirmed members that have left according to their
// owners. A member whose time differs from the asked one stays: it may have been
// back since the question.
func (m *mirror) endUnconfirmed(left []string, asked map[string]time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	at := m.hub.cfg.Now()
	for _, conn := range left {
		until, ok := m.unconfirmed.has(conn)
		if !ok || !until.Equal(asked[conn]) {
			continue
		}
		m.unconfirmed.remove(conn)
		member := m.members.remove(conn)
		if member == nil {
			continue
		}
		m.hub.counters.leftUnconfirmed.Add(1)
		m.deliverLeave(member, member.endReason(), at, true)
	}
	m.unconfirmed.schedule()
	m.rearm()
	m.wakeWaiters()
}
