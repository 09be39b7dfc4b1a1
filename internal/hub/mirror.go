package hub

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

const (
	// holdFor is how long an event that came too early waits for the one it
	// overtook.
	holdFor = 100 * time.Millisecond
	// foldFor is how long a paged snapshot waits for the events that its
	// newest records were changed by.
	foldFor = 300 * time.Millisecond
	// inFlight is how long an event may be on its way: a mirror that is
	// behind Redis for longer has lost it.
	inFlight = 250 * time.Millisecond
	// afterglow is how long after a snapshot events that it contains may
	// still come in.
	afterglow = time.Second
)

// stage is how far a mirror's snapshot has come.
type stage byte

const (
	idle    stage = iota
	queued        // waits for a place among the jobs
	reading       // is being read; events are put aside
	folding       // was read; waits for events it must be merged with
)

// mirror is this server's copy of one room.
type mirror struct {
	hub    *Hub
	room   string
	refs   int          // watchers, and watches under way; guarded by Hub.mu
	linger alarm        // set while refs is 0
	timer  alarm        // the earliest of the times below
	joined atomic.Int64 // when a join last was reason to keep it, since Hub.born; 0: never

	mu    sync.Mutex // guards the following
	sinks audience
	// changed is closed and replaced when something happened that a waiting
	// Watch or View may have waited for; nil: nobody waits.
	changed  chan struct{}
	arrivals arrivals
	kept     int // its share of joins.kept

	roster roster
	past   history
	// doubts are the members that Redis lost: when their time is up.
	doubts map[string]time.Time
	era    era // of Redis, when the mirror was last known to be in order

	live       bool   // has been in order once
	closed     bool   // dropped; whoever still holds it must do nothing
	subscribed bool   // the listener's subscription is confirmed
	compared   bool   // and since then Redis was found to stand where we do
	serial     uint64 // of the subscription; changes whenever events may be lost
	expected   expectation
	checkpoint checkpoint

	held    parcels // events ahead of the next one
	pending parcels // events that came while reading or folding
	stage   stage
	want    Cause     // why a snapshot is wanted; none if not
	needed  time.Time // the generation must be asked for at this time or later
	spoiled bool      // the snapshot under way cannot be used
	fold    *fold
	failed  int  // snapshots in a row that could not be read
	churn   int  // snapshots in a row that were wanted right after another
	outage  bool // Redis was away since the doubts were last put off

	triedAt  time.Time // when the last snapshot came in, or failed to
	landedAt time.Time // when the last one was put to use

	timerAt   time.Time // what timer is set to, unless it has just fired; zero: it is not set
	retryAt   time.Time // a snapshot may be tried again
	foldUntil time.Time
	judgeAt   time.Time // the first doubt's time is up
	askAt     time.Time // owners are asked about the doubts
}

// expectation is a position that the room is known to have reached.
type expectation struct {
	pos   store.Position
	until time.Time // no longer expected after it
}

// checkpoint is a position that Redis had, and that the mirror has to come
// through in time.
type checkpoint struct {
	pos    store.Position
	until  time.Time // zero: none
	asked  time.Time // when Redis was asked
	era    era
	serial uint64
}

func newMirror(h *Hub, room string) *mirror {
	m := &mirror{hub: h, room: room, want: CauseFirst}
	m.linger.fire = func() { h.drop(m) }
	m.timer.fire = m.tick
	return m
}

// close ends the mirror's part in everything. Called without locks.
func (m *mirror) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed, m.subscribed, m.want = true, false, causeNone
	m.roster, m.fold, m.doubts = roster{}, nil, nil
	m.held.clear()
	m.pending.clear()
	m.hub.alarms.cancel(&m.timer)
	m.share(0)
	m.wakeWaiters()
}

// stale reports whether something may have been missed.
func (m *mirror) stale() bool {
	return !m.live || !m.subscribed || !m.compared || m.want > CauseVerify
}

// settled reports whether the mirror shows all that is known to have
// happened.
func (m *mirror) settled(now time.Time) bool {
	return !m.stale() && m.stage != reading && m.stage != folding && len(m.held.list) == 0 && m.fulfilled(now)
}

// fulfilled reports whether the mirror is where it is expected to be.
func (m *mirror) fulfilled(now time.Time) bool {
	e := &m.expected
	if e.pos.None() {
		return true
	}
	switch {
	case m.past.pos.Epoch == e.pos.Epoch && m.past.pos.Seq >= e.pos.Seq:
	case now.After(e.until):
		m.hub.suspects.add(m, now) // the event may be lost
	default:
		return false
	}
	*e = expectation{}
	return true
}

// waitChange returns a channel that is closed at the next change.
func (m *mirror) waitChange() <-chan struct{} {
	if m.changed == nil {
		m.changed = make(chan struct{})
	}
	return m.changed
}

// wakeWaiters lets those who wait look again: the mirror may have become what
// they wait for, or what they wait for in vain.
func (m *mirror) wakeWaiters() {
	m.wakeWatchers()
	m.arrivals.wakeAll()
}

// wakeWatchers lets those look again who wait for something to happen.
func (m *mirror) wakeWatchers() {
	if m.changed != nil {
		close(m.changed)
		m.changed = nil
	}
}

// tell delivers an update to every sink.
func (m *mirror) tell(u *wire.Update) {
	if len(m.sinks.list) == 0 || m.hub.ctx.Err() != nil {
		return
	}
	m.hub.counters.tell(u, len(m.sinks.list))
	u.RoomName = m.room
	u.Epoch, u.Seq = m.past.shown()
	for _, s := range m.sinks.list {
		s.Deliver(u)
	}
}

// tick does what is due. It runs on the goroutine of the alarms.
func (m *mirror) tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	m.timerAt = time.Time{} // it has fired
	now := time.Now()
	if due(&m.retryAt, now) {
		m.enqueue()
	}
	if due(&m.foldUntil, now) {
		m.discard(now)
	}
	if at := m.held.oldest(); !at.IsZero() && !now.Before(at.Add(holdFor)) {
		m.fetch(CauseGap, now)
	}
	if due(&m.checkpoint.until, now) {
		asked := m.checkpoint.asked
		m.checkpoint = checkpoint{}
		m.fetch(m.standsElsewhere(), asked)
	}
	if due(&m.askAt, now) {
		m.ask(now)
	}
	if due(&m.judgeAt, now) && m.subscribed {
		m.fetch(CauseVerify, now)
	}
	m.rearm()
}

// due reports whether the time has come, and clears it then.
func due(at *time.Time, now time.Time) bool {
	if at.IsZero() || now.Before(*at) {
		return false
	}
	*at = time.Time{}
	return true
}

// rearm sets the timer to what comes first. Everything that changes one of
// the times ends with it.
func (m *mirror) rearm() {
	var first time.Time
	consider := func(at time.Time) {
		if !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	consider(m.retryAt)
	consider(m.foldUntil)
	consider(m.judgeAt)
	consider(m.askAt)
	consider(m.checkpoint.until)
	if at := m.held.oldest(); !at.IsZero() {
		consider(at.Add(holdFor))
	}
	if m.closed {
		first = time.Time{}
	}
	if first.Equal(m.timerAt) {
		return // as after most events
	}
	m.timerAt = first
	if first.IsZero() {
		m.hub.alarms.cancel(&m.timer)
	} else {
		m.hub.alarms.set(&m.timer, first)
	}
}

// audience is the sinks of a mirror.
type audience struct {
	list []Sink
	at   map[Sink]int // index in list
}

// add reports whether the sink was not there yet.
func (a *audience) add(s Sink) bool {
	if _, ok := a.at[s]; ok {
		return false
	}
	if a.at == nil {
		a.at = make(map[Sink]int)
	}
	a.at[s] = len(a.list)
	a.list = append(a.list, s)
	return true
}

// remove reports whether the sink was there.
func (a *audience) remove(s Sink) bool {
	i, ok := a.at[s]
	if !ok {
		return false
	}
	last := len(a.list) - 1
	a.list[i] = a.list[last]
	a.at[a.list[i]] = i
	a.list[last] = nil
	a.list = a.list[:last]
	delete(a.at, s)
	return true
}
