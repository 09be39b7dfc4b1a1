package local

import (
	"hash/maphash"
	"maps"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// checkAll is the most rooms and keys that are all checked at each heartbeat. A
	// server with more of them checks half at each heartbeat.
	checkAll = 32 << 10
	// indexAll is the most rooms of a bucket whose place on the index of rooms is checked
	// at each heartbeat. Of more rooms a sample is checked, all of them every indexEvery
	// heartbeats, and all of them if the sample shows a loss.
	indexAll   = 1024
	indexEvery = 10
	// maxRestorePause is the longest pause, in heartbeats, between two attempts to
	// restore a room whose count Redis does not take.
	maxRestorePause = 32
	// keyMargin is the rest of a key's life in which the key is no longer checked.
	keyMargin = 2 * time.Second
)

// ownKey is a key that must exist, with the entry or connection that it belongs to.
type ownKey struct {
	ref   store.KeyRef
	entry *entry // nil: the registration of the connection
	conn  *Conn
}

// checklist lists the rooms and keys that one writer expects in Redis.
type checklist struct {
	rooms []*roomEntries
	keys  []ownKey
	total int // rooms of the writer, including those not on the list
}

// checklists collects what all writers expect. On a server with very many rooms and keys,
// the parity of the heartbeat chooses half of them.
func (r *Registry) checklists() []checklist {
	r.heartbeats++
	lists := make([]checklist, len(r.writers))
	conns := r.Conns()
	r.roomsMu.RLock()
	half := len(r.rooms)+r.entries+len(conns) > checkAll
	for _, re := range r.rooms {
		if re.written == 0 {
			continue
		}
		list := &lists[re.writer.bucket]
		list.total++
		if !half || r.checksNow(re.name) {
			list.rooms = append(list.rooms, re)
		}
	}
	r.roomsMu.RUnlock()
	inc := r.cfg.Incarnation()
	for _, c := range conns {
		if !half || r.checksNow(c.id) {
			c.listKeys(lists, inc)
		}
	}
	return lists
}

// checksNow reports whether a name is in the half that this heartbeat checks.
func (r *Registry) checksNow(name string) bool {
	return (maphash.String(r.seed, name)^r.heartbeats)&1 == 0
}

// listKeys adds the keys that Redis must hold for a connection beside the hashes of its
// rooms.
func (c *Conn) listKeys(lists []checklist, inc string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reg.written && c.reg.incarnation == inc && !c.closed {
		list := &lists[c.reg.writer().bucket]
		list.keys = append(list.keys, ownKey{ref: store.KeyRef{Kind: store.KeyConnMeta, Conn: c.id}, conn: c})
	}
	for _, e := range c.entries {
		list := &lists[e.writer.bucket]
		for _, kind := range []store.KeyKind{store.KeyConn, store.KeyState} {
			if e.needs(kind) {
				list.keys = append(list.keys, ownKey{ref: store.KeyRef{Kind: kind, Room: e.room, Conn: c.id}, entry: e, conn: c})
			}
		}
	}
}

// needs reports whether the entry has a key of that kind in Redis whose loss only the key
// check can find. Conn.mu is held.
func (e *entry) needs(kind store.KeyKind) bool {
	if !e.written() {
		return false
	}
	if kind == store.KeyState {
		return e.state.data != nil && e.stateWritten == e.state.version &&
			(e.state.until == 0 || e.state.until-time.Since(e.c.registry.madeAt) > keyMargin)
	}
	// A refresh within two heartbeats restores the key.
	return e.ttl > 0 && (e.ttl+time.Second)/3 > 2*e.c.registry.cfg.Heartbeat && e.ttl-e.idle() > keyMargin
}

// checkBucketKeys compares the rooms and keys that a writer expects with Redis, some
// hundred per call. It queues missing ones as background work. It returns the size of the
// writer's index in Redis, or -1 if that is unknown.
func (r *Registry) checkBucketKeys(w *bucketWriter, inc string, list checklist) (owned int64) {
	all, owned := list.total <= indexAll || r.heartbeats%indexEvery == 0, int64(-1)
	for first := true; len(list.rooms)+len(list.keys) > 0; first = false {
		n := min(len(list.rooms), store.CheckSize)
		m := min(len(list.keys), store.CheckSize-n)
		before := w.indexState(inc)
		c, err := r.checkKeys(w, inc, list.rooms[:n], list.keys[:m], store.CheckList{Own: first, Index: all || first})
		if err != nil {
			r.cfg.Logger.Debug("mesh: key check not finished", "bucket", w.bucket, "error", err)
			return owned
		}
		if first {
			owned = c.Owned
			r.checkIndexAndFence(w, inc, before, c)
		}
		all = all || slices.ContainsFunc(c.Rooms, func(room store.RoomCheck) bool { return room.Members && !room.Listed })
		list.rooms, list.keys = list.rooms[n:], list.keys[m:]
	}
	return owned
}

// checkKeys makes one call of checkBucketKeys.
func (r *Registry) checkKeys(w *bucketWriter, inc string, rooms []*roomEntries, keys []ownKey, ask store.CheckList) (store.Checked, error) {
	names, before := make([]string, len(rooms)), make([]roomCount, len(rooms))
	r.roomsMu.RLock()
	for i, re := range rooms {
		names[i], before[i] = re.name, re.roomCount
	}
	r.roomsMu.RUnlock()
	ask.Rooms, ask.Keys = names, make([]store.KeyRef, len(keys))
	for i := range keys {
		ask.Keys[i] = keys[i].ref
	}
	c, err := r.cfg.Store.Check(r.stop, w.bucket, inc, ask)
	if err != nil || r.cfg.Incarnation() != inc {
		return c, err
	}
	lost, unlisted := r.roomLosses(rooms, before, c.Rooms)
	if len(lost)+len(unlisted)+len(c.Missing) > 0 {
		r.log.Warn("mesh: redis has lost keys, writing them again",
			"rooms", len(lost), "off the index of rooms", len(unlisted), "other keys", len(c.Missing))
	}
	for _, re := range lost {
		r.restore(re)
	}
	for _, re := range unlisted {
		r.recount(re)
	}
	for i, room := range c.Rooms {
		if room.Uncounted {
			r.recount(rooms[i])
		}
	}
	for _, i := range c.Missing {
		keys[i].restore(inc)
	}
	return c, nil
}

// roomLosses returns the rooms that Redis has lost entries of, and those that are missing
// on the index of rooms. before are their counts before the call that returned found.
func (r *Registry) roomLosses(rooms []*roomEntries, before []roomCount, found []store.RoomCheck) (lost, unlisted []*roomEntries) {
	var lapsed []*roomEntries
	r.roomsMu.RLock()
	for i, re := range rooms {
		switch found := found[i]; {
		case before[i].contradicts(re.roomCount, found) && found.Members && !r.cfg.EndSilent:
			lapsed = append(lapsed, re)
		case before[i].contradicts(re.roomCount, found):
			lost = append(lost, re)
		case !found.Listed && before[i].written > before[i].slack(re.roomCount):
			unlisted = append(unlisted, re)
		}
	}
	r.roomsMu.RUnlock()
	lost = append(lost, slices.DeleteFunc(lapsed, r.verifyLapsed)...)
	lost = slices.DeleteFunc(lost, func(re *roomEntries) bool { return !re.mayRestore() })
	return lost, unlisted
}

// slack returns the number of entries by which Redis may differ from a count that was
// taken before the call, given the count after it.
func (c roomCount) slack(after roomCount) int { return c.uncertain + int(after.changes-c.changes) }

// contradicts reports whether the numbers found for a room prove that Redis has lost
// something.
func (c roomCount) contradicts(after roomCount, found store.RoomCheck) bool {
	slack := c.slack(after)
	if found.Entries < 0 { // another program's key
		return false
	}
	off := found.Entries - c.written
	return max(off, -off) > slack || !found.Members && c.written > slack
}

// restore verifies every entry of a room, and then writes the room's count.
func (r *Registry) restore(re *roomEntries) {
	r.roomsMu.RLock()
	entries := make([]*entry, 0, len(re.entries))
	for e := range re.entries {
		entries = append(entries, e)
	}
	r.roomsMu.RUnlock()
	for _, e := range entries {
		e.c.mu.Lock()
		e.verify()
		e.c.mu.Unlock()
	}
	r.recount(re)
}

// verifyLapsed verifies those entries of a room that have lapsed. Another server may have
// cleaned them up; then nothing is lost. It returns false if there are none, or if none
// was missing the last time.
func (r *Registry) verifyLapsed(re *roomEntries) (found bool) {
	r.roomsMu.Lock()
	again := re.lapsedVerified
	re.lapsedVerified = !again
	entries := slices.Collect(maps.Keys(re.entries))
	r.roomsMu.Unlock()
	if again {
		return false
	}
	for _, e := range entries {
		e.c.mu.Lock()
		if e.lapsed {
			e.verify()
			found = true
		}
		e.c.mu.Unlock()
	}
	return found
}

// recount writes the count of a room and its place on the index, as soon as the room has
// no uncertain entries.
func (r *Registry) recount(re *roomEntries) {
	r.roomsMu.Lock()
	re.recount = true
	now := re.uncertain == 0
	r.roomsMu.Unlock()
	if now {
		re.writer.enqueueBackground(re)
	}
}

// restore writes the entry or registration of a missing key again.
func (k *ownKey) restore(inc string) {
	k.conn.mu.Lock()
	defer k.conn.mu.Unlock()
	if k.entry != nil {
		if k.entry.needs(k.ref.Kind) {
			k.entry.verify()
		}
		return
	}
	if r := &k.conn.reg; r.written && r.incarnation == inc && !k.conn.closed {
		r.forgetWritten()
		r.writer().enqueueBackground(r)
	}
}

// verify writes the entry again. If Redis holds a record that is as new, the write
// changes nothing. Conn.mu is held.
func (e *entry) verify() {
	if !e.written() {
		return
	}
	e.move(byVerify)
	e.refresh, e.stateWritten, e.metaWritten = true, 0, 0
	e.personal = e.c.user != nil
	e.updateRoomCount()
	e.writer.enqueueBackground(e)
}

func (w *bucketWriter) enqueueBackground(it writable) { w.enqueue(it, background) }

// indexState is the expected size of a writer's index, with its uncertainty.
type indexState struct {
	stored    int64
	unwritten int
	changes   uint64
}

func (w *bucketWriter) indexState(inc string) (s indexState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.storedOf == inc {
		s.stored = w.stored
	}
	s.unwritten, s.changes = w.queue.n+w.takenOps, w.changes
	return s
}

// checkIndexAndFence checks whether the index and the fence of a writer exist.
func (r *Registry) checkIndexAndFence(w *bucketWriter, inc string, before indexState, c store.Checked) {
	if r.cfg.Incarnation() != inc {
		return
	}
	after := w.indexState(inc)
	slack := int64(before.unwritten+after.unwritten) + int64(after.changes-before.changes)
	if c.Owned >= 0 && c.Owned < (before.stored-slack+1)/2 {
		r.reconcileBucket(w, inc) // the key was lost; compareIndex handles smaller differences
	}
	w.mu.Lock()
	lost := !c.Fenced && w.confirmedOf == inc && w.confirmed > 0
	w.mu.Unlock()
	if lost {
		// Redis may have lost more than the fence, so everything is compared.
		w.noteConfirmed("", 0)
		w.reconcileDue = true
		w.enqueueBackground(&fenceTouch{})
	}
}

// fenceTouch is an item whose batch restores the fence.
type fenceTouch struct {
	inQueue queueState
	written bool // used by run only
}

func (t *fenceTouch) conn() *Conn             { return nil }
func (t *fenceTouch) key() queueKey           { return queueKey{} }
func (t *fenceTouch) queueState() *queueState { return &t.inQueue }
func (t *fenceTouch) pending() bool           { return true }

// next implements writable.
func (t *fenceTouch) next(string, *store.Op) (store.Op, bool) {
	return store.Op{Kind: store.OpTouch}, !t.written
}

// done implements writable.
func (t *fenceTouch) done(store.Op, store.OpResult) { t.written = true }
