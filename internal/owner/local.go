package owner

import (
	"github.com/meshpresence/mesh/internal/store"
)

// tally is what Redis should hold of a room in this server's name.
type tally struct {
	written int    // entries that it is known to hold
	open    int    // entries of which that is not known, or that are being verified
	changes uint64 // of written and open so far
}

// localRoom is a room in which this server has entries. It is an item, too: its
// count in Redis. Its fields are guarded by Owner.roomsMu, except marked.
type localRoom struct {
	o      *Owner
	name   string
	lane   *lane
	marked mark // the lane's

	entries map[*entry]struct{} // that are wanted
	tally
	recount bool // the count has to be written as soon as nothing is open
	// restored is the heartbeat at which its entries were verified the last time, and
	// pause the least number of heartbeats until they are verified again.
	restored, pause uint64
	suspected       bool // its lapsed entries were verified, and none has been gone since
}

// room returns a room, made if need be. Owner.roomsMu is held.
func (o *Owner) room(e *entry) *localRoom {
	r := o.rooms[e.room]
	if r == nil {
		r = &localRoom{o: o, name: e.room, lane: e.lane, entries: make(map[*entry]struct{})}
		o.rooms[e.room] = r
	}
	return r
}

// drop forgets a room that nothing is left of. Owner.roomsMu is held.
func (r *localRoom) drop() {
	if len(r.entries) == 0 && r.tally.written == 0 && r.tally.open == 0 {
		delete(r.o.rooms, r.name)
	}
}

func (o *Owner) enter(e *entry) {
	o.roomsMu.Lock()
	defer o.roomsMu.Unlock()
	r := o.room(e)
	o.uncount(r)
	r.entries[e] = struct{}{}
	o.count(r)
}

func (o *Owner) exit(e *entry) {
	o.roomsMu.Lock()
	defer o.roomsMu.Unlock()
	r := o.rooms[e.room]
	if r == nil {
		return
	}
	o.uncount(r)
	delete(r.entries, e)
	o.count(r)
	r.drop()
}

// count and uncount keep the sums over all rooms. Owner.roomsMu is held.
func (o *Owner) count(r *localRoom) {
	o.entries += len(r.entries)
	o.inUse += one(len(r.entries) > 0)
}

func (o *Owner) uncount(r *localRoom) {
	o.entries -= len(r.entries)
	o.inUse -= one(len(r.entries) > 0)
}

// standing is one entry's part in the tally of its room.
type standing struct{ written, open bool }

// note keeps the room's tally true. Everything that changes what Redis is known
// to hold of an entry ends with it. Conn.mu is held.
func (e *entry) note() {
	is := standing{
		written: e.want && e.written,
		open:    e.ending != "" || e.want && (e.tried && !e.written || e.unsure),
	}
	if is == e.noted {
		return
	}
	was := e.noted
	e.noted = is
	if r := e.c.o.retally(e, was, is); r != nil {
		r.lane.repair(r)
	}
}

// retally returns the entry's room if its count has to be written now, nil
// otherwise.
func (o *Owner) retally(e *entry, was, is standing) *localRoom {
	o.roomsMu.Lock()
	defer o.roomsMu.Unlock()
	r := o.room(e)
	r.written += one(is.written) - one(was.written)
	r.open += one(is.open) - one(was.open)
	r.changes++
	r.suspected = r.suspected && (is.written || !was.written)
	r.drop()
	if r.recount && r.open == 0 && len(r.entries) > 0 {
		return r
	}
	return nil
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (r *localRoom) conn() *Conn  { return nil } // all of them have one turn
func (r *localRoom) place() place { return place{room: r.name} }
func (r *localRoom) mark() *mark  { return &r.marked }

// pending implements item.
func (r *localRoom) pending() bool {
	r.o.roomsMu.RLock()
	defer r.o.roomsMu.RUnlock()
	return r.recount && r.tally.written > 0
}

// next implements item. The count is exact: while something is open, which is
// also while a batch with a join or a leave of this room is under way, there is
// nothing to write.
func (r *localRoom) next(string, *store.Op) (store.Op, bool) {
	r.o.roomsMu.RLock()
	defer r.o.roomsMu.RUnlock()
	op := store.Op{Kind: store.OpRecount, Room: r.name, Entries: r.tally.written}
	return op, r.recount && r.tally.written > 0 && r.tally.open == 0
}

// done implements item. What Redis refused, a later heartbeat finds again.
func (r *localRoom) done(_ store.Op, res store.OpResult) {
	r.o.roomsMu.Lock()
	defer r.o.roomsMu.Unlock()
	r.recount = false
	if res.Err == nil && res.Status == store.Done {
		r.pause = 0
	}
}

// mayRestore reports whether the room's entries are to be verified because its count
// is wrong. While Redis does not take the right count, that would not help: it is
// done less and less often then.
func (r *localRoom) mayRestore() bool {
	r.o.roomsMu.Lock()
	defer r.o.roomsMu.Unlock()
	if r.pause > 0 && r.o.beats-r.restored < r.pause {
		return false
	}
	r.restored, r.pause = r.o.beats, min(max(2*r.pause, 1), restoreRarely)
	return true
}
