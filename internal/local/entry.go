package local

import (
	"crypto/rand"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// entry is the membership of one connection in one room: its desired state, and the state
// that Redis is known to hold. Its fields are guarded by Conn.mu, except inQueue.
type entry struct {
	c       *Conn
	room    string
	writer  *bucketWriter
	inQueue queueState // guarded by writer.mu

	// Desired state.
	wanted  bool   // to be present
	id      string // new for each join, before the first attempt to write it
	ttl     time.Duration
	onFrame frameAction // set by setOnFrame
	// overdue reports that the connection was silent past its TTL since Redis last
	// confirmed the entry. Any server may have ended the entry.
	overdue  bool
	idleFrom time.Duration // silence counts from here at the earliest; since Registry.madeAt
	state    state         // the newest
	queue    *stateQueue   // older states and pacing; nil: neither
	// interval is the least time between two delivered states; 0: no pacing.
	interval time.Duration

	leaving  leaving
	replaced replaced
	endedNow bool // the last leave found the entry in Redis and ended it

	// Stored state.
	tried        bool   // a join of this id may have reached Redis
	written      bool   // Redis is known to hold the entry
	incarnation  string // under which it was tried
	writtenAt    time.Time
	metaWritten  uint64
	stateWritten uint64
	refresh      bool // the per-connection key has to be refreshed
	verifying    bool // Redis may have lost the entry, and it is being written again
	counted      countedAs
	position     store.Position
	total        int

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

// join makes the entry wanted. Conn.mu is held.
func (e *entry) join() {
	e.setOnFrame(frameIgnored)
	e.wanted = true
	e.renewID()
	e.replaced = replaced{} // that one has left
	e.idleFrom = time.Since(e.c.registry.madeAt)
	// The order matters: a change of the rules that does not find the entry in its room
	// was made before applyRules.
	e.c.registry.addEntry(e)
	e.applyRules()
	e.armTTL()
	e.changed(asked)
}

// applyRules takes the TTL and the state interval of the room. Conn.mu is held.
func (e *entry) applyRules() {
	e.ttl, e.interval = e.c.registry.cfg.TTL(e.room), e.c.registry.cfg.StateInterval(e.room)
}

// renewID gives the entry a new id that Redis does not know.
func (e *entry) renewID() {
	if e.tried {
		e.replaced = replaced{id: e.id, known: e.written}
	}
	e.forgetWritten()
	e.id, e.tried, e.verifying = newEntryID(), false, false
}

// leave ends the entry. Conn.mu is held.
func (e *entry) leave(cause store.Cause, p priority) {
	if !e.wanted {
		return
	}
	// A join of this id may be in flight even if it is not written. If an earlier id is
	// still ending, this one was not tried: leaves go first.
	switch {
	case e.tried:
		e.leaving.id, e.leaving.cause, e.leaving.known = e.id, cause, e.written || e.replaced.known
	case e.replaced.id != "":
		e.leaving.id, e.leaving.cause, e.leaving.known = e.replaced.id, cause, e.replaced.known
	}
	e.leaving.hasState = e.state.data != nil || e.stateWritten < e.state.version
	e.end()
	e.changed(p)
}

// end makes the entry unwanted and clears its state.
func (e *entry) end() {
	e.forgetWritten()
	e.wanted, e.refresh, e.verifying, e.overdue, e.replaced = false, false, false, false, replaced{}
	e.stopTimers()
	e.state, e.queue = state{version: e.state.version + 1}, nil
	e.c.registry.removeEntry(e)
	e.setOnFrame(frameIgnored)
}

func (e *entry) forgetWritten() {
	if e.written {
		e.writer.addStored(e.incarnation, -1)
	}
	e.written = false
}

// rejoin writes the entry under a new id, because Redis lost it or because it belongs to
// an earlier incarnation. Conn.mu is held.
func (e *entry) rejoin(p priority) {
	e.renewID()
	e.c.registry.stats.rejoined.Add(1)
	e.changed(p)
}

// in reports whether the connection is in the room, or joins it again at its next frame.
// Conn.mu is held.
func (e *entry) in() bool { return e.wanted || e.onFrame == frameJoins }

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
