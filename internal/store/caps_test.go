package store

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// capped is a join with bounds. 0: none.
func capped(op Op, connections, users int) Op {
	op.MaxConnections, op.MaxUsers = connections, users
	return op
}

// full asserts that a join finds no place, and that it changes nothing.
func (w *world) full(of Bound, op Op) {
	w.Helper()
	held := w.dump()
	res := w.commit("I", op)[0]
	require.NoError(w, res.Err)
	require.Equal(w, OpResult{Status: Full, FullOf: of}, res)
	delete(held, w.keys.Fence(0, "I"))
	now := w.dump()
	delete(now, w.keys.Fence(0, "I"))
	require.Equal(w, held, now)
}

// A room without users has a bound for its connections, and each counts as a user.
func TestCapsWithoutUsers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", capped(join("r", "a", "a1"), 2, 0), capped(join("r", "b", "b1"), 2, 2))
		w.listen()
		w.full(BoundConnections, capped(join("r", "c", "c1"), 2, 0))
		w.full(BoundConnections, capped(join("r", "c", "c1"), 2, 2))
		w.full(BoundUsers, capped(join("r", "c", "c1"), 3, 2))
		w.full(BoundUsers, capped(joinUser("r", "c", "c1", "ann"), 0, 2))
		assert.Empty(w, w.heard())
		w.counted("r")
		// A connection that is in passes, whether its join is a repetition or not.
		w.ok("I", capped(join("r", "a", "a1"), 2, 2), capped(join("r", "b", "b2"), 1, 1))
		w.ok("I", leave("r", "a", "a1"))
		w.ok("I", capped(join("r", "c", "c1"), 2, 2))
		w.ok("J", join("r", "d", "d1"))
		w.full(BoundConnections, capped(join("r", "e", "e1"), 2, 0))
	})
}

// A further connection of a user who is in the room passes the bound of users.
func TestCapsOfUsers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", capped(joinUser("r", "a", "a1", "ann"), 0, 2), capped(joinUser("r", "b", "b1", "bob"), 0, 2))
		w.ok("I", capped(joinUser("r", "a2", "a2", "ann"), 0, 2))
		w.full(BoundUsers, capped(joinUser("r", "c", "c1", "cat"), 0, 2))
		w.full(BoundUsers, capped(join("r", "x", "x1"), 0, 2))
		w.full(BoundConnections, capped(joinUser("r", "a3", "a3", "ann"), 3, 2))
		// A connection that changes its user makes room only if it was the last one.
		w.full(BoundUsers, capped(joinUser("r", "a", "a9", "cat"), 0, 2))
		w.ok("I", capped(joinUser("r", "b", "b2", "cat"), 3, 2))
		w.counted("r")
		// A metadata change passes, and so do rebuilt entries.
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "a2", Entry: "a2", Person: true, User: "dan", MetaVersion: 1, Meta: []byte("1")})
		rebuilt := capped(joinUser("r", "e", "e1", "eve"), 1, 1)
		rebuilt.Rebuild = time.Minute
		w.ok("I", rebuilt)
		w.counted("r")
		o := w.occupancy("r")
		assert.Equal(w, []int{4, 4}, []int{o.Connections, o.Users})
	})
}

// The bounds are checked after a replacement. Prevents: users who changed networks are
// kept out by their own place.
func TestCapsAfterAReplacement(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinUser("r", "a", "a1", "ann"))
		w.away("b", "b1", "bob")
		w.full(BoundConnections, capped(joinUser("r", "c", "c1", "cat"), 2, 0))
		w.full(BoundUsers, capped(joinUser("r", "c", "c1", "cat"), 0, 2))
		// A kept place counts, and its user has it.
		res := w.ok("J", capped(joinUser("r", "b2", "b2", "bob"), 2, 2))[0]
		assert.Equal(w, "b", res.Replaced)
		named := capped(joinUser("r", "a2", "a2", "ann"), 2, 2)
		w.full(BoundConnections, named)
		named.Replaces = "a"
		assert.Equal(w, "a", w.ok("J", named)[0].Replaced)
		// The place of another user is no help.
		named = capped(joinUser("r", "c", "c1", "cat"), 2, 0)
		named.Replaces = "a2"
		w.full(BoundConnections, named)
		w.counted("r")
	})
}

// An empty room is not full, whatever its position says. Prevents: a room that lost its
// records and counted a kept place is full forever.
func TestLostRoomIsNotFull(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		for _, join := range []Op{capped(joinUser("r", "b", "b1", "bob"), 1, 1), capped(join("r", "b", "b1"), 1, 1), capped(joinUser("r", "a", "a2", "ann"), 1, 1)} {
			w.away("a", "a1", "ann")
			require.Equal(w, "1", w.numbersIn("r"))
			w.del(w.keys.Members("r"))
			w.ok("I", join)
			w.counted("r")
			w.ok("I", leave("r", join.Conn, join.Entry))
			w.counted("r")
			w.del(w.keys.Kept(0))
		}
		// While the users have to be counted, only connections are bounded.
		w.ok("I", joinUser("r", "a", "a1", "ann"))
		require.NoError(w, w.rdb.Del(w.Context(), w.keys.Users("r")).Err())
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Users("r"), "mine", 0).Err())
		w.ok("I", capped(joinUser("r", "b", "b1", "bob"), 2, 1))
		w.full(BoundConnections, capped(joinUser("r", "c", "c1", "cat"), 2, 1))
		w.del(w.keys.Users("r"))
		w.ok("I", Op{Kind: OpRecount, Room: "r", Entries: 2})
		w.full(BoundUsers, capped(joinUser("r", "c", "c1", "cat"), 0, 2))
	})
}

// The ops of a batch see each other.
func TestCapsInABatch(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		res := w.commit("I", capped(joinUser("r", "a", "a1", "ann"), 2, 1), capped(joinUser("r", "b", "b1", "bob"), 2, 1),
			capped(joinUser("r", "a2", "a2", "ann"), 2, 1), leave("r", "a", "a1"), leave("r", "a2", "a2"),
			capped(joinUser("r", "b", "b2", "bob"), 2, 1))
		var got []OpStatus
		for _, r := range res {
			got = append(got, r.Status)
		}
		assert.Equal(w, []OpStatus{Done, Full, Done, Done, Done, Done}, got)
		w.counted("r")
	})
}
