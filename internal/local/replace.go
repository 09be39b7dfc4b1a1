package local

import "github.com/meshpresence/mesh/internal/store"

// Forget is called when another connection has taken the place of conn by the join at
// pos. The entry of conn is no longer wanted and is not written again. If the entry is a
// newer one, which Redis has acknowledged after pos, nothing happens. Forget returns the
// Conn that has lost its entry, nil if there is none.
func (r *Registry) Forget(room, conn string, pos store.Position) *Conn {
	return r.forget(room, conn, pos, true)
}

// forget is Forget. listed: Redis has left the entry in the index of this server.
func (r *Registry) forget(room, conn string, pos store.Position, listed bool) *Conn {
	r.handed.drop(roomConn{room, conn})
	r.mu.RLock()
	c := r.conns[conn]
	r.mu.RUnlock()
	if c == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	switch {
	case e == nil || e.position.Epoch == pos.Epoch && e.position.Seq > pos.Seq:
		return nil
	case !e.in():
		e.leaving.known = false // Redis has published its end
		return nil
	}
	e.forget(listed)
	return c
}

// forget ends the entry here, because another connection has its place. Conn.mu is held.
func (e *entry) forget(listed bool) {
	e.setKept("")
	e.leaving.keep, e.leaving.known = false, false
	// A leave removes the entry from the index, and ends a join that is on its way.
	switch {
	case e.tried() && (listed || !e.written()):
		e.leaving.id, e.leaving.cause = e.id, store.CauseReplaced
	case e.replaced.id != "":
		e.leaving.id, e.leaving.cause = e.replaced.id, store.CauseReplaced
	}
	e.leaving.hasState = e.leaving.hasState || e.state.data != nil || e.stateWritten < e.state.version
	e.end(byForget)
	e.answer(e.rev, ErrNotPresent)
	e.changed(routine)
}

// noteAnswer does for the registry and the app what follows from the answer to an op,
// whether or not the connection has gone on since. No lock is held.
func (r *Registry) noteAnswer(c *Conn, op store.Op, res store.OpResult) {
	at := roomConn{op.Room, op.Conn}
	switch {
	case r.cfg.UserOf == nil || res.Err != nil:
	case op.Kind == store.OpJoin && res.Status == store.Done:
		r.handed.drop(at)
		if res.Replaced != "" {
			r.noteReplaced(c, op.Room, res)
		}
	case op.Kind == store.OpLeave && res.KeptUntil > 0:
		r.noteKept(op, res.KeptUntil)
	case op.Kind == store.OpLeave && res.Status != store.Other: // Redis holds nothing of the connection
		r.handed.drop(at)
	}
}

// noteReplaced notes that a join took the place of another entry.
func (r *Registry) noteReplaced(by *Conn, room string, res store.OpResult) {
	if res.ReplacedOwner == store.NoOwner {
		r.stats.returned.Add(1)
		r.handed.drop(roomConn{room, res.Replaced})
	} else {
		r.stats.replaced.Add(1)
		if _, own := r.ownIncarnations.Load(res.ReplacedOwner); own {
			r.forget(room, res.Replaced, res.Position, res.ReplacedOwner != r.cfg.Incarnation())
		}
	}
	r.cfg.Replaced(room, res.Replaced, res.ReplacedOwner, by, res.Position)
}

// noteKept notes that Redis keeps the place of an entry that ended.
func (r *Registry) noteKept(op store.Op, until int64) {
	r.handed.remember(r.cfg.Wheel, roomConn{op.Room, op.Conn}, handedOver{
		entry: op.Entry, cause: op.Cause, keep: op.Keep, life: max(op.Grace, r.cfg.RebuildFor),
	})
	r.cfg.Kept(op.Room, op.Conn, op.Entry, op.User, until)
}
