package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// receive handles one event of the room. Events come in the order of their arrival.
// size is the size of the message. receive copies what it keeps.
func (m *mirror) receive(ev *store.Event, size int, now time.Time) {
	if m.read.buffersEvents() {
		m.bufferPending(newBufferedEvent(ev, size, now), now)
		return
	}
	if !m.live || m.read.needsSnapshot() {
		// The snapshot will be read later, and contains the event.
		return
	}
	pos := &m.past.pos
	switch {
	case follows(*pos, ev) && ev.Epoch == pos.Epoch:
		m.apply(ev, now)
		m.applyEarly(now)
	case beginsEpoch(ev) && ev.Epoch != pos.Epoch && !m.past.hasLeft(ev.Epoch):
		m.adopt(ev, now)
	case ev.Epoch != pos.Epoch:
		// The event is in the middle of another epoch, or in one that the mirror has
		// left. Waiting for the first event of the epoch would not help: only a
		// snapshot shows which of the old members are missing in it.
		m.fetchSnapshot(CauseEpoch, now)
	case ev.Seq <= pos.Seq:
		m.handleDuplicate(ev, now)
	case ev.Seq == pos.Seq+1:
		m.fetchSnapshot(CauseFork, now)
	default:
		m.bufferEarly(newBufferedEvent(ev, size, now), now)
	}
	m.rearm()
}

// bufferPending buffers an event until the snapshot has been read.
func (m *mirror) bufferPending(e bufferedEvent, now time.Time) {
	if m.read.spoiled {
		return
	}
	if !m.pending.add(e, maxPending) {
		m.hub.counters.overflows.Add(1)
		m.pending.clear()
		m.read.spoiled = true
		m.read.require(CauseOverflow, now)
	}
	if m.read.stage != stageMerging {
		return
	}
	if m.read.spoiled {
		m.discard(now)
	} else {
		m.mergeBuffered(now)
	}
	m.rearm()
}

// handleDuplicate handles an event whose seq the mirror has passed.
func (m *mirror) handleDuplicate(ev *store.Event, now time.Time) {
	tag, known := m.past.recall(ev.Seq)
	switch {
	case known && tag == ev.Tag:
		m.hub.counters.duplicates.Add(1)
	case known:
		m.fetchSnapshot(CauseFork, now) // another history with the same numbers
	case now.Sub(m.read.installedAt) <= snapshotOverlap:
		m.hub.counters.duplicates.Add(1) // the snapshot contains it
	default:
		m.hub.counters.duplicates.Add(1)
		m.hub.toCompare.add(m.room, now)
	}
}

// bufferEarly buffers an early event.
func (m *mirror) bufferEarly(e bufferedEvent, now time.Time) {
	if m.early.has(e.ev.Seq) {
		m.hub.counters.duplicates.Add(1)
		return
	}
	if !m.early.add(e, maxEarly) {
		m.fetchSnapshot(CauseGap, now)
		return
	}
	m.hub.counters.early.Add(1)
}

// applyEarly applies the early events that are no longer early.
func (m *mirror) applyEarly(now time.Time) {
	for len(m.early.list) > 0 {
		next := m.early.take(m.past.pos.Seq + 1)
		if next == nil {
			return
		}
		if !follows(m.past.pos, next.ev) {
			m.fetchSnapshot(CauseFork, now)
			return
		}
		m.apply(next.ev, now)
	}
}

// apply applies the next event and delivers the change.
func (m *mirror) apply(ev *store.Event, now time.Time) {
	m.past.advance(ev)
	m.applyChange(ev, now)
	m.reachCheckpoint(now)
	m.wakeWatchers()
	m.seqWaiters.wake(m.past.pos.Seq)
}

// adopt moves to a new epoch that a write to the room has begun. Redis had lost the
// room, or had not kept it while it was empty.
func (m *mirror) adopt(ev *store.Event, now time.Time) {
	m.early.clear()
	m.sub.checkpoint = checkpoint{}
	m.markAllUnconfirmed(now)
	m.past.jump(ev.Position())
	m.applyChange(ev, now)
	m.wakeWaiters()
}

// applyChange changes the members as the event says, and delivers the change.
func (m *mirror) applyChange(ev *store.Event, now time.Time) {
	m.hub.counters.countEvent(ev.Type)
	if m.members.newerThan(ev) {
		return
	}
	// Every event confirms its connection: it is a member, or it has left.
	m.unconfirmed.remove(ev.Conn)
	old, next := m.members.change(ev)
	switch {
	case old == nil && next == nil:
		if ev.Type != store.Left && now.Sub(m.read.installedAt) > snapshotOverlap {
			// The connection is no member. (Right after a paged snapshot that is possible:
			// the page may have been read after the connection left.)
			m.fetchSnapshot(CauseInconsistent, now)
		}
	case next == nil:
		m.deliverLeave(old, reasonOf(ev.Cause), ev.At, false)
	case old == nil:
		m.deliverJoin(next, ev.Replaces, ev.At, ev.At, false)
	case ev.Type == store.State:
		if next.State == nil || !next.StateSilent {
			m.deliverState(next, ev.At, false)
		}
	default:
		m.deliverChanges(old, next, ev.At, false)
	}
}

// reachCheckpoint checks whether the mirror has passed the checkpoint, and with the
// right tag.
func (m *mirror) reachCheckpoint(now time.Time) {
	c := m.sub.checkpoint
	if c.until.IsZero() || c.pos.Epoch != m.past.pos.Epoch || m.past.pos.Seq < c.pos.Seq {
		return
	}
	m.sub.checkpoint = checkpoint{}
	if m.past.pos != c.pos {
		m.fetchSnapshot(CauseFork, now)
		return
	}
	if m.sub.serial == c.serial {
		m.sub.compared, m.generation = true, c.generation
	}
}
