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

// dice makes random batches of two servers with few rooms and few connections, so that
// the ops of one call affect each other.
type dice struct {
	*rand.Rand
	entries map[string]int // number of entries made, by server, room and connection
	version uint64         // of states and metadata; rises
}

func (d *dice) pick(list ...string) string { return list[d.IntN(len(list))] }

func (d *dice) op(inc string) Op {
	o := Op{Room: d.pick("r", "q", "a b"), Conn: d.pick("a", "b", "c"), Cause: CauseLeft}
	at := inc + "/" + o.Room + "/" + o.Conn
	if d.IntN(3) == 0 || d.entries[at] == 0 {
		d.entries[at]++
	}
	o.Entry = fmt.Sprint(inc, max(d.entries[at]-d.IntN(12)/11, 1)) // sometimes an older one
	if d.IntN(2) == 0 {
		o.TTL, o.Left = time.Hour, time.Hour
	}
	d.version++
	if d.IntN(2) == 0 {
		o.StateVersion, o.StateSilent = d.version, d.IntN(2) == 0
		if d.IntN(3) > 0 {
			o.State = fmt.Append(nil, d.version)
		}
	}
	if d.IntN(2) == 0 {
		o.MetaVersion, o.Meta = d.version, fmt.Append(nil, `"m`, d.version, `"`)
	}
	switch o.Kind = OpJoin; d.IntN(5) {
	case 0, 1:
		o.Kind, o.Stated = OpLeave, d.IntN(2) == 0
		if d.IntN(2) == 0 {
			o.TTL = 0 // it had another TTL
		}
	case 2, 3:
		if o.Kind = OpUpdate; d.IntN(3) == 0 {
			o.MetaVersion, o.StateVersion, o.Left = 0, 0, time.Hour
		}
	}
	return o
}

// copied is the state of rooms as a receiver of their events knows it.
type copied struct {
	rooms map[string]map[string]Record
	at    map[string]Position
	// taken are entries that another server has replaced. They stay in the index of
	// their former owner until it learns of that.
	taken map[string]map[EntryRef]struct{}
}

func (c *copied) hear(w *world) {
	for _, e := range w.events() {
		before, known := c.at[e.Room]
		if !known || e.Epoch != before.Epoch && len(c.rooms[e.Room]) == 0 { // the room may have been forgotten
			before = Position{Epoch: e.Epoch, Tag: "-"}
			c.rooms[e.Room] = make(map[string]Record)
		}
		require.Equal(w, Position{Epoch: before.Epoch, Seq: before.Seq + 1, Tag: before.Tag}, Position{e.Epoch, e.Seq, e.Prev})
		c.at[e.Room] = e.Position()
		members := c.rooms[e.Room]
		old, in := members[e.Conn]
		require.Equal(w, e.Type != Joined, in, "%c of %s", e.Type, e.Conn)
		if e.Type == Left {
			require.Equal(w, old.Entry, e.Entry)
			delete(members, e.Conn)
			continue
		}
		if e.Type == State { // these do not contain the metadata
			e.Meta = old.Meta
		}
		if e.Type == Replaced && old.Incarnation != e.Incarnation {
			c.taken[old.Incarnation][EntryRef{old.Conn, old.Entry, e.Room}] = struct{}{}
		}
		members[e.Conn] = e.Record
	}
}

// agrees asserts that Redis holds the state that the events describe, in all places.
func (c *copied) agrees(w *world) {
	var filled []string
	owned := map[string][]EntryRef{"I": w.owned("I"), "J": w.owned("J")}
	for _, room := range []string{"a b", "q", "r"} {
		members := c.rooms[room]
		owners := make(map[string]int)
		snap, err := w.Snapshot(w.Context(), room)
		require.NoError(w, err)
		if len(members) > 0 || !snap.Position.None() {
			require.Equal(w, c.at[room], snap.Position, room)
		}
		require.Len(w, snap.Records, len(members))
		for _, r := range snap.Records {
			heard := members[r.Conn]
			// A change from no state to no state, and a change of the TTL, are not
			// published.
			heard.StateVersion, heard.TTL, heard.StateSilent = r.StateVersion, r.TTL, r.StateSilent
			require.Equal(w, heard, r)
			owners[r.Incarnation]++
			require.Contains(w, owned[r.Incarnation], EntryRef{r.Conn, r.Entry, room})
			w.keysOf(room, r)
		}
		if len(members) > 0 {
			filled = append(filled, room)
		}
		require.Equal(w, fmt.Sprint(owners), fmt.Sprint(w.owners(room)), room)
		if !snap.Position.None() {
			life := w.pttl(w.keys.Seq(room))
			require.Equal(w, len(members) > 0, life < 0)
			require.LessOrEqual(w, life, visited)
		}
	}
	require.Equal(w, filled, w.rooms())
	for inc, refs := range owned {
		for _, ref := range refs {
			r := c.rooms[ref.Room][ref.Conn]
			if r.Entry != ref.Entry || r.Incarnation != inc {
				require.Contains(w, c.taken[inc], ref, "%v is there", r)
			}
		}
	}
}

// keysOf asserts that an entry has the keys that its record requires.
func (w *world) keysOf(room string, r Record) {
	w.Helper()
	key := w.rdb.Get(w.Context(), w.keys.Conn(room, r.Conn)).Val()
	if r.TTL == 0 {
		require.Empty(w, key)
	} else {
		require.Equal(w, r.Entry, key)
	}
	require.Equal(w, string(r.State), w.rdb.Get(w.Context(), w.keys.State(room, r.Conn)).Val())
}

// After any batch Redis holds the published state, each event follows the one before,
// and indexes and counts agree with the records.
func TestRandomBatches(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		seed := rand.Uint64()
		w.Logf("seed %d", seed)
		d := &dice{Rand: rand.New(rand.NewPCG(seed, 0)), entries: make(map[string]int)}
		c := &copied{
			rooms: make(map[string]map[string]Record), at: make(map[string]Position),
			taken: map[string]map[EntryRef]struct{}{"I": {}, "J": {}},
		}
		w.listen()
		for range 200 {
			inc := d.pick("I", "J")
			if d.IntN(6) == 0 {
				// One item per connection and room: the leave of an earlier entry that
				// is still in an index would be published a second time.
				items := make(map[EntryRef]CleanUpItem)
				for range 1 + d.IntN(4) {
					o := d.op(inc)
					items[EntryRef{Conn: o.Conn, Room: o.Room}] = item(GroundDead, o.Room, o.Conn, o.Entry, c.rooms[o.Room][o.Conn].Incarnation)
				}
				w.whileDead("I", func() {
					w.whileDead("J", func() { w.cleanUp(slices.Collect(maps.Values(items))...) })
				})
			} else {
				ops := make([]Op, 1+d.IntN(8))
				for i := range ops {
					ops[i] = d.op(inc)
				}
				for i, r := range w.commit(inc, ops...) {
					require.NoError(w, r.Err, "%+v", ops[i])
				}
			}
			c.hear(w)
			c.agrees(w)
		}
	})
}
