package owner

import (
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// entry is one connection's presence in one room: what it should be, and what
// Redis is known to hold. Its fields are guarded by Conn.mu, except marked.
type entry struct {
	c      *Conn
	room   string
	lane   *lane
	marked mark // the lane's

	// What it should be.
	want   bool   // present
	id     string // minted anew for every join, before the first attempt to write it
	ttl    time.Duration
	asleep bool // ended by silence, or waiting for a sign of life: the next frame joins again
	lapsed bool // silent past its TTL, and not ended: the next frame refreshes at once
	// overdue says that the connection was silent past its TTL since Redis last
	// confirmed the entry, so that any server may have ended it.
	overdue bool
	since   time.Duration // silence counts from here at the earliest; since Owner.born
	state   state         // the newest
	flow    *flow         // what its states need beside the newest; nil: nothing
	// interval is at least between two states that are told; 0: each is.
	interval time.Duration

	endedNow bool // the last ending found the entry, and ended it
	// ending is an earlier id that has to leave first, with its cause, and
	// whether it may have a state in Redis.
	ending string
	cause  store.Cause
	stated bool
	due    time.Duration // when silence was to end it, since Owner.born; 0: it did not
	// known says that Redis has held the entry that is ending.
	known bool
	// before is the id that a rejoin replaced before the new one was tried: Redis
	// may still hold it, and mirrors may list it. beforeKnown says that Redis did.
	before      string
	beforeKnown bool

	// What Redis holds.
	tried        bool   // a join of this id may have reached Redis
	written      bool   // it has, for certain
	incarnation  string // under which it was tried
	writtenAt    time.Time
	metaWritten  uint64
	stateWritten uint64
	refresh      bool // the per-connection key is due
	unsure       bool // it is being verified whether Redis still holds it
	noted        standing
	position     store.Position
	total        int

	rev     uint64 // counts changes of what it should be
	built   uint64 // the revision that the ops under way bring about, the last of them
	waiters []waiter
	life    *life        // timers of an entry with a TTL
	expiry  *clock.Timer // of the state
	retry   *clock.Timer // after a refusal of this op alone
}

func newEntryID() string { return rand.Text()[:16] }

// changed marks a difference and offers the entry to its lane. Conn.mu is held.
func (e *entry) changed(u urgency) {
	e.rev++
	e.note()
	e.lane.offer(e, u)
}

// restoring is how soon something has to be written that Redis had held. A key
// with a short TTL would expire while it waits in a long backlog.
func (e *entry) restoring() urgency {
	if e.ttl > 0 && e.ttl <= shortTTL {
		return timed
	}
	return background
}

// join makes the entry wanted. Conn.mu is held.
func (e *entry) join() {
	e.wake()
	e.want = true
	e.mint()
	e.before = "" // that one has left
	e.since = time.Since(e.c.o.born)
	// In this order: a change of the rules that does not find the entry in its room
	// has been made before they are asked.
	e.c.o.enter(e)
	e.obey()
	e.armLife()
	e.changed(asked)
}

// obey asks the rules what they say about the room. Conn.mu is held.
func (e *entry) obey() {
	e.ttl, e.interval = e.c.o.cfg.TTL(e.room), e.c.o.cfg.StateInterval(e.room)
}

// mint gives the entry a new id, of which Redis knows nothing yet.
func (e *entry) mint() {
	if e.tried {
		e.before, e.beforeKnown = e.id, e.written
	}
	e.forgetWritten()
	e.id, e.tried, e.unsure = newEntryID(), false, false
}

// leave ends the entry. Conn.mu is held.
func (e *entry) leave(cause store.Cause, u urgency) {
	if !e.want {
		return
	}
	// Written or not: a join of this id may be under way. Where an earlier id
	// is still to be ended, this one has not been tried yet: endings go first.
	switch {
	case e.tried:
		e.ending, e.cause, e.known = e.id, cause, e.written || e.before != "" && e.beforeKnown
	case e.before != "":
		e.ending, e.cause, e.known = e.before, cause, e.beforeKnown
	}
	e.stated = e.state.data != nil || e.stateWritten < e.state.version
	e.over()
	e.changed(u)
}

// over: the entry is not present any more, and its state ends with it.
func (e *entry) over() {
	e.forgetWritten()
	e.want, e.refresh, e.unsure, e.overdue, e.before = false, false, false, false, ""
	e.stopTimers()
	e.state, e.flow = state{version: e.state.version + 1}, nil
	e.c.o.exit(e)
	if e.lapsed { // what is over is not to be refreshed at the next frame
		e.lapsed = false
		e.c.sleepers.Add(-1)
	}
}

func (e *entry) forgetWritten() {
	if e.written {
		e.lane.hold(e.incarnation, -1)
	}
	e.written = false
}

// rejoin writes the entry anew under a new id: Redis lost it, or it belongs to
// an incarnation that is no more. Conn.mu is held.
func (e *entry) rejoin(u urgency) {
	e.mint()
	e.c.o.stats.rejoined.Add(1)
	e.changed(u)
}

func (e *entry) conn() *Conn { return e.c }

func (e *entry) place() place { return place{room: e.room} }

func (e *entry) mark() *mark { return &e.marked }

// pending implements item.
func (e *entry) pending() bool {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if e.ending == "" && !e.want {
		e.settle()
		return false
	}
	return true
}

// next implements item.
func (e *entry) next(inc string, after *store.Op) (store.Op, bool) {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if after != nil {
		return e.nextState(after)
	}
	defer e.note()
	op := store.Op{Room: e.room, Conn: e.c.id, Entry: e.id, TTL: e.ttl}
	switch {
	case e.ending != "":
		op.Kind, op.Entry, op.Cause, op.Stated, op.Known = store.OpLeave, e.ending, e.cause, e.stated, e.known
		return op, true
	case !e.want:
		e.settle()
		return op, false
	case e.tried && e.incarnation != inc:
		// A new incarnation came between. The old id, written or perhaps
		// written, is the old one's, and ends with it.
		e.mint()
		op.Entry = e.id
	}
	e.built = e.rev
	left := e.ttl + time.Second - e.idle()
	if !e.written {
		op.Kind = store.OpJoin
		op.MetaVersion, op.Meta = e.c.metaVersion, e.c.meta
		e.putState(&op, &e.state) // who comes has no older ones
		op.Stated = e.before != "" && e.beforeKnown
		if e.ttl > 0 {
			op.Left = max(left, time.Millisecond)
		}
		e.incarnation, e.tried = inc, true
		return op, true
	}
	op.Kind = store.OpUpdate
	due := false
	if e.metaWritten < e.c.metaVersion {
		op.MetaVersion, op.Meta, due = e.c.metaVersion, e.c.meta, true
	}
	if s := e.unwritten(e.stateWritten); s != nil {
		e.putState(&op, s)
		due = true
	}
	if e.refresh {
		op.Left, due = time.Millisecond, true // without a TTL: takes the key away
		if e.ttl > 0 {
			op.Left = max(left, time.Millisecond)
		}
	}
	if !due {
		e.answer(e.rev, nil)
	}
	return op, due
}

// sleep leaves it to the next frame to join again. Conn.mu is held.
func (e *entry) sleep() {
	if !e.asleep {
		e.asleep = true
		e.c.sleepers.Add(1)
	}
}

// wake ends sleep and lapse.
func (e *entry) wake() {
	if e.asleep {
		e.asleep = false
		e.c.sleepers.Add(-1)
	}
	if e.lapsed {
		e.lapsed = false
		e.c.sleepers.Add(-1)
	}
}

// settle answers whoever waits for the end and lets go of an entry that is
// over. Conn.mu is held.
func (e *entry) settle() {
	e.answer(e.rev, nil)
	if !e.want && !e.asleep && e.ending == "" {
		e.stopTimers()
		if e.c.entries[e.room] == e {
			delete(e.c.entries, e.room)
			e.c.ttlChanged()
		}
		e.c.closeIfOver()
	}
}

// done implements item.
func (e *entry) done(op store.Op, res store.OpResult) {
	if res.Err == nil && !res.Position.None() {
		e.c.o.cfg.Wrote(e.room, res.Position) // outside the lock
	}
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if res.Err != nil {
		e.c.o.refused(e.c.id, res.Err)
		if op.Kind != store.OpLeave {
			// The answer is known: nobody waits out his time for it. It goes on
			// being wanted, as after an outage.
			e.refusedTo(op, fmt.Errorf("%w: %w", ErrUnavailable, res.Err))
		}
		if op.Kind == store.OpJoin && op.Entry == e.id && errors.Is(res.Err, store.ErrData) {
			// Something else is in its place: it is not there. A connection that
			// closes now must not wait until it can leave.
			e.tried = false
			e.note()
		}
		e.later(res.Err)
		return
	}
	switch op.Kind {
	case store.OpLeave:
		e.ended(op, res)
	case store.OpJoin:
		e.joined(op, res)
	default:
		e.updated(op, res)
	}
	e.note()
	switch { // what changed meanwhile
	case e.differs():
		e.lane.offerAgain(e)
	case !e.want:
		e.settle()
	}
}

// differs reports whether Redis is not known to hold what it should. Conn.mu is
// held.
func (e *entry) differs() bool {
	return e.ending != "" || e.want && (!e.written || e.refresh || e.metaWritten < e.c.metaVersion || e.unwritten(e.stateWritten) != nil)
}

func (e *entry) ended(op store.Op, res store.OpResult) {
	e.endedNow = res.Status == store.Done
	if e.endedNow {
		e.c.o.stats.leaves[op.Cause].Add(1)
	}
	if e.ending == op.Entry {
		if e.endedNow && e.due > 0 {
			e.c.o.stats.late.Observe(time.Since(e.c.o.born) - e.due)
		}
		e.ending, e.due = "", 0
	}
	if res.Status == store.Other {
		// Redis went back to an earlier entry, which an audit just now left to
		// the join that was to take its place; that join will not come. Or the
		// connection is another server's, which an audit leaves alone.
		e.c.o.trouble.Store(true)
	}
}

func (e *entry) joined(op store.Op, res store.OpResult) {
	e.position, e.total = res.Position, res.Total
	if op.Entry != e.id || !e.want || e.incarnation != e.c.o.cfg.Incarnation() {
		return // it has been ended, or replaced, meanwhile: next says how it goes on
	}
	e.written, e.writtenAt, e.before, e.overdue = true, time.Now(), "", false
	e.lane.hold(e.incarnation, 1)
	e.metaWritten = op.MetaVersion
	e.wroteState(op)
	e.answerWritten()
}

func (e *entry) updated(op store.Op, res store.OpResult) {
	if op.Entry != e.id || !e.want {
		return
	}
	e.unsure = false
	switch res.Status {
	case store.Done:
		e.metaWritten = max(e.metaWritten, op.MetaVersion)
		e.wroteState(op)
		if op.Left > 0 && op.TTL == e.ttl {
			// Under another TTL it was built before the rule changed, and the
			// key has to be written, or taken away, once more.
			e.refresh = false
		}
		if op.Left > time.Second { // not silent past its TTL when it was sent
			e.overdue = false
		}
		e.answerWritten()
	case store.Gone:
		e.vanished()
	case store.Other:
		if _, own := e.c.o.past.Load(res.Holder); own {
			// Redis went back to an earlier life of this server.
			e.tried = false
			e.rejoin(e.restoring())
			return
		}
		// The same id has joined through another server, which is its owner
		// now. Fighting over it would never end.
		e.c.o.log.Warn("mesh: connection id in use on another server", "conn", e.c.id)
		e.over()
		e.answer(e.rev, ErrTaken)
	}
}

// vanished: Redis does not hold the entry any more. Somebody ended it on the
// expired key of a connection that is silent indeed, or data was lost.
func (e *entry) vanished() {
	e.refresh = false
	switch {
	case e.ttl > 0 && e.idle() >= e.ttl:
		// If data was lost, no server has told that it ended.
		e.leave(store.CauseSilent, routine)
		e.sleep()
	case e.overdue && !e.c.o.cfg.MayReturn(e.c, e.room):
		// It ended because of its silence, so this is a return and no repair.
		e.answer(e.rev, ErrUnavailable)
		e.leave(store.CauseSilent, routine)
		e.sleep()
	default:
		e.rejoin(e.restoring())
	}
}
