package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// receive takes one event of the room, in the order in which they came. size is
// that of its message. It copies what it keeps.
func (m *mirror) receive(ev *store.Event, size int, now time.Time) {
	if m.stage == reading || m.stage == folding {
		m.putAside(newParcel(ev, size, now), now)
		return
	}
	if !m.live || m.want > CauseVerify {
		// The snapshot will be read later, and contains it.
		return
	}
	pos := &m.past.pos
	switch {
	case follows(*pos, ev) && ev.Epoch == pos.Epoch:
		m.apply(ev, now)
		m.unhold(now)
	case begins(ev) && ev.Epoch != pos.Epoch && !m.past.left(ev.Epoch):
		m.adopt(ev, now)
	case ev.Epoch != pos.Epoch:
		// Somewhere in another epoch, or back in one that we had left. There
		// is no waiting for the first event of it: what it lacks of the old
		// members, only a snapshot tells.
		m.fetch(CauseEpoch, now)
	case ev.Seq <= pos.Seq:
		m.repeated(ev, now)
	case ev.Seq == pos.Seq+1:
		m.fetch(CauseFork, now)
	default:
		m.hold(newParcel(ev, size, now), now)
	}
	m.rearm()
}

// putAside keeps an event for when the snapshot has been read.
func (m *mirror) putAside(p parcel, now time.Time) {
	if m.spoiled {
		return
	}
	if !m.pending.add(p, maxPending) {
		m.hub.counters.overflows.Add(1)
		m.pending.clear()
		m.spoiled = true
		m.worsen(CauseOverflow, now)
	}
	if m.stage != folding {
		return
	}
	if m.spoiled {
		m.discard(now)
	} else {
		m.merge(now)
	}
	m.rearm()
}

// repeated handles an event whose number has been seen.
func (m *mirror) repeated(ev *store.Event, now time.Time) {
	tag, known := m.past.recall(ev.Seq)
	switch {
	case known && tag == ev.Tag:
		m.hub.counters.duplicates.Add(1)
	case known:
		m.fetch(CauseFork, now) // another history with the same numbers
	case now.Sub(m.landedAt) <= afterglow:
		m.hub.counters.duplicates.Add(1) // the snapshot contains it
	default:
		m.hub.counters.duplicates.Add(1)
		m.hub.suspects.add(m, now)
	}
}

// hold keeps an event that came before its time.
func (m *mirror) hold(p parcel, now time.Time) {
	if m.held.has(p.ev.Seq) {
		m.hub.counters.duplicates.Add(1)
		return
	}
	if !m.held.add(p, maxHeld) {
		m.fetch(CauseGap, now)
		return
	}
	m.hub.counters.held.Add(1)
}

// unhold applies the held events whose turn has come.
func (m *mirror) unhold(now time.Time) {
	for len(m.held.list) > 0 {
		next := m.held.numbered(m.past.pos.Seq + 1)
		if next == nil {
			return
		}
		if !follows(m.past.pos, next.ev) {
			m.fetch(CauseFork, now)
			return
		}
		m.apply(next.ev, now)
	}
}

// apply does what the next event says, and tells it.
func (m *mirror) apply(ev *store.Event, now time.Time) {
	m.past.advance(ev)
	m.enact(ev, now)
	m.pass(now)
	m.wakeWatchers()
	m.arrivals.wake(m.past.pos.Seq)
}

// adopt goes on to a new epoch, which a write to the room has begun: Redis had lost
// the room, or had not kept it while it was empty.
func (m *mirror) adopt(ev *store.Event, now time.Time) {
	m.held.clear()
	m.checkpoint = checkpoint{}
	m.doubtAll(now)
	m.past.jump(ev.Position())
	m.hub.counters.epochs.Add(1)
	m.enact(ev, now)
	m.wakeWaiters()
}

// enact changes the roster as the event says, and tells the sinks.
func (m *mirror) enact(ev *store.Event, now time.Time) {
	m.hub.counters.count(ev.Type)
	if m.roster.outlives(ev) {
		return
	}
	// Whatever the event says, its connection is not in doubt any more: it
	// was there, or it has left.
	m.confirm(ev.Conn)
	old, next := m.roster.change(ev)
	switch {
	case next == nil && old != nil:
		m.tell(&wire.Update{Type: wire.UpdateLeave, ConnectionID: ev.Conn, Timestamp: ev.At})
	case next == nil && ev.Type != store.Left && now.Sub(m.landedAt) > afterglow:
		// A change of someone who is not here. (Right after a paged snapshot
		// it may be: the page was read when that one had left already.)
		m.fetch(CauseInconsistent, now)
	case next == nil:
	case old == nil:
		m.welcome(next, ev.At, ev.At, false)
	case ev.Type == store.State:
		if next.State == nil || !next.StateSilent {
			m.tellState(next, ev.At, false)
		}
	case ev.Type == store.Joined, ev.Type == store.Replaced:
		if stateNews(old, next) {
			m.tellState(next, ev.At, false)
		}
	}
}

// welcome tells that a member joined, and its state if it is to be told.
func (m *mirror) welcome(who *Member, joined, at int64, repair bool) {
	m.tell(&wire.Update{Type: wire.UpdateJoin, ConnectionID: who.Conn, Timestamp: joined, Metadata: who.Meta(), Repair: repair})
	if who.State != nil && !who.StateSilent {
		m.tellState(who, at, repair)
	}
}

// tellState tells a member's state; null if it has none.
func (m *mirror) tellState(who *Member, at int64, repair bool) {
	m.tell(&wire.Update{Type: wire.UpdateState, ConnectionID: who.Conn, Timestamp: at, State: who.State, Repair: repair})
}

// pass checks the checkpoint that the mirror has come to.
func (m *mirror) pass(now time.Time) {
	c := m.checkpoint
	if c.until.IsZero() || c.pos.Epoch != m.past.pos.Epoch || m.past.pos.Seq < c.pos.Seq {
		return
	}
	m.checkpoint = checkpoint{}
	if m.past.pos != c.pos {
		m.fetch(CauseFork, now)
		return
	}
	if m.serial == c.serial {
		m.compared, m.era = true, c.era
	}
}
