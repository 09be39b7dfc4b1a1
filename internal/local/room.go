package local

import (
	"github.com/meshpresence/mesh/internal/store"
)

// roomCount is the number of entries of this server that Redis should hold in a room.
type roomCount struct {
	written   int    // entries that Redis is known to hold
	uncertain int    // entries that Redis may hold, or that are being verified
	changes   uint64 // of written and uncertain
}

// roomEntries holds the entries of this server in a room. It is also the item that writes
// the room's count to Redis. Its fields are guarded by Registry.roomsMu, except inQueue.
type roomEntries struct {
	registry *Registry
	name     string
	writer   *bucketWriter
	inQueue  queueState // guarded by writer.mu

	entries map[*entry]struct{} // the wanted ones
	roomCount
	recount bool // write the count as soon as nothing is uncertain
	// restoredAt is the heartbeat at which the entries were last verified. restorePause
	// is the least number of heartbeats until they are verified again.
	restoredAt, restorePause uint64
	lapsedVerified           bool // its lapsed entries were verified, and none has been missing since
}

// room returns the entries of a room and adds the room if it is new. Registry.roomsMu is
// held.
func (r *Registry) room(e *entry) *roomEntries {
	re := r.rooms[e.room]
	if re == nil {
		re = &roomEntries{registry: r, name: e.room, writer: e.writer, entries: make(map[*entry]struct{})}
		r.rooms[e.room] = re
	}
	return re
}

// removeIfEmpty removes a room without entries. Registry.roomsMu is held.
func (re *roomEntries) removeIfEmpty() {
	if len(re.entries) == 0 && re.roomCount.written == 0 && re.roomCount.uncertain == 0 {
		delete(re.registry.rooms, re.name)
	}
}

func (r *Registry) addEntry(e *entry) {
	r.roomsMu.Lock()
	defer r.roomsMu.Unlock()
	re := r.room(e)
	r.uncount(re)
	re.entries[e] = struct{}{}
	r.count(re)
}

func (r *Registry) removeEntry(e *entry) {
	r.roomsMu.Lock()
	defer r.roomsMu.Unlock()
	re := r.rooms[e.room]
	if re == nil {
		return
	}
	r.uncount(re)
	delete(re.entries, e)
	r.count(re)
	re.removeIfEmpty()
}

// Some returns at most limit (negative: all) of the connections of this server that are
// in room, and the number of all of them.
func (r *Registry) Some(room string, limit int) (list []*Conn, total int) {
	r.roomsMu.RLock()
	defer r.roomsMu.RUnlock()
	re := r.rooms[room]
	if re == nil {
		return nil, 0
	}
	for e := range re.entries {
		if limit >= 0 && len(list) >= limit {
			break
		}
		list = append(list, e.c)
	}
	return list, len(re.entries)
}

// count and uncount keep the sums over all rooms. Registry.roomsMu is held.
func (r *Registry) count(re *roomEntries) {
	r.entries += len(re.entries)
	r.inUse += one(len(re.entries) > 0)
}

func (r *Registry) uncount(re *roomEntries) {
	r.entries -= len(re.entries)
	r.inUse -= one(len(re.entries) > 0)
}

// countedAs is the part of one entry in the count of its room.
type countedAs struct{ written, uncertain bool }

// updateRoomCount updates the count of the room. Every change of what Redis is known to
// hold of an entry ends with it. Conn.mu is held.
func (e *entry) updateRoomCount() {
	is := countedAs{
		written:   e.written(),
		uncertain: e.leaving.id != "" || e.phase == sent || e.phase == verifying,
	}
	if is == e.counted {
		return
	}
	was := e.counted
	e.counted = is
	if re := e.c.registry.recountEntry(e, was, is); re != nil {
		re.writer.enqueueBackground(re)
	}
}

// recountEntry returns the room of the entry if its count has to be written now, and nil
// otherwise.
func (r *Registry) recountEntry(e *entry, was, is countedAs) *roomEntries {
	r.roomsMu.Lock()
	defer r.roomsMu.Unlock()
	re := r.room(e)
	re.written += one(is.written) - one(was.written)
	re.uncertain += one(is.uncertain) - one(was.uncertain)
	re.changes++
	re.lapsedVerified = re.lapsedVerified && (is.written || !was.written)
	re.removeIfEmpty()
	if re.recount && re.uncertain == 0 && len(re.entries) > 0 {
		return re
	}
	return nil
}

func one(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (re *roomEntries) conn() *Conn             { return nil } // all of them have one turn
func (re *roomEntries) key() queueKey           { return queueKey{room: re.name} }
func (re *roomEntries) queueState() *queueState { return &re.inQueue }

// pending implements writable.
func (re *roomEntries) pending() bool {
	re.registry.roomsMu.RLock()
	defer re.registry.roomsMu.RUnlock()
	return re.recount && re.roomCount.written > 0
}

// next implements writable. The count is exact. While something is uncertain, for example
// while a join or leave of this room is in flight, there is nothing to write.
func (re *roomEntries) next(string, *store.Op) (store.Op, bool) {
	re.registry.roomsMu.RLock()
	defer re.registry.roomsMu.RUnlock()
	op := store.Op{Kind: store.OpRecount, Room: re.name, Entries: re.roomCount.written}
	return op, re.recount && re.roomCount.written > 0 && re.roomCount.uncertain == 0
}

// done implements writable. A later heartbeat finds what Redis refused.
func (re *roomEntries) done(_ store.Op, res store.OpResult) {
	re.registry.roomsMu.Lock()
	defer re.registry.roomsMu.Unlock()
	re.recount = false
	if res.Err == nil && res.Status == store.Done {
		re.restorePause = 0
	}
}

// mayRestore reports whether the entries of the room may be verified because its count is
// wrong. If Redis does not take the right count, that does not help, so it is done less
// and less often.
func (re *roomEntries) mayRestore() bool {
	re.registry.roomsMu.Lock()
	defer re.registry.roomsMu.Unlock()
	if re.restorePause > 0 && re.registry.heartbeats-re.restoredAt < re.restorePause {
		return false
	}
	re.restoredAt, re.restorePause = re.registry.heartbeats, min(max(2*re.restorePause, 1), maxRestorePause)
	return true
}
