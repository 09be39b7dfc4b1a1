package local

import (
	"crypto/rand"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// entry is the membership of one connection in one room: its desired state, and the state
// that Redis is known to hold. The phase sums up both. Its fields are guarded by Conn.mu,
// except inQueue.
type entry struct {
	c       *Conn
	room    string
	writer  *bucketWriter
	inQueue queueState // guarded by writer.mu

	phase phase // changed by move

	// lapsed reports that the connection is silent past its TTL, and that the end of the
	// entry is left to the server that cleans up. Changed by setLapsed.
	lapsed bool
	// overdue reports that a frame came after the entry had lapsed, and that Redis has not
	// confirmed the entry since then. Any server may have ended it.
	overdue bool
	// acknowledged reports that Redis has held the entry since it was last asked for. To
	// write it again is a rebuild.
	acknowledged bool
	// promised reports that the client believes the entry to be in the room: its join was
	// kept, or it returns.
	promised bool
	overCap  bool          // the join passes the caps of the room
	resent   bool          // the join of the id was sent more than once
	personal bool          // Redis may lack the user or the grace of the entry
	idleFrom time.Duration // silence counts from here at the earliest; since Registry.madeAt

	// Desired state.
	id    string // new for each join, before the first attempt to write it
	ttl   time.Duration
	state state       // the newest
	queue *stateQueue // older states and pacing; nil: neither
	// interval is the least time between two delivered states; 0: no pacing.
	interval time.Duration

	place    *place // nil: none
	leaving  leaving
	replaced replaced
	endedNow bool // the last leave found the entry in Redis and ended it

	// Stored state.
	incarnation  string // under which the join was sent
	writtenAt    time.Time
	metaWritten  uint64
	stateWritten uint64
	refresh      bool // the per-connection key has to be refreshed
	counted      countedAs
	position     store.Position
	total, users int32 // of the room after the last join

	rev       uint64 // counts the changes of the desired state
	built     uint64 // revision that the last op in flight writes
	waiters   []waiter
	ttlTimers *ttlTimers   // timers of an entry with a TTL
	expiry    *clock.Timer // of the state
	retry     *clock.Timer // after Redis refused a single op
}

// leaving is an earlier id of an entry that has to leave before the entry can join.
type leaving struct {
	id       string // "": none
	cause    store.Cause
	hasState bool          // it may have a state in Redis
	known    bool          // Redis has held it
	keep     bool          // its connection did not ask to leave, and the room has a grace
	due      time.Duration // end of its TTL, since Registry.madeAt; 0: not ended by silence
}

// replaced is the id of an entry before a rejoin, until the new one is written. Redis may
// still hold it, and mirrors may list it.
type replaced struct {
	id    string // "": none
	known bool   // Redis has held it
}

func newEntryID() string { return rand.Text()[:16] }

// changed counts a change and queues the entry. Conn.mu is held.
func (e *entry) changed(p priority) {
	e.rev++
	e.updateRoomCount()
	e.writer.enqueue(e, p)
}

// restoring returns the priority for writing again what Redis had held. The key of an
// entry with a short TTL would expire in a long backlog.
func (e *entry) restoring() priority {
	if e.ttl > 0 && e.ttl <= shortTTL {
		return timed
	}
	return background
}

// join makes the entry wanted. A return passes the caps if the join before it did, and
// takes the place that the join before it was to take, if Redis did not have that join.
// Conn.mu is held.
func (e *entry) join() {
	e.id = newEntryID()
	e.acknowledged, e.promised, e.resent, e.position = false, false, false, store.Position{}
	e.idleFrom = time.Since(e.c.registry.madeAt)
	e.setTook("")
	// The order matters: a change of the rules that does not find the entry in its room,
	// into which it moves here, was made before applyRules.
	e.move(byJoin)
	e.applyRules()
	e.armTTL()
	e.changed(asked)
}

// applyRules takes the TTL, the state interval and the grace of the room. Conn.mu is held.
func (e *entry) applyRules() {
	e.ttl, e.interval = e.c.registry.cfg.TTL(e.room), e.c.registry.cfg.StateInterval(e.room)
	e.setGrace(e.ruleGrace())
}

// renewID gives the entry a new id that Redis does not know. Conn.mu is held.
func (e *entry) renewID() {
	if e.tried() {
		e.replaced = replaced{id: e.id, known: e.written()}
		if e.c.userID() != "" { // another server may have ended the entry and kept its place
			e.setKept(e.id)
		}
	}
	e.id, e.resent = newEntryID(), false
	e.move(byRejoin)
}

// leave ends the entry for good. keep: its connection did not ask to leave. Conn.mu is
// held.
func (e *entry) leave(cause store.Cause, keep bool, p priority) {
	if e.wanted() {
		e.endWritten(byLeave, cause, keep, p)
		return
	}
	e.move(byLeave) // it had ended, and will not return now
	if !keep && e.giveUpPlace(cause) {
		e.changed(p)
	}
}

// leaveSilent ends the entry until the next frame of its connection. Conn.mu is held.
func (e *entry) leaveSilent(p priority) { e.endWritten(bySilence, store.CauseSilent, true, p) }

// endWritten ends the entry here and in Redis. Conn.mu is held.
func (e *entry) endWritten(by transition, cause store.Cause, keep bool, p priority) {
	// A join of this id may be in flight even if it is not written. If an earlier id is
	// still ending, this one was not tried: leaves go first.
	switch {
	case e.tried():
		e.leaving.id, e.leaving.cause, e.leaving.known = e.id, cause, e.written() || e.replaced.known
		e.leaving.keep = keep && e.grace() > 0
	case e.replaced.id != "":
		e.leaving.id, e.leaving.cause, e.leaving.known = e.replaced.id, cause, e.replaced.known
		e.leaving.keep = keep && e.grace() > 0
	case !keep:
		e.giveUpPlace(cause)
	}
	e.leaving.hasState = e.state.data != nil || e.stateWritten < e.state.version
	e.end(by)
	e.changed(p)
}

// end ends the entry here and clears its state.
func (e *entry) end(by transition) {
	e.move(by)
	e.refresh, e.personal, e.overdue, e.replaced = false, false, false, replaced{}
	e.stopTimers()
	e.state, e.queue = state{version: e.state.version + 1}, nil
}

// rejoin writes the entry under a new id, because Redis lost it or because it belongs to
// an earlier incarnation. Conn.mu is held.
func (e *entry) rejoin(p priority) {
	e.renewID()
	e.c.registry.stats.rejoined.Add(1)
	e.changed(p)
}

// removeIfEnded answers the waiters, and removes the entry if it has ended. Conn.mu is
// held.
func (e *entry) removeIfEnded() {
	e.answer(e.rev, nil)
	if !e.in() && e.leaving.id == "" {
		e.stopTimers()
		if e.c.entries[e.room] == e {
			delete(e.c.entries, e.room)
			e.c.ttlChanged()
		}
		e.c.disconnectIfEmpty()
	}
}
