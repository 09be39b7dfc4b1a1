package owner

import (
	"hash/maphash"
	"maps"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// checkAll is the number of rooms and keys up to which all are checked at each heartbeat. A
	// server with more checks half of them at each.
	checkAll = 32 << 10
	// indexAll is the number of rooms of a bucket up to which all are looked for on the index of
	// rooms at each heartbeat. Of more rooms a sample is, unless it shows a loss,
	// and all of them every indexEvery heartbeats.
	indexAll   = 1024
	indexEvery = 10
	// restoreRarely is the longest pause, in heartbeats, between two attempts to
	// restore a room whose count Redis does not take.
	restoreRarely = 32
	// keyMargin: a key is no longer looked for this long before it runs out.
	keyMargin = 2 * time.Second
)

// ownKey is a key that must exist, with the entry or connection that it belongs to.
type ownKey struct {
	ref   store.KeyRef
	entry *entry // nil: the connection's registration
	conn  *Conn
}

// checklist lists the rooms and keys that one lane expects in Redis.
type checklist struct {
	rooms []*localRoom
	keys  []ownKey
	total int // rooms of the lane, also those that are not on the list
}

// checklists collects what all lanes expect. On a server with very many rooms
// and keys, the parity of the heartbeat chooses half of them.
func (o *Owner) checklists() []checklist {
	o.beats++
	lists := make([]checklist, len(o.lanes))
	conns := o.Conns()
	o.roomsMu.RLock()
	half := len(o.rooms)+o.entries+len(conns) > checkAll
	for _, r := range o.rooms {
		if r.written == 0 {
			continue
		}
		list := &lists[r.lane.bucket]
		list.total++
		if !half || o.hasTurn(r.name) {
			list.rooms = append(list.rooms, r)
		}
	}
	o.roomsMu.RUnlock()
	inc := o.cfg.Incarnation()
	for _, c := range conns {
		if !half || o.hasTurn(c.id) {
			c.listKeys(lists, inc)
		}
	}
	return lists
}

// hasTurn reports whether a name is in the half that this heartbeat checks.
func (o *Owner) hasTurn(name string) bool {
	return (maphash.String(o.seed, name)^o.beats)&1 == 0
}

// listKeys adds the keys that Redis must hold of a connection beside the hashes
// of its rooms.
func (c *Conn) listKeys(lists []checklist, inc string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reg.written && c.reg.incarnation == inc && !c.closed {
		list := &lists[c.reg.lane().bucket]
		list.keys = append(list.keys, ownKey{ref: store.KeyRef{Kind: store.KeyConnMeta, Conn: c.id}, conn: c})
	}
	for _, e := range c.entries {
		list := &lists[e.lane.bucket]
		for _, kind := range []store.KeyKind{store.KeyConn, store.KeyState} {
			if e.needs(kind) {
				list.keys = append(list.keys, ownKey{ref: store.KeyRef{Kind: kind, Room: e.room, Conn: c.id}, entry: e, conn: c})
			}
		}
	}
}

// needs reports whether the entry has a key of that kind in Redis that only a
// check can find missing. Conn.mu is held.
func (e *entry) needs(kind store.KeyKind) bool {
	if !e.want || !e.written {
		return false
	}
	if kind == store.KeyState {
		return e.state.data != nil && e.stateWritten == e.state.version &&
			(e.state.until == 0 || e.state.until-time.Since(e.c.o.born) > keyMargin)
	}
	// A key that is refreshed within two heartbeats is restored by that.
	return e.ttl > 0 && (e.ttl+time.Second)/3 > 2*e.c.o.cfg.Heartbeat && e.ttl-e.idle() > keyMargin
}

// checkLane compares the rooms and keys that a lane expects with those in Redis, some
// hundred per call. It writes missing ones again, as background work. It returns the
// size of the lane's index in Redis, -1 if that is not known.
func (o *Owner) checkLane(l *lane, inc string, list checklist) (owned int64) {
	all, owned := list.total <= indexAll || o.beats%indexEvery == 0, int64(-1)
	for first := true; len(list.rooms)+len(list.keys) > 0; first = false {
		n := min(len(list.rooms), store.CheckSize)
		m := min(len(list.keys), store.CheckSize-n)
		before := l.reckon(inc)
		c, err := o.checkSome(l, inc, list.rooms[:n], list.keys[:m], store.CheckList{Own: first, Index: all || first})
		if err != nil {
			o.cfg.Logger.Debug("mesh: check of keys not finished", "bucket", l.bucket, "error", err)
			return owned
		}
		if first {
			owned = c.Owned
			o.checkOwn(l, inc, before, c)
		}
		all = all || slices.ContainsFunc(c.Rooms, func(r store.RoomCheck) bool { return r.Members && !r.Listed })
		list.rooms, list.keys = list.rooms[n:], list.keys[m:]
	}
	return owned
}

// checkSome is one call of checkLane.
func (o *Owner) checkSome(l *lane, inc string, rooms []*localRoom, keys []ownKey, ask store.CheckList) (store.Checked, error) {
	names, before := make([]string, len(rooms)), make([]tally, len(rooms))
	o.roomsMu.RLock()
	for i, r := range rooms {
		names[i], before[i] = r.name, r.tally
	}
	o.roomsMu.RUnlock()
	ask.Rooms, ask.Keys = names, make([]store.KeyRef, len(keys))
	for i := range keys {
		ask.Keys[i] = keys[i].ref
	}
	c, err := o.cfg.Store.Check(o.stop, l.bucket, inc, ask)
	if err != nil || o.cfg.Incarnation() != inc {
		return c, err
	}
	var lost, lapsed, unlisted []*localRoom
	o.roomsMu.RLock()
	for i, r := range rooms {
		switch found := c.Rooms[i]; {
		case before[i].contradicts(r.tally, found) && found.Members && !o.cfg.EndSilent:
			lapsed = append(lapsed, r)
		case before[i].contradicts(r.tally, found):
			lost = append(lost, r)
		case !found.Listed && before[i].written > before[i].slack(r.tally):
			unlisted = append(unlisted, r)
		}
	}
	o.roomsMu.RUnlock()
	lost = append(lost, slices.DeleteFunc(lapsed, o.verifyLapsed)...)
	lost = slices.DeleteFunc(lost, func(r *localRoom) bool { return !r.mayRestore() })
	if len(lost)+len(unlisted)+len(c.Missing) > 0 {
		o.log.Warn("mesh: redis has lost keys, writing them again",
			"rooms", len(lost), "off the index of rooms", len(unlisted), "other keys", len(c.Missing))
	}
	for _, r := range lost {
		o.restore(r)
	}
	for _, r := range unlisted {
		o.recount(r)
	}
	for _, i := range c.Missing {
		keys[i].restore(inc)
	}
	return c, nil
}

// slack is by how many entries Redis may differ from a tally that was taken before
// it was asked, given the tally after.
func (t tally) slack(after tally) int { return t.open + int(after.changes-t.changes) }

// contradicts reports whether the numbers found for a room prove that Redis has lost
// something.
func (t tally) contradicts(after tally, found store.RoomCheck) bool {
	slack := t.slack(after)
	if found.Entries < 0 { // another program's
		return false
	}
	off := found.Entries - t.written
	return max(off, -off) > slack || !found.Members && t.written > slack
}

// restore has every entry of a room verified, and then the room's count.
func (o *Owner) restore(r *localRoom) {
	o.roomsMu.RLock()
	entries := make([]*entry, 0, len(r.entries))
	for e := range r.entries {
		entries = append(entries, e)
	}
	o.roomsMu.RUnlock()
	for _, e := range entries {
		e.c.mu.Lock()
		e.verify()
		e.c.mu.Unlock()
	}
	o.recount(r)
}

// verifyLapsed has those entries of a room verified that have lapsed. Another server
// may have cleaned them up, and then nothing is lost. It returns false if there are
// none, or if none was gone the last time: then it was something else.
func (o *Owner) verifyLapsed(r *localRoom) (found bool) {
	o.roomsMu.Lock()
	again := r.suspected
	r.suspected = !again
	entries := slices.Collect(maps.Keys(r.entries))
	o.roomsMu.Unlock()
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

// recount has a room's count and its place on the index written, as soon as it
// is known of all its entries whether Redis holds them.
func (o *Owner) recount(r *localRoom) {
	o.roomsMu.Lock()
	r.recount = true
	now := r.open == 0
	o.roomsMu.Unlock()
	if now {
		r.lane.repair(r)
	}
}

// restore writes the owner of a missing key (an entry or a registration) again.
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
		r.lane().repair(r)
	}
}

// verify has an entry written again. If Redis holds a record that is as new, the
// write changes nothing. Conn.mu is held.
func (e *entry) verify() {
	if !e.want || !e.written {
		return
	}
	e.unsure, e.refresh, e.stateWritten, e.metaWritten = true, true, 0, 0
	e.note()
	e.lane.repair(e)
}

// repair is offer for work that is not urgent.
func (l *lane) repair(it item) { l.offer(it, background) }

// reckoning is how much a lane's index should hold, and by how much that may be
// wrong.
type reckoning struct {
	held    int64
	open    int
	changes uint64
}

func (l *lane) reckon(inc string) (r reckoning) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.heldOf == inc {
		r.held = l.held
	}
	r.open, r.changes = l.queue.n+l.taken, l.changes
	return r
}

// checkOwn looks whether the index and the fence of a lane are there.
func (o *Owner) checkOwn(l *lane, inc string, before reckoning, c store.Checked) {
	if o.cfg.Incarnation() != inc {
		return
	}
	after := l.reckon(inc)
	slack := int64(before.open+after.open) + int64(after.changes-before.changes)
	if c.Owned >= 0 && c.Owned < (before.held-slack+1)/2 {
		o.auditLane(l, inc) // the key was lost; smaller differences are compareLane's
	}
	l.mu.Lock()
	lost := !c.Fenced && l.settledOf == inc && l.settled > 0
	l.mu.Unlock()
	if lost {
		// Redis may have lost more with it: everything is compared.
		l.settle("", 0)
		l.troubled = true
		l.repair(&touch{})
	}
}

// touch is an item whose batch restores the fence.
type touch struct {
	marked mark
	over   bool // used by the lane's run alone
}

func (t *touch) conn() *Conn   { return nil }
func (t *touch) place() place  { return place{} }
func (t *touch) mark() *mark   { return &t.marked }
func (t *touch) pending() bool { return true }

// next implements item.
func (t *touch) next(string, *store.Op) (store.Op, bool) {
	return store.Op{Kind: store.OpTouch}, !t.over
}

// done implements item.
func (t *touch) done(store.Op, store.OpResult) { t.over = true }
