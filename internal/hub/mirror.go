package hub

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// earlyTimeout is the time for which an early event waits for those before it.
	earlyTimeout = 100 * time.Millisecond
	// mergeTimeout is the time for which a paged merge waits for the events that its
	// newest records come from.
	mergeTimeout = 300 * time.Millisecond
	// deliveryDelay is the time that an event may take to arrive. A mirror that is
	// behind Redis for longer has lost it.
	deliveryDelay = 250 * time.Millisecond
	// snapshotOverlap is the time after a snapshot in which events that it contains
	// may still arrive.
	snapshotOverlap = time.Second
)

// mirror is this server's copy of one room.
type mirror struct {
	hub      *Hub
	room     string
	refs     int          // sinks, and calls that wait to add one; guarded by Hub.mu
	linger   timer        // set while refs is 0
	timer    timer        // set to the earliest of the times that tick handles
	lastJoin atomic.Int64 // time of the last join that keeps the mirror, since Hub.madeAt; 0: none

	mu     sync.Mutex // guards the following
	closed bool       // the hub has dropped the mirror; it must do nothing more
	sinks  sinks
	// changed is closed and set to nil at the next change that a waiting Watch or
	// View may wait for; nil: no call waits.
	changed    chan struct{}
	seqWaiters seqWaiters
	kept       int // its share of recentJoins.kept

	live        bool // the room has been read at least once
	members     members
	numbers     numbers
	past        history
	generation  generation // of Redis, when the mirror last agreed with it
	unconfirmed unconfirmed

	early   eventBuffer // early events
	pending eventBuffer // events that arrived while a snapshot is read or merged

	sub     channelSub
	read    readState
	timerAt time.Time // the time of timer; zero: not set, or just fired
}

// channelSub is the state of the listener's subscription to the room's channel, and of
// the comparison with Redis since then.
type channelSub struct {
	confirmed  bool
	compared   bool   // since the confirmation the mirror agreed with Redis
	serial     uint64 // changes whenever events may have been missed
	expected   expectation
	checkpoint checkpoint
}

// expectation is a position that the room is known to have reached.
type expectation struct {
	pos   store.Position
	until time.Time // end of the expectation
}

// checkpoint is a position of Redis that the mirror must pass in time.
type checkpoint struct {
	pos        store.Position
	until      time.Time // zero: there is no checkpoint
	asked      time.Time // when Redis was asked
	generation generation
	serial     uint64
}

func newMirror(h *Hub, room string) *mirror {
	m := &mirror{hub: h, room: room, numbers: numbers{counted: h.cfg.CountUsers}, read: readState{want: CauseFirst}}
	m.linger.fire = func() { h.drop(m) }
	m.timer.fire = m.tick
	return m
}

// close ends the mirror. It is called without locks.
func (m *mirror) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed, m.sub.confirmed, m.read.want = true, false, causeNone
	m.members, m.numbers, m.read.merge, m.unconfirmed = members{}, numbers{}, nil, unconfirmed{}
	m.early.clear()
	m.pending.clear()
	m.hub.timers.cancel(&m.timer)
	m.setShare(0)
	m.wakeWaiters()
}

// stale reports whether something may have been missed.
func (m *mirror) stale() bool {
	return !m.live || !m.sub.confirmed || !m.sub.compared || m.read.needsSnapshot()
}

// upToDate reports whether the mirror shows everything that is known to have
// happened.
func (m *mirror) upToDate(now time.Time) bool {
	return !m.stale() && !m.read.buffersEvents() && len(m.early.list) == 0 && m.reachedExpected(now)
}

// reachedExpected reports whether the mirror is at or past its expected position.
func (m *mirror) reachedExpected(now time.Time) bool {
	e := &m.sub.expected
	if e.pos.None() {
		return true
	}
	switch {
	case m.past.pos.Epoch == e.pos.Epoch && m.past.pos.Seq >= e.pos.Seq:
	case now.After(e.until):
		m.hub.toCompare.add(m.room, now) // the event may be lost
	default:
		return false
	}
	*e = expectation{}
	return true
}

// nextChange returns a channel that is closed at the next change.
func (m *mirror) nextChange() <-chan struct{} {
	if m.changed == nil {
		m.changed = make(chan struct{})
	}
	return m.changed
}

// wakeWaiters wakes all calls that wait for the mirror. Either their condition may
// be true now, or it may no longer become true.
func (m *mirror) wakeWaiters() {
	m.wakeWatchers()
	m.seqWaiters.wakeAll()
}

// wakeWatchers wakes the calls that wait for any change.
func (m *mirror) wakeWatchers() {
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
}

// tick handles the times that have come. It runs on the goroutine of the timers.
func (m *mirror) tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.timerAt = time.Time{}
	now := time.Now()
	if due(&m.read.retryAt, now) {
		m.enqueueRead()
	}
	if due(&m.read.mergeUntil, now) {
		m.discard(now)
	}
	if at := m.early.oldest(); !at.IsZero() && !now.Before(at.Add(earlyTimeout)) {
		m.fetchSnapshot(CauseGap, now)
	}
	if due(&m.sub.checkpoint.until, now) {
		asked := m.sub.checkpoint.asked
		m.sub.checkpoint = checkpoint{}
		m.fetchSnapshot(m.compareCause(), asked)
	}
	if due(&m.unconfirmed.askAt, now) {
		m.askOwners(now)
	}
	if due(&m.unconfirmed.checkAt, now) && m.sub.confirmed {
		m.fetchSnapshot(CauseVerify, now)
	}
	m.rearm()
}

// due reports whether the time has come. If so, it clears it.
func due(at *time.Time, now time.Time) bool {
	if at.IsZero() || now.Before(*at) {
		return false
	}
	*at = time.Time{}
	return true
}

// rearm sets the timer to the earliest time that tick handles. Every change of one
// of these times ends with a call of rearm.
func (m *mirror) rearm() {
	var first time.Time
	consider := func(at time.Time) {
		if !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	consider(m.read.retryAt)
	consider(m.read.mergeUntil)
	consider(m.unconfirmed.checkAt)
	consider(m.unconfirmed.askAt)
	consider(m.sub.checkpoint.until)
	if at := m.early.oldest(); !at.IsZero() {
		consider(at.Add(earlyTimeout))
	}
	if m.closed {
		first = time.Time{}
	}
	if first.Equal(m.timerAt) {
		return // the usual case
	}
	m.timerAt = first
	if first.IsZero() {
		m.hub.timers.cancel(&m.timer)
	} else {
		m.hub.timers.set(&m.timer, first)
	}
}
