package store

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The same entry and the same room may join and leave in one batch. The result is that
// of separate batches.
func TestOneEntryManyTimesInABatch(t *testing.T) {
	t.Parallel()
	state := func(version uint64, data string) Op {
		return Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", StateVersion: version, State: []byte(data)}
	}
	elsewhere := join("q", "c", "q1")
	for _, tt := range []struct {
		name   string
		before []Op
		batch  []Op
		types  string // types of the events in r
		rooms  []string
		owned  []EntryRef
		owners map[string]string
	}{
		{
			"joins and leaves", nil, []Op{join("r", "c", "e1"), elsewhere, leave("r", "c", "e1")}, "JL",
			[]string{"q"}, []EntryRef{{"c", "q1", "q"}}, map[string]string{},
		},
		{
			"leaves and joins", []Op{join("r", "c", "e1")}, []Op{leave("r", "c", "e1"), elsewhere, join("r", "c", "e1")}, "LJ",
			[]string{"q", "r"}, []EntryRef{{"c", "e1", "r"}, {"c", "q1", "q"}}, map[string]string{"I": "1"},
		},
		{
			"leaves with an unannounced state and joins", []Op{join("r", "d", "d1"), join("r", "c", "e1"), state(1, "{}")},
			[]Op{leave("r", "c", "e1"), join("r", "c", "e2"), elsewhere, leave("r", "d", "d1")}, "LJL",
			[]string{"q", "r"}, []EntryRef{{"c", "e2", "r"}, {"c", "q1", "q"}}, map[string]string{"I": "1"},
		},
		{
			"is replaced, refreshed and leaves", []Op{joinTTL("r", "c", "e0", time.Minute)},
			[]Op{join("r", "c", "e1"), {Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", TTL: time.Minute, Left: time.Minute}, leave("r", "c", "e1")},
			"RL", nil, nil, map[string]string{},
		},
		{
			"states in a row", []Op{join("r", "c", "e1")}, []Op{state(1, "1"), state(2, "2"), elsewhere, state(3, "3"), state(3, "4")}, "SSS",
			[]string{"q", "r"}, []EntryRef{{"c", "e1", "r"}, {"c", "q1", "q"}}, map[string]string{"I": "1"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, func(w *world) {
				if tt.before != nil {
					w.ok("I", tt.before...)
				}
				at := w.position("r")
				w.listen()
				w.ok("I", tt.batch...)
				types := ""
				for _, e := range w.events() {
					if e.Room != "r" {
						continue
					}
					types += string(e.Type)
					if at.Seq > 0 {
						require.Equal(w, at.Tag, e.Prev)
					}
					require.Equal(w, at.Seq+1, e.Seq)
					at = e.Position()
				}
				assert.Equal(w, tt.types, types)
				assert.Equal(w, at, w.position("r"))
				assert.Equal(w, tt.rooms, w.rooms())
				assert.Equal(w, tt.owned, w.owned("I"))
				assert.Equal(w, tt.owners, w.owners("r"))
				if len(tt.owners) == 0 {
					w.expectTTL(visited, w.keys.Seq("r"))
					assert.Zero(w, w.pttl(w.keys.Conn("r", "c")))
				} else {
					assert.Equal(w, time.Duration(-1), w.pttl(w.keys.Seq("r")))
				}
			})
		})
	}
}

// The leave of an entry with a state takes a second call, unless the op says that there
// may be one.
func TestSecondCallOnlyIfNeeded(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		calls := func(op Op) uint64 {
			in := joinTTL("r", op.Conn, op.Entry, op.TTL)
			if op.TTL == 0 {
				in.Left = 0
			}
			in.StateVersion, in.State = 1, []byte("{}")
			w.ok("I", in)
			before := w.Stats().Calls
			w.ok("I", op)
			assert.Zero(w, w.pttl(w.keys.State("r", op.Conn)))
			assert.Zero(w, w.pttl(w.keys.Conn("r", op.Conn)))
			return w.Stats().Calls - before
		}
		out := leave("r", "c", "e1")
		assert.EqualValues(w, 2, calls(out))
		out.Stated = true
		assert.EqualValues(w, 1, calls(out))
		out.Stated, out.TTL = false, time.Minute
		assert.EqualValues(w, 1, calls(out))
		assert.Empty(w, w.permanent())
	})
}

// The entries of each server in a room are counted across calls and servers. The count
// starts again when records were lost.
func TestOwnersOfARoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"), join("r", "b", "b1"))
		w.ok("II", join("r", "c", "c1"))
		w.ok("J", join("r", "d", "d1"), join("r", "b", "b2"))
		assert.Equal(w, map[string]string{"I": "1", "II": "1", "J": "2"}, w.owners("r"))
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		require.NoError(w, w.Fence(w.Context(), 0, "J"))
		assert.Equal(w, "0++", w.cleanUp(item(GroundDead, "r", "b", "b1", "I"), item(GroundDead, "r", "a", "a1", "I"),
			item(GroundDead, "r", "d", "d1", "J")))
		assert.Equal(w, map[string]string{"II": "1", "J": "1"}, w.owners("r"))
		w.ok("II", leave("r", "c", "c1"))
		assert.Equal(w, map[string]string{"J": "1"}, w.owners("r"))

		// The records are lost without leaves. The next entry is alone in the room.
		require.NoError(w, w.rdb.Del(w.Context(), w.keys.Members("r")).Err())
		w.ok("II", join("r", "e", "e1"))
		assert.Equal(w, map[string]string{"II": "1"}, w.owners("r"))
	})
}
