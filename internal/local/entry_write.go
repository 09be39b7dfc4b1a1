package local

import (
	"errors"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

func (e *entry) conn() *Conn { return e.c }

func (e *entry) key() queueKey { return queueKey{room: e.room} }

func (e *entry) queueState() *queueState { return &e.inQueue }

// pending implements writable.
func (e *entry) pending() bool {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if e.leaving.id == "" && !e.wanted() {
		e.removeIfEnded()
		return false
	}
	return true
}

// next implements writable.
func (e *entry) next(inc string, after *store.Op) (store.Op, bool) {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if after != nil {
		return e.nextState(after)
	}
	defer e.updateRoomCount()
	op := store.Op{Room: e.room, Conn: e.c.id, Entry: e.id, TTL: e.ttl}
	switch {
	case e.leaving.id != "":
		op.Kind, op.Entry, op.Cause, op.Stated, op.Known = store.OpLeave, e.leaving.id, e.leaving.cause, e.leaving.hasState, e.leaving.known
		op.Keep, op.User, op.Grace = e.leaving.keep, e.c.userID(), e.grace()
		return op, true
	case !e.wanted():
		e.removeIfEnded()
		return op, false
	case e.tried() && e.incarnation != inc:
		// The incarnation has changed. The old id, whether it was written or not, belongs
		// to the old incarnation and ends with it.
		e.renewID()
		op.Entry = e.id
	}
	e.built = e.rev
	if !e.written() {
		e.makeJoin(&op)
		e.incarnation, e.resent = inc, e.phase == sent
		e.move(bySend)
		return op, true
	}
	if !e.makeUpdate(&op) {
		e.answer(e.rev, nil)
		return op, false
	}
	return op, true
}

// makeJoin makes op the join of the entry. Conn.mu is held.
func (e *entry) makeJoin(op *store.Op) {
	op.Kind = store.OpJoin
	op.MetaVersion, op.Meta = e.c.metaVersion, e.c.meta
	op.User, op.Grace = e.c.userID(), e.grace()
	switch {
	case e.acknowledged:
		op.Rebuild = e.c.registry.cfg.RebuildFor
	case e.overCap:
		op.Replaces = e.replaces()
	default:
		op.Replaces = e.replaces()
		op.MaxConnections, op.MaxUsers = e.c.registry.cfg.Caps(e.room)
	}
	e.putState(op, &e.state) // a new entry has no older ones
	op.Stated = e.replaced.known
	if e.ttl > 0 {
		op.Left = e.keyLife()
	}
}

// makeUpdate makes op an update of the entry, and returns false if nothing has changed.
// Conn.mu is held.
func (e *entry) makeUpdate(op *store.Op) (changed bool) {
	op.Kind = store.OpUpdate
	if e.metaWritten < e.c.metaVersion {
		op.MetaVersion, op.Meta, changed = e.c.metaVersion, e.c.meta, true
	}
	if e.personal { // the user of an op is that of its metadata
		op.Person, op.User, op.Grace = true, e.c.userID(), e.grace()
		op.MetaVersion, op.Meta, changed = e.c.metaVersion, e.c.meta, true
	}
	if s := e.unwritten(e.stateWritten); s != nil {
		e.putState(op, s)
		changed = true
	}
	if e.refresh {
		op.Left, changed = time.Millisecond, true // without a TTL this deletes the key
		if e.ttl > 0 {
			op.Left = e.keyLife()
		}
	}
	return changed
}

// keyLife returns the rest of the life of the per-connection key. Conn.mu is held.
func (e *entry) keyLife() time.Duration {
	return max(e.ttl+time.Second-e.idle(), time.Millisecond)
}

// done implements writable.
func (e *entry) done(op store.Op, res store.OpResult) {
	if res.Err == nil && !res.Position.None() {
		e.c.registry.cfg.OnPosition(e.room, res.Position) // without the lock
	}
	e.c.registry.noteAnswer(e.c, op, res)
	if e.take(op, res) {
		e.c.registry.cfg.Full(e.c, e.room, res.FullOf)
	}
}

// take takes the result of an op. It reports whether the entry was promised to the client
// and has ended because the room is full.
func (e *entry) take(op store.Op, res store.OpResult) (broken bool) {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if res.Err != nil {
		e.c.registry.refused(e.c.id, res.Err)
		if op.Kind != store.OpLeave {
			// The answer is known, so the callers need not wait for their timeout. The
			// entry stays wanted, as after an outage.
			e.answerRefused(op, fmt.Errorf("%w: %w", ErrUnavailable, res.Err))
		}
		if op.Kind == store.OpJoin && op.Entry == e.id && e.wanted() && errors.Is(res.Err, store.ErrData) {
			// A key of another kind is in its place, so Redis does not hold the entry. A
			// closing connection must not wait until it can leave.
			e.move(byRefusal)
			e.updateRoomCount()
		}
		e.retryLater(res.Err)
		return false
	}
	switch {
	case op.Kind == store.OpLeave:
		e.leaveWritten(op, res)
	case op.Kind == store.OpJoin && res.Status == store.Full:
		broken = e.joinFull(op, res)
	case op.Kind == store.OpJoin:
		e.joinWritten(op, res)
	default:
		e.updateWritten(op, res)
	}
	e.updateRoomCount()
	switch { // changes since the op was made
	case e.differs():
		e.writer.enqueueAgain(e)
	case !e.wanted():
		e.removeIfEnded()
	}
	return broken
}

// differs reports whether Redis may differ from the desired state. Conn.mu is held.
func (e *entry) differs() bool {
	return e.leaving.id != "" || e.wanted() &&
		(!e.written() || e.refresh || e.personal || e.metaWritten < e.c.metaVersion || e.unwritten(e.stateWritten) != nil)
}

func (e *entry) leaveWritten(op store.Op, res store.OpResult) {
	e.endedNow = res.Status == store.Done
	if e.endedNow && res.KeptUntil == 0 {
		e.c.registry.stats.leaves[op.Cause].Add(1)
	}
	if e.leaving.id == op.Entry {
		if e.endedNow && e.leaving.due > 0 {
			e.c.registry.stats.late.Observe(time.Since(e.c.registry.madeAt) - e.leaving.due)
		}
		e.leaving.due = 0
		if op.Keep && !e.leaving.keep && res.KeptUntil > 0 {
			return // the connection has asked to leave since, so the place must end
		}
		e.leaving.id = ""
		if e.leftPlace(op, res) {
			return
		}
	}
	if res.Status == store.Other {
		// Redis went back to an earlier entry, which reconciling has just left to a join
		// that will not come now. Or another server owns the connection now, and
		// reconciling leaves it alone.
		e.c.registry.reconcileAll.Store(true)
	}
}

func (e *entry) joinWritten(op store.Op, res store.OpResult) {
	e.position, e.total, e.users = res.Position, int32(res.Total), int32(res.Users)
	if !e.wanted() || op.Entry != e.id && op.Entry != e.replaced.id {
		return // ended since; next decides what follows
	}
	e.acknowledged = true
	e.setReplaces("")
	if res.Replaced != "" {
		e.setTook(res.Replaced)
	}
	if op.Entry != e.id {
		e.replaced.known = true
		return // next writes it under its new id
	}
	e.setKept("")
	if e.incarnation != e.c.registry.cfg.Incarnation() {
		return // next writes it again
	}
	e.move(byJoinWritten)
	e.personal = op.User != e.c.userID() || op.Grace != e.grace()
	e.writtenAt, e.replaced, e.overdue = time.Now(), replaced{}, false
	e.metaWritten = op.MetaVersion
	e.wroteState(op)
	e.answerWritten()
}

func (e *entry) updateWritten(op store.Op, res store.OpResult) {
	if op.Entry != e.id || !e.wanted() {
		return
	}
	switch res.Status {
	case store.Done:
		e.move(byUpdateWritten)
		e.metaWritten = max(e.metaWritten, op.MetaVersion)
		e.wroteState(op)
		if op.Person && op.User == e.c.userID() && op.Grace == e.grace() {
			e.personal = false
		}
		if op.Left > 0 && op.TTL == e.ttl {
			// An op with another TTL was made before the rules changed. The key has to be
			// written or deleted once more.
			e.refresh = false
		}
		if op.Left > time.Second { // it was not silent past its TTL when the op was sent
			e.overdue = false
		}
		e.answerWritten()
	case store.Gone:
		e.handleMissing()
	case store.Other:
		if _, own := e.c.registry.ownIncarnations.Load(res.Owner); own {
			e.rejoin(e.restoring())
			e.replaced = replaced{} // Redis went back to an earlier incarnation of this server, and does not hold it
			return
		}
		// The same id has joined through another server, which owns it now. Writing it
		// again would be answered the same way forever.
		e.c.registry.log.Warn("mesh: connection id in use on another server", "conn", e.c.id)
		e.end(byConflict)
		e.answer(e.rev, ErrOwnedElsewhere)
	}
}

// handleMissing handles an entry that Redis no longer holds: a server ended it after its
// key had expired, or Redis lost data.
func (e *entry) handleMissing() {
	e.refresh = false
	switch {
	case e.ttl > 0 && e.idle() >= e.ttl:
		// If Redis lost data, no event has announced the leave.
		e.leaveSilent(routine)
	case e.overdue && !e.c.registry.cfg.MayReturn(e.c, e.room):
		// The entry ended by silence, so this is a return and not a repair.
		e.answer(e.rev, ErrUnavailable)
		e.leaveSilent(routine)
	default:
		if e.overdue { // a return: it arrives, and needs a place
			e.acknowledged, e.promised = false, true
		}
		e.rejoin(e.restoring())
	}
}
