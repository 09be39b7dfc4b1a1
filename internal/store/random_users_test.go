package store

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// audience makes random ops of two servers about few users, and follows the events of
// the rooms as a subscriber does.
type audience struct {
	*rand.Rand
	*world
	entries int
	version uint64
	rooms   map[string]*seen
	doing   any // for messages
}

// seen is the state of a room as a subscriber knows it.
type seen struct {
	at      Position
	members map[string]Record
	lost    bool // keys of the room were lost; the next write repairs it
}

const (
	briefGrace = 5 * time.Millisecond
	hourGrace  = time.Hour
)

func (a *audience) pick(list ...string) string { return list[a.IntN(len(list))] }

func (a *audience) some(n int) bool { return a.IntN(n) == 0 }

func (a *audience) room() string { return a.pick("r", "q") }

func (a *audience) newEntry(inc string) string {
	a.entries++
	return fmt.Sprint(inc, a.entries)
}

func (a *audience) person(o *Op) {
	o.User = a.pick("", "ann", "ann", "bob", "bob", "eve")
	o.Grace = []time.Duration{0, briefGrace, hourGrace, hourGrace}[a.IntN(4)]
}

// op is a random op. There is one per room and connection in a batch, as the owner's
// writer does it.
func (a *audience) op(inc, room, conn string, batch map[string]bool) Op {
	o := Op{Room: room, Conn: conn, Cause: []Cause{CauseLeft, CauseClosed, CauseLost, CauseSilent}[a.IntN(4)], Known: true}
	now := a.rooms[room].members[conn]
	if now.Incarnation != inc && !now.Kept() { // no server leaves or changes those
		now.Entry, o.Known = "none", false
	}
	if a.some(2) {
		o.TTL, o.Left = time.Hour, time.Hour
	}
	a.version++
	if a.some(3) {
		o.StateVersion, o.State = a.version, fmt.Append(nil, a.version)
	}
	if a.some(3) {
		o.MetaVersion, o.Meta = a.version, fmt.Append(nil, `"m`, a.version, `"`)
	}
	a.person(&o)
	switch n := a.IntN(10); {
	case n < 5:
		o.Kind, o.Entry, o.Stated = OpJoin, a.newEntry(inc), true
		if now.Incarnation == inc && a.some(3) {
			o.Entry = now.Entry
		}
		if a.some(4) {
			o.MaxConnections, o.MaxUsers = a.IntN(4), a.IntN(3)
		}
		if other := a.pick("a", "b", "c", "d", "e"); a.some(3) && !batch[room+"/"+other] {
			o.Replaces = other
		}
		if a.some(12) {
			o.Rebuild = 20 * time.Millisecond
		}
	case n < 8:
		o.Kind, o.Entry, o.Keep, o.Stated = OpLeave, now.Entry, a.some(2), a.some(2)
		if a.some(3) {
			o.User = ""
		}
	default:
		o.Kind, o.Entry, o.Person = OpUpdate, now.Entry, a.some(2)
		if a.some(4) {
			o.MetaVersion, o.StateVersion, o.Left = 0, 0, time.Hour
		}
	}
	return o
}

// commitSome commits a random batch, and perhaps once more.
func (a *audience) commitSome() {
	inc := a.pick("I", "J")
	batch := make(map[string]bool)
	var ops []Op
	for range 1 + a.IntN(5) {
		if room, conn := a.room(), a.pick("a", "b", "c", "d", "e"); !batch[room+"/"+conn] {
			batch[room+"/"+conn] = true
			ops = append(ops, a.op(inc, room, conn, batch))
		}
	}
	a.doing = ops
	first := a.commit(inc, ops...)
	full := false
	for i, r := range first {
		require.NoError(a, r.Err, "%+v", ops[i])
		full = full || r.Status == Full
	}
	a.hear()
	// A join that found the room full may find a place the second time.
	if full || a.some(2) {
		return
	}
	held := a.dump()
	second, err := a.again(inc, ops...)
	require.NoError(a, err)
	require.Empty(a, told(a.events()), "%+v", ops)
	require.Equal(a, held, a.dump(), "%+v", ops)
	for i, r := range second {
		if ops[i].Kind == OpJoin {
			require.Equal(a, first[i].Replaced, r.Replaced, "%+v", ops[i])
			require.Equal(a, first[i].ReplacedOwner, r.ReplacedOwner)
			require.Equal(a, Done, r.Status)
		}
		if first[i].KeptUntil != 0 && r.Status != Gone { // a later op of the batch may have taken the place
			require.Equal(a, first[i].KeptUntil, r.KeptUntil, "%+v", ops[i])
		}
	}
}

// cleanUpSome tries to end random entries.
func (a *audience) cleanUpSome() {
	items := make(map[string]CleanUpItem)
	for range 1 + a.IntN(4) {
		room, conn := a.room(), a.pick("a", "b", "c", "d", "e")
		now := a.rooms[room].members[conn]
		mode := []CleanUpGround{GroundExpired, GroundDead, GroundGraceOver, GroundRemoved}[a.IntN(4)]
		it := item(mode, room, conn, now.Entry, now.Incarnation)
		if now.Entry == "" {
			it.Entry, it.Incarnation = "none", "I"
		}
		if a.some(2) {
			it.Since = a.clockProof().Now - 1000*int64(a.IntN(3))
		}
		items[room+"/"+conn] = it
	}
	for _, it := range items {
		if it.Mode == GroundExpired && a.some(2) {
			a.del(a.keys.Conn(it.Room, it.Conn))
		}
	}
	a.doing = items
	a.whileDead("I", func() {
		a.whileDead("J", func() { a.cleanUp(slices.Collect(maps.Values(items))...) })
	})
	a.hear()
}

// loseSome deletes keys, and does what servers do then.
func (a *audience) loseSome() {
	a.doing = "losing keys"
	room := a.room()
	s := a.rooms[room]
	switch a.IntN(5) {
	case 0:
		a.del(a.keys.Users(room))
		s.lost = true
	case 1:
		a.del(a.keys.Kept(0))
	case 2:
		a.del(a.keys.Seq(room))
		s.lost = true
		counts := make(map[string]int)
		for _, r := range s.members {
			counts[r.Incarnation]++
		}
		for _, inc := range []string{"I", "J"} {
			a.commit(inc, Op{Kind: OpRecount, Room: room, Entries: counts[inc]})
		}
	default: // the records, and perhaps more
		keys := []string{a.keys.Members(room)}
		for _, key := range []string{a.keys.Seq(room), a.keys.Users(room), a.keys.Kept(0)} {
			if a.some(2) {
				keys = append(keys, key)
			}
		}
		was := s.members
		a.del(keys...)
		s.lost = true
		for _, conn := range slices.Sorted(maps.Keys(was)) {
			if r := was[conn]; !r.Kept() && !a.some(3) {
				again := Op{
					Kind: OpJoin, Room: room, Conn: conn, Entry: a.newEntry(r.Incarnation), User: r.User, Grace: r.Grace,
					TTL: r.TTL, Left: r.TTL, Rebuild: 20 * time.Millisecond, Stated: true,
				}
				a.ok(r.Incarnation, again)
			}
		}
		a.sweep(room)
	}
	for _, room := range []string{"r", "q"} { // as mirrors do
		snap, err := a.Snapshot(a.Context(), room)
		require.NoError(a, err)
		for _, r := range snap.Records {
			if r.Kept() {
				a.cleanUp(item(GroundGraceOver, room, r.Conn, r.Entry, NoOwner))
			}
		}
	}
	a.hear()
}

// sweep ends what the indexes list and no record confirms.
func (a *audience) sweep(room string) {
	for _, inc := range []string{"I", "J"} {
		for _, ref := range a.owned(inc) {
			if r, ok, _ := a.Store.Record(a.Context(), ref.Room, ref.Conn); ref.Room == room && (!ok || r.Entry != ref.Entry) {
				a.commit(inc, Op{Kind: OpLeave, Room: room, Conn: ref.Conn, Entry: ref.Entry, Cause: CauseLeft, Known: !ok, Stated: true, TTL: time.Hour})
			}
		}
	}
	for name := range a.keptIn() {
		ref, err := decodeOwned(name)
		require.NoError(a, err)
		if ref.Room == room {
			a.cleanUp(item(GroundGraceOver, room, ref.Conn, ref.Entry, NoOwner))
		}
	}
}

// hear applies the events since the last call.
func (a *audience) hear() {
	for _, e := range a.events() {
		s := a.rooms[e.Room]
		if s.lost {
			continue
		}
		if e.Epoch != s.at.Epoch && len(s.members) == 0 { // the room was forgotten
			s.at = Position{Epoch: e.Epoch, Tag: "-"}
		}
		require.Equal(a, Position{s.at.Epoch, s.at.Seq + 1, s.at.Tag}, Position{e.Epoch, e.Seq, e.Prev}, told([]event{e}))
		s.at = e.Position()
		a.apply(s, e)
	}
}

func (a *audience) apply(s *seen, e event) {
	old, in := s.members[e.Conn]
	switch e.Type {
	case Left:
		require.True(a, in, "%s in %s: %+v", told([]event{e}), e.Room, a.doing)
		require.Equal(a, old.Entry, e.Entry)
		require.Equal(a, old.User, e.User)
		delete(s.members, e.Conn)
	case Joined:
		require.Equal(a, e.Replaces == e.Conn, in, told([]event{e}))
		require.False(a, in && (!old.Kept() || old.User != e.User))
		s.members[e.Conn] = e.Record
	default:
		require.True(a, in, told([]event{e}))
		require.False(a, old.Kept(), told([]event{e}))
		if e.Type != Meta {
			require.Equal(a, old.User, e.User)
		}
		if e.Type == State || e.Type == Disconnected {
			e.Record.Meta = old.Meta
		}
		s.members[e.Conn] = e.Record
	}
	if !e.Counted {
		for _, r := range s.members {
			require.False(a, r.Kept() || r.User != "", "an event without numbers: %s", told([]event{e}))
		}
		return
	}
	users, connections := make(map[string]bool), 0
	for _, r := range s.members {
		if r.User == "" {
			users["/"+r.Conn] = true
			continue
		}
		users[r.User] = true
		if r.User == e.User {
			connections++
		}
	}
	require.Equal(a, []int{connections, len(s.members), len(users)}, []int{e.UserConnections, e.Connections, e.Users}, told([]event{e}))
}

// agrees asserts that everything in Redis describes the same members. After a loss it
// waits for the first write.
func (a *audience) agrees() {
	for _, room := range []string{"r", "q"} {
		s := a.rooms[room]
		if s.lost {
			entry := a.newEntry("I")
			a.ok("I", Op{Kind: OpJoin, Room: room, Conn: "repair", Entry: entry, User: "repair"})
			a.ok("I", Op{Kind: OpLeave, Room: room, Conn: "repair", Entry: entry, Cause: CauseLeft})
			a.events()
		}
		records := a.counted(room)
		members := make(map[string]Record)
		for _, r := range records {
			members[r.Conn] = r
		}
		if s.lost {
			s.lost, s.members, s.at = false, members, a.position(room)
		}
		require.Equal(a, slices.Sorted(maps.Keys(members)), slices.Sorted(maps.Keys(s.members)))
		for conn, r := range members {
			heard := s.members[conn]
			// A change from no state to no state, of the TTL or of the grace, is not published.
			heard.TTL, heard.StateVersion, heard.StateSilent, heard.Grace = r.TTL, r.StateVersion, r.StateSilent, r.Grace
			require.Equal(a, heard, r)
			if !r.Kept() {
				a.keysOf(room, r)
			}
			s.members[conn] = r
		}
		if !a.position(room).None() {
			require.Equal(a, s.at, a.position(room))
			require.Equal(a, len(members) > 0, a.pttl(a.keys.Seq(room)) < 0)
		}
		for _, inc := range []string{"I", "J"} {
			for conn, r := range members {
				ref := EntryRef{Conn: conn, Entry: r.Entry, Room: room}
				if r.Incarnation == inc {
					require.Contains(a, a.owned(inc), ref)
				}
			}
		}
	}
	a.indexed("r", "q")
}

// After any batch, clean-up, loss and repetition, the numbers in positions, hashes and
// events are those of the records. A user has live connections or one kept place.
func TestRandomUsers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		seed := rand.Uint64()
		w.Logf("seed %d", seed)
		a := &audience{
			Rand: rand.New(rand.NewPCG(seed, 0)), world: w,
			rooms: map[string]*seen{"r": {members: make(map[string]Record)}, "q": {members: make(map[string]Record)}},
		}
		w.listen()
		steps := 300
		if testing.Short() {
			steps = 150
		}
		for range steps {
			switch n := a.IntN(16); {
			case n == 0:
				a.loseSome()
			case n < 4:
				a.cleanUpSome()
			case n == 4:
				time.Sleep(briefGrace) // of kept places
			default:
				a.commitSome()
			}
			a.agrees()
		}
	})
}
