package local

import "github.com/meshpresence/mesh/internal/store"

// orphan is an entry or connection in the index of this server in Redis that this server
// does not have.
type orphan struct {
	registry *Registry
	ref      store.EntryRef
	op       store.Op
	inQueue  queueState // guarded by the writer's mu
}

func (o *orphan) conn() *Conn { return nil } // all of them have one turn

func (o *orphan) key() queueKey { return queueKey{} }

func (o *orphan) queueState() *queueState { return &o.inQueue }

// next implements writable.
func (o *orphan) next(_ string, after *store.Op) (store.Op, bool) {
	return o.op, after == nil && o.pending()
}

// done implements writable.
func (o *orphan) done(op store.Op, res store.OpResult) {
	o.registry.noteAnswer(nil, op, res)
	if op.Kind == store.OpLeave && res.Err == nil && res.Status == store.Done && res.KeptUntil == 0 {
		o.registry.stats.leaves[op.Cause].Add(1)
	}
}

// has reports whether this server has an index member, or is about to end it anyway.
func (r *Registry) has(ref store.EntryRef) bool {
	r.mu.RLock()
	c := r.conns[ref.Conn]
	r.mu.RUnlock()
	if c == nil {
		return false
	}
	if ref.Room == "" {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[ref.Room]
	return e != nil && ((e.wanted() && e.id == ref.Entry) || e.leaving.id == ref.Entry)
}

// returned reports whether an index member belongs to a connection that has left the room
// and joined it again, while Redis does not show the new entry because it has gone back
// in time. The new join replaces the old entry. Ending the old one would announce a leave
// of a member that is there.
func (r *Registry) returned(ref store.EntryRef, seen map[store.EntryRef]struct{}) bool {
	r.mu.RLock()
	c := r.conns[ref.Conn]
	r.mu.RUnlock()
	if c == nil || ref.Room == "" {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[ref.Room]
	if e == nil || !e.wanted() {
		return false
	}
	_, shown := seen[store.EntryRef{Conn: ref.Conn, Entry: e.id, Room: ref.Room}]
	return !shown
}

// endOrphan ends an index member. If this server has handed the entry over, Redis has gone
// back to a time before that, and the entry is handed over again.
func (r *Registry) endOrphan(w *bucketWriter, ref store.EntryRef) {
	r.stats.orphans.Add(1)
	op := store.Op{Kind: store.OpLeave, Room: ref.Room, Conn: ref.Conn, Entry: ref.Entry, Cause: store.CauseClosed, Known: true}
	if h, ok := r.handed.find(ref); ok {
		op.Cause, op.Keep, op.Grace = h.cause, h.keep, h.life
	}
	if ref.Room == "" {
		op = store.Op{Kind: store.OpDisconnect, Conn: ref.Conn}
	}
	w.enqueue(&orphan{registry: r, ref: ref, op: op}, background)
}

// pending implements writable. It reports whether the item is still an orphan.
func (o *orphan) pending() bool { return !o.registry.has(o.ref) }
