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
		e.incarnation = inc
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
		return
	}
	switch op.Kind {
	case store.OpLeave:
		e.leaveWritten(op, res)
	case store.OpJoin:
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
}

// differs reports whether Redis may differ from the desired state. Conn.mu is held.
func (e *entry) differs() bool {
	return e.leaving.id != "" || e.wanted() && (!e.written() || e.refresh || e.metaWritten < e.c.metaVersion || e.unwritten(e.stateWritten) != nil)
}

func (e *entry) leaveWritten(op store.Op, res store.OpResult) {
	e.endedNow = res.Status == store.Done
	if e.endedNow {
		e.c.registry.stats.leaves[op.Cause].Add(1)
	}
	if e.leaving.id == op.Entry {
		if e.endedNow && e.leaving.due > 0 {
			e.c.registry.stats.late.Observe(time.Since(e.c.registry.madeAt) - e.leaving.due)
		}
		e.leaving.id, e.leaving.due = "", 0
	}
	if res.Status == store.Other {
		// Redis went back to an earlier entry, which reconciling has just left to a join
		// that will not come now. Or another server owns the connection now, and
		// reconciling leaves it alone.
		e.c.registry.reconcileAll.Store(true)
	}
}

func (e *entry) joinWritten(op store.Op, res store.OpResult) {
	e.position, e.total = res.Position, res.Total
	if op.Entry != e.id || !e.wanted() || e.incarnation != e.c.registry.cfg.Incarnation() {
		return // ended or replaced since; next decides what follows
	}
	e.move(byJoinWritten)
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
		e.rejoin(e.restoring())
	}
}
