package store

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func (w *world) check(inc string, rooms ...string) Checked {
	w.Helper()
	c, err := w.Check(w.Context(), 0, inc, CheckList{Own: true, Index: true, Rooms: rooms, Keys: []KeyRef{
		{Kind: KeyConn, Room: "r", Conn: "a"}, {Kind: KeyState, Room: "r", Conn: "a"}, {Kind: KeyConnMeta, Conn: "a"},
	}})
	require.NoError(w, err)
	return c
}

func (w *world) del(keys ...string) {
	w.Helper()
	require.NoError(w, w.client.Del(w.Context(), keys...).Err())
}

func timedJoin() Op {
	op := join("r", "a", "a1")
	op.TTL, op.Left, op.StateVersion, op.State = time.Minute, time.Minute, 1, []byte(`{"s":1}`)
	return op
}

// Exactly the missing keys are reported.
func TestCheck(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		k := w.keys
		w.ok("I", timedJoin(), join("r", "b", "b1"), Op{Kind: OpConnect, Conn: "a"})
		w.ok("J", join("r", "c", "c1"))
		all := RoomCheck{Members: true, Listed: true, Entries: 2}
		assert.Equal(w, Checked{Owned: 3, Fenced: true, Rooms: []RoomCheck{all}}, w.check("I", "r"))
		assert.Equal(w, []RoomCheck{{Entries: 0}, all}, w.check("I", "none", "r").Rooms)
		w.del(k.Seq("r"))
		assert.Equal(w, []RoomCheck{{Members: true, Listed: true}}, w.check("I", "r").Rooms)
		w.del(k.Rooms(0), k.Members("r"))
		assert.Equal(w, []RoomCheck{{}}, w.check("I", "r").Rooms)
		w.del(k.Conn("r", "a"), k.ConnMeta("a"), k.Owned(0, "I"), k.Fence(0, "I"))
		c := w.check("I")
		assert.Equal(w, []int{0, 2}, c.Missing)
		assert.Zero(w, c.Owned)
		assert.False(w, c.Fenced)

		// Keys of another type under our names are not missing.
		require.NoError(w, w.client.Set(w.Context(), k.Members("x"), "?", 0).Err())
		require.NoError(w, w.client.Set(w.Context(), k.Seq("x"), "?", 0).Err())
		require.NoError(w, w.client.Set(w.Context(), k.Rooms(0), "?", 0).Err())
		assert.Equal(w, []RoomCheck{{Members: true, Listed: true, Entries: -1}}, w.check("I", "x").Rooms)
		w.del(k.Rooms(0))
	})
}

// The first entry after a room's records were lost begins a new epoch, so that mirrors
// treat the other members as unconfirmed. Until then a snapshot is incomplete.
func TestLostRecordsBeginAnEpoch(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"), join("r", "b", "b1"))
		before, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		require.False(w, before.Incomplete)
		w.del(w.keys.Members("r"))
		s, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.True(w, s.Incomplete)
		w.ok("J", join("r", "c", "c1"))
		s, err = w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.NotEqual(w, before.Position.Epoch, s.Position.Epoch)
		assert.EqualValues(w, 1, s.Position.Seq)
		assert.EqualValues(w, 1, s.Records[0].Seq)
		assert.Equal(w, 0, w.check("I", "r").Rooms[0].Entries)
		assert.Equal(w, 1, w.check("J", "r").Rooms[0].Entries)
	})
}

// The leave of an entry with a lost record is published. The last one leaves no key
// without a TTL.
func TestLeaveWithoutRecord(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		leave := func(conn string, known bool) Op {
			return Op{Kind: OpLeave, Room: "r", Conn: conn, Entry: conn + "1", Cause: CauseClosed, TTL: time.Minute, Known: known}
		}
		w.ok("I", timedJoin(), join("r", "b", "b1"))
		at, err := w.Positions(w.Context(), []string{"r"})
		require.NoError(w, err)
		w.del(w.keys.Members("r"))
		status := func(op Op) OpStatus {
			w.Helper()
			return w.commit("I", op)[0].Status
		}
		position := func() Position {
			w.Helper()
			p, err := w.Positions(w.Context(), []string{"r"})
			require.NoError(w, err)
			return p[0]
		}
		assert.Equal(w, Gone, status(leave("a", false)))
		assert.Equal(w, at[0], position(), "it may never have been there")
		assert.Equal(w, Gone, status(leave("a", true)))
		assert.Equal(w, at[0].Seq+1, position().Seq)
		assert.EqualValues(w, -1, w.client.PTTL(w.Context(), w.keys.Seq("r")).Val(), "the other is still counted")
		assert.Equal(w, Gone, status(leave("b", true)))
		assert.Positive(w, w.client.PTTL(w.Context(), w.keys.Seq("r")).Val())
		assert.Zero(w, w.client.Exists(w.Context(), w.keys.State("r", "a"), w.keys.Conn("r", "a"), w.keys.Rooms(0)).Val())
	})
}

// The leave of an entry that another server has ended is not published or counted
// again. Neither is that of an entry that another incarnation has replaced.
func TestLeaveAfterAnotherServerEndedIt(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", timedJoin(), join("r", "b", "b1"), join("r", "c", "c1"))
		w.del(w.keys.Conn("r", "a"))
		item := CleanUpItem{Mode: GroundExpired, Room: "r", Conn: "a", Entry: "a1", Incarnation: "I"}
		require.Equal(w, "+", w.cleanUp(item))
		require.Equal(w, map[string]string{"I": "2"}, w.owners("r"))
		w.listen()
		w.commit("I", Op{Kind: OpLeave, Room: "r", Conn: "a", Entry: "a1", Cause: CauseSilent, TTL: time.Minute, Known: true})
		assert.Equal(w, map[string]string{"I": "2"}, w.owners("r"))
		assert.Empty(w, w.heard(), "it was published")

		b := Op{Kind: OpLeave, Room: "r", Conn: "b", Entry: "b1", Cause: CauseLeft, Known: true}
		w.commit("I", b, b)
		assert.Equal(w, "L", kinds(w.events()), "even if the same batch ended it")
		assert.Equal(w, map[string]string{"I": "1"}, w.owners("r"))
		w.ok("I", join("r", "b", "b1"))

		w.ok("J", join("r", "b", "b2"))
		w.ok("J", Op{Kind: OpLeave, Room: "r", Conn: "b", Entry: "b2", Cause: CauseLeft, Known: true})
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		w.cleanUp(CleanUpItem{Mode: GroundDead, Room: "r", Conn: "b", Entry: "b1", Incarnation: "I"})
		assert.Equal(w, map[string]string{"I": "1"}, w.owners("r"), "c is still there")
		assert.Equal(w, "+", w.cleanUp(CleanUpItem{Mode: GroundDead, Room: "r", Conn: "c", Entry: "c1", Incarnation: "I"}))
		assert.Positive(w, w.client.PTTL(w.Context(), w.keys.Seq("r")).Val())
	})
}

// A recount restores a lost position, with numbers above those of the records. It does
// not hide lost records.
func TestRecount(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		recount := func(n int) Op { return Op{Kind: OpRecount, Room: "r", Entries: n} }
		w.ok("I", join("r", "a", "a1"), join("r", "b", "b1"))
		w.ok("J", join("r", "c", "c1"))
		w.del(w.keys.Seq("r"), w.keys.Rooms(0))
		w.commit("I", recount(2))
		assert.Equal(w, RoomCheck{Members: true, Listed: true, Entries: 2}, w.check("I", "r").Rooms[0])
		s, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.False(w, s.Incomplete)
		for _, r := range s.Records {
			assert.Greater(w, s.Position.Seq, r.Seq)
		}
		w.commit("J", recount(1))
		w.commit("I", recount(3))
		assert.Equal(w, 2, w.check("I", "r").Rooms[0].Entries, "there are fewer records")
		assert.Equal(w, 1, w.check("J", "r").Rooms[0].Entries)

		w.del(w.keys.Members("r"), w.keys.Seq("r"), w.keys.Rooms(0))
		w.commit("I", recount(2))
		assert.Zero(w, w.client.Exists(w.Context(), w.keys.Seq("r"), w.keys.Rooms(0)).Val(), "an empty room does not come back")
	})
}

// If every trace of entries is lost, their leaves are published nevertheless.
func TestLeavesWithoutAnyTrace(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"), join("r", "b", "b1"))
		w.del(w.keys.Members("r"), w.keys.Seq("r"), w.keys.Owned(0, "I"))
		w.listen()
		leave := func(conn string) Op {
			return Op{Kind: OpLeave, Room: "r", Conn: conn, Entry: conn + "1", Cause: CauseClosed, Known: true}
		}
		w.commit("I", leave("a"), leave("b"))
		assert.Equal(w, "LL", kinds(w.events()))
		_, err := w.again("I", leave("a"), leave("b"))
		require.NoError(w, err)
		assert.Empty(w, w.events())
		assert.Empty(w, w.permanent())
	})
}

// The leaves of a dead server's entries are published even if their records are lost.
func TestCleanUpWithoutRecord(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", timedJoin())
		w.del(w.keys.Members("r"))
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		item := CleanUpItem{Mode: GroundDead, Room: "r", Conn: "a", Entry: "a1", Incarnation: "I"}
		for _, want := range []CleanUpStatus{Ended, NotThere} {
			got, err := w.CleanUp(w.Context(), w.clockProof(), []CleanUpItem{item})
			require.NoError(w, err)
			assert.Equal(w, []CleanUpStatus{want}, got)
		}
		assert.Positive(w, w.client.PTTL(w.Context(), w.keys.Seq("r")).Val())
		assert.Zero(w, w.client.Exists(w.Context(), w.keys.State("r", "a"), w.keys.Owned(0, "I"), w.keys.Rooms(0)).Val())
	})
}

// A missing copy of a state is written again with the state that Redis holds.
func TestLostStateCopy(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", timedJoin())
		w.del(w.keys.State("r", "a"))
		op := timedJoin()
		op.Kind = OpUpdate
		w.ok("I", op)
		assert.Equal(w, `{"s":1}`, w.client.Get(w.Context(), w.keys.State("r", "a")).Val())
	})
}
