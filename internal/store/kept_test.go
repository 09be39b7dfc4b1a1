package store

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// joinKept is a join of a user whose place is kept for an hour.
func joinKept(room, conn, entry, user string) Op {
	op := joinUser(room, conn, entry, user)
	op.Grace = time.Hour
	return op
}

// place is the item of a kept place.
func place(mode CleanUpGround, room, conn, entry string) CleanUpItem {
	return item(mode, room, conn, entry, NoOwner)
}

// away makes a user's place in room r a kept one.
func (w *world) away(conn, entry, user string) {
	w.Helper()
	w.ok("I", joinKept("r", conn, entry, user))
	require.Positive(w, w.ok("I", disconnect("r", conn, entry))[0].KeptUntil)
}

// The last connection of a user hands its place over to the group. Its state ends.
func TestLastConnectionIsKept(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinKept("r", "a", "a1", "ann")
		op.TTL, op.Left, op.MetaVersion, op.Meta, op.StateVersion, op.State = time.Minute, time.Minute, 3, []byte(`{"m":1}`), 7, []byte(`{"s":1}`)
		w.ok("I", op, joinUser("r", "b", "b1", "bob"))
		joined := w.record("r", "a")
		w.listen()
		before := w.clockProof().Now
		out := disconnect("r", "a", "a1")
		out.TTL = time.Minute
		res := w.ok("I", out)[0]
		events := w.events()
		require.Equal(w, []string{"S a/ann 1 2 2", "Db a/ann 1 2 2"}, told(events))
		assert.Nil(w, events[0].Record.State)
		assert.EqualValues(w, 7, events[0].StateVersion)
		d := events[1]
		assert.Equal(w, d.Position(), res.Position)
		assert.Equal(w, res.KeptUntil, d.KeptUntil)
		assert.Equal(w, d.At+time.Hour.Milliseconds(), d.KeptUntil)
		assert.GreaterOrEqual(w, d.At, before)
		want := Record{
			Conn: "a", Entry: "a1", Incarnation: NoOwner, Seq: d.Seq, JoinedAt: joined.JoinedAt, User: "ann", Grace: time.Hour,
			KeptUntil: d.KeptUntil, KeptCause: CauseLost, MetaVersion: 3, StateVersion: 7,
		}
		assert.Equal(w, want, d.Record)
		want.Meta = []byte(`{"m":1}`)
		assert.Equal(w, want, w.record("r", "a"))
		assert.Zero(w, w.pttl(w.keys.Conn("r", "a")))
		assert.Zero(w, w.pttl(w.keys.State("r", "a")))
		assert.Equal(w, []EntryRef{{Conn: "b", Entry: "b1", Room: "r"}}, w.owned("I"))
		assert.Equal(w, map[string]string{"I": "1"}, w.owners("r"), "no message goes there")
		w.counted("r")
		w.indexed("r")

		// A repetition answers the same and changes nothing, now and later.
		held := w.dump()
		again, err := w.again("I", out)
		require.NoError(w, err)
		assert.Equal(w, res, again[0])
		assert.Equal(w, held, w.dump())
		w.numbers["I"]++
		again, err = w.again("I", out)
		require.NoError(w, err)
		assert.Equal(w, res.KeptUntil, again[0].KeptUntil)
		assert.Empty(w, w.heard())

		// Its former owner can neither refresh nor change it.
		for _, o := range []Op{
			{TTL: time.Minute, Left: time.Minute}, {StateVersion: 9, State: []byte("9")}, {MetaVersion: 9, Meta: []byte("9")},
			{Person: true, User: "eve", MetaVersion: 9},
		} {
			o.Kind, o.Room, o.Conn, o.Entry = OpUpdate, "r", "a", "a1"
			assert.Equal(w, Gone, w.commit("I", o)[0].Status)
		}
		assert.Empty(w, w.heard())
	})
}

// Only the last connection of a user is kept. Prevents: a page that is reloaded, whose
// new connection joins before the old one ends, leaves a ghost beside the user.
func TestReloadLeavesNoGhost(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinKept("r", "old", "o1", "ann"), joinKept("r", "new", "n1", "ann"))
		w.listen()
		assert.Zero(w, w.ok("I", disconnect("r", "old", "o1"))[0].KeptUntil)
		w.tells("Lb old/ann 1 1 1")
		w.counted("r")
		w.ok("I", disconnect("r", "new", "n1"))
		w.tells("Db new/ann 1 1 1")
		w.counted("r")
	})
}

// A leave that was asked for, and one of an entry without grace, is no matter of grace.
func TestWhatIsNotKept(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinKept("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "bob"), join("r", "x", "x1"))
		w.listen()
		w.ok("I", leave("r", "a", "a1"), disconnect("r", "b", "b1"), disconnect("r", "x", "x1"))
		w.tells("Ll a/ann 0 2 2", "Lb b/bob 0 1 1", "Lb x 0 0 0")
		w.counted("r")
		assert.Empty(w, w.permanent())
	})
}

// A connection without a user is a user of its own. It can return only under its id.
func TestPlaceWithoutAUser(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinKept("r", "a", "a1", "")
		w.ok("I", op, joinKept("r", "b", "b1", ""))
		assert.Empty(w, w.numbersIn("r"), "grace alone costs nothing")
		w.listen()
		w.ok("I", disconnect("r", "a", "a1"))
		w.counted("r")
		named := joinKept("r", "c", "c1", "")
		named.Replaces = "a"
		assert.Empty(w, w.ok("I", named)[0].Replaced)
		op.Entry = "a2"
		assert.Equal(w, "a", w.ok("I", op)[0].Replaced)
		w.tells("Db a 0 2 2", "J c 0 3 3", "J a for a 0 3 3")
		w.counted("r")
		assert.Empty(w, w.keptIn())
	})
}

// The deadline in the record decides, whatever the index says, and any server may end
// the place then.
func TestGraceOver(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		brief := joinKept("r", "b", "b1", "bob")
		brief.Grace = 10 * time.Millisecond
		w.ok("I", brief)
		w.ok("I", disconnect("r", "b", "b1"))
		w.listen()
		until := w.record("r", "b").KeptUntil
		places, next, err := w.Kept(w.Context(), 0, 0, 9)
		require.NoError(w, err)
		assert.Zero(w, next)
		assert.Equal(w, []KeptPlace{
			{EntryRef{Conn: "b", Entry: "b1", Room: "r"}, until}, {EntryRef{Conn: "a", Entry: "a1", Room: "r"}, w.record("r", "a").KeptUntil},
		}, places)
		first, err := w.NextKept(w.Context(), []int{0, 1})
		require.NoError(w, err)
		assert.Equal(w, []int64{until, 0}, first)
		for w.clockProof().Now <= until {
			time.Sleep(5 * time.Millisecond)
		}
		// An index that lies does not end a place.
		w.rdb.ZAdd(w.Context(), w.keys.Kept(0), z(1, "e a a1 r"), z(2, "e a a0 r"), z(3, "e nobody n1 r"))
		assert.Equal(w, "a00+0", w.cleanUp(
			place(GroundGraceOver, "r", "a", "a1"), place(GroundGraceOver, "r", "a", "a0"), place(GroundGraceOver, "r", "nobody", "n2"),
			places[0].Item(), places[0].Item()))
		w.tells("Lb b/bob 0 1 1")
		w.counted("r")
		w.rdb.ZRem(w.Context(), w.keys.Kept(0), "e nobody n1 r")
		w.indexed("r")
		assert.EqualValues(w, 1, w.Stats().CleanedUp.Kept)
	})
}

// A lost index is written again for the places that are named. A place without a record
// is taken off the index, and subscribers that still list it are told.
func TestKeptIndexIsRepaired(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.away("b", "b1", "bob")
		w.ok("J", joinUser("r", "c", "c1", "cat"))
		w.del(w.keys.Kept(0))
		assert.Equal(w, "aaa", w.cleanUp(place(GroundGraceOver, "r", "a", "a1"), place(GroundGraceOver, "r", "b", "b1"),
			place(GroundGraceOver, "r", "c", "c1")))
		w.indexed("r")
		w.del(w.keys.Members("r"))
		w.listen()
		assert.Equal(w, "+0+", w.cleanUp(place(GroundGraceOver, "r", "a", "a1"), place(GroundGraceOver, "r", "a", "a1"),
			place(GroundRemoved, "r", "b", "b1")))
		w.tells("Lb a", "Lb b")
		assert.Empty(w, w.keptIn())
		assert.Equal(w, map[string]string{"J": "1"}, w.owners("r"))
		w.commit("J", Op{Kind: OpLeave, Room: "r", Conn: "c", Entry: "c1", Cause: CauseLeft, Known: true, User: "cat"})
		w.counted("r")
		assert.Empty(w, w.permanent())
	})
}

// A room that lost its records and only counted kept places is empty. Prevents: a
// position that counts them forever, because no server can write them again.
func TestLostPlacesDoNotKeepARoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.ok("I", joinUser("r", "c", "c1", "cat"))
		w.del(w.keys.Members("r"), w.keys.Kept(0))
		w.commit("I", Op{Kind: OpLeave, Room: "r", Conn: "c", Entry: "c1", Cause: CauseLeft, Known: true, User: "cat"})
		assert.Empty(w, w.permanent())

		w.away("a", "a2", "ann")
		w.del(w.keys.Members("r"), w.keys.Kept(0))
		assert.Equal(w, Gone, w.commit("I", Op{Kind: OpRecount, Room: "r"})[0].Status)
		assert.Empty(w, w.permanent())
	})
}

// A client that names its last connection takes that place in whatever condition it is.
// Prevents: a user who changed networks is listed twice until the old socket times out.
func TestNamedPlaceIsTaken(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		old := joinTTL("r", "old", "o1", time.Minute)
		old.User, old.Grace, old.StateVersion, old.State = "ann", time.Hour, 1, []byte("1")
		w.ok("I", old, joinUser("r", "b", "b1", "bob"))
		w.listen()
		named := func(conn, entry, user, replaces string) OpResult {
			op := joinKept("r", conn, entry, user)
			op.Replaces = replaces
			return w.ok("J", op)[0]
		}
		// A live one, on another server.
		res := named("new", "n1", "ann", "old")
		assert.Equal(w, []string{"old", "I"}, []string{res.Replaced, res.ReplacedOwner})
		assert.Equal(w, []int{2, 2}, []int{res.Total, res.Users})
		w.tells("J new/ann for old 2 3 2", "Lp old/ann 1 2 2")
		w.absent("r", "old")
		assert.Zero(w, w.pttl(w.keys.Conn("r", "old")))
		assert.Zero(w, w.pttl(w.keys.State("r", "old")))
		w.counted("r")
		// A repetition says the same, also after the entry was changed.
		again := func() OpResult {
			op := joinKept("r", "new", "n1", "ann")
			op.Replaces = "old"
			r, err := w.again("J", op)
			require.NoError(w, err)
			return r[0]
		}
		assert.Equal(w, res, again())
		w.ok("J", Op{Kind: OpUpdate, Room: "r", Conn: "new", Entry: "n1", StateVersion: 1, State: []byte("1"), MetaVersion: 1, Meta: []byte("1")})
		assert.Equal(w, "old", again().Replaced)
		w.tells("M new/ann 1 2 2", "S new/ann 1 2 2")
		// One of the same server.
		res = named("next", "x1", "ann", "new")
		assert.Equal(w, []string{"new", "J"}, []string{res.Replaced, res.ReplacedOwner})
		assert.Equal(w, []EntryRef{{Conn: "next", Entry: "x1", Room: "r"}}, w.owned("J"))
		// A kept one.
		w.ok("J", disconnect("r", "next", "x1"))
		res = named("last", "l1", "ann", "next")
		assert.Equal(w, []string{"next", NoOwner}, []string{res.Replaced, res.ReplacedOwner})
		w.tells("J next/ann for new 2 3 2", "Lp new/ann 1 2 2", "Db next/ann 1 2 2", "J last/ann for next 2 3 2", "Lp next/ann 1 2 2")
		// Not that of another user, nor one that does not exist, nor itself.
		assert.Empty(w, named("c", "c1", "ann", "b").Replaced)
		assert.Empty(w, named("d", "d1", "", "last").Replaced)
		assert.Empty(w, named("e", "e1", "ann", "nobody").Replaced)
		assert.Empty(w, named("e", "e2", "ann", "e").Replaced)
		w.tells("J c/ann 2 3 2", "J d 0 4 3", "J e/ann 3 5 3", "R e/ann 3 5 3")
		w.counted("r")
		assert.Empty(w, w.keptIn())
	})
}

// A user who joins again takes the kept place, on any server. The number of the user's
// connections does not pass 0.
func TestPlaceIsTakenByTheUser(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.away("b", "b1", "bob")
		w.listen()
		res := w.ok("J", joinUser("r", "c", "c1", "ann"))[0]
		assert.Equal(w, []string{"a", NoOwner}, []string{res.Replaced, res.ReplacedOwner})
		w.tells("J c/ann for a 2 3 2", "Lp a/ann 1 2 2")
		w.counted("r")
		w.indexed("r")
		again, err := w.again("J", joinUser("r", "c", "c1", "ann"))
		require.NoError(w, err)
		assert.Equal(w, res, again[0])
		// A connection that becomes the user takes the place, too.
		w.ok("J", join("r", "d", "d1"))
		w.ok("J", Op{Kind: OpUpdate, Room: "r", Conn: "d", Entry: "d1", Person: true, User: "bob", MetaVersion: 1, Meta: []byte("1")})
		w.tells("J d 0 3 3", "M d/bob for b 2 3 2", "Lp b/bob 1 2 2")
		w.counted("r")
		w.indexed("r")
	})
}

// The same connection returns to its own place. It keeps the time of its join.
func TestSameConnectionReturns(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		was := w.record("r", "a")
		time.Sleep(2 * time.Millisecond)
		w.listen()
		op := joinKept("r", "a", "a2", "ann")
		op.TTL, op.Left, op.StateVersion, op.State = time.Minute, time.Minute, 1, []byte("1")
		res := w.ok("J", op)[0]
		assert.Equal(w, "a", res.Replaced)
		again, err := w.again("J", op)
		require.NoError(w, err)
		assert.Equal(w, res, again[0])
		w.tells("J a/ann for a 1 1 1")
		now := w.record("r", "a")
		assert.Equal(w, was.JoinedAt, now.JoinedAt)
		assert.Equal(w, []string{"a2", "J"}, []string{now.Entry, now.Incarnation})
		assert.Zero(w, now.KeptUntil)
		w.counted("r")
		w.indexed("r")
		w.expectTTL(time.Minute, w.keys.Conn("r", "a"))

		// The end of the former entry does nothing to the new one.
		assert.Equal(w, "0", w.cleanUp(place(GroundGraceOver, "r", "a", "a1")))
		assert.Equal(w, Other, w.commit("I", disconnect("r", "a", "a1"))[0].Status)
		// Under another user it is another person.
		w.ok("J", disconnect("r", "a", "a2"))
		w.ok("I", joinKept("r", "a", "a3", "bob"))
		w.tells("S a/ann 1 1 1", "Db a/ann 1 1 1", "Lb a/ann 0 0 0", "J a/bob 1 1 1")
		w.counted("r")
		w.indexed("r")
	})
}

// A room is counted again over several calls. A user who returns before its end takes the kept
// place, whether or not it has been counted, and the last connection of a user that ends
// is kept.
func TestKeptPlacesDuringARecount(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.away("b", "b1", "bob")
		var ops []Op
		for i := range 1200 {
			ops = append(ops, joinKept("r", fmt.Sprint("c", i), fmt.Sprint("e", i), fmt.Sprint("u", i)))
		}
		ops = append(ops, joinKept("r", "two", "two", "u7"))
		w.ok("I", ops...)
		w.del(w.keys.Users("r"))
		w.ok("I", joinKept("r", "a2", "a2", "ann"))
		assert.Positive(w, w.ok("I", disconnect("r", "c0", "e0"))[0].KeptUntil)
		w.ok("I", joinKept("r", "b2", "b2", "bob"))
		assert.Positive(w, w.ok("I", disconnect("r", "c1", "e1"))[0].KeptUntil)
		w.ok("I", disconnect("r", "c7", "e7")) // of a user with two connections
		for range 6 {
			w.commit("I", Op{Kind: OpRecount, Room: "r", Entries: w.check("I", "r").Rooms[0].Entries})
		}
		assert.False(w, w.check("I", "r").Rooms[0].Uncounted)
		w.counted("r")
		w.indexed("r")
		for _, gone := range []string{"a", "b", "c7"} {
			_, there, err := w.Record(w.Context(), "r", gone)
			require.NoError(w, err)
			assert.False(w, there, gone)
		}
	})
}

// A recount that fails, because a member went without a script, leaves nothing in the room
// that follows in the same call, and begins again.
func TestFailedRecountStaysInItsRoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		var ops []Op
		for i := range 1800 {
			ops = append(ops, joinUser("r", fmt.Sprint("c", i), "e", fmt.Sprint("u", i)))
		}
		w.ok("I", ops...)
		w.ok("I", joinUser("b", "k", "e", "bob"))
		w.del(w.keys.Users("r"))
		w.ok("I", joinUser("r", "x0", "e", "x"))
		if counted := w.rdb.SMembers(w.Context(), w.keys.Recount("r")).Val(); len(counted) > 0 {
			w.rdb.HDel(w.Context(), w.keys.Members("r"), counted[0])
		} else { // the embedded Redis scans everything at once
			w.rdb.HDel(w.Context(), w.keys.Members("r"), "c0")
		}
		for i := range 12 {
			w.ok("I", joinUser("r", fmt.Sprint("y", i), "e", "y"), joinUser("b", fmt.Sprint("k", i), "e", "carl"))
			w.counted("b")
		}
		assert.Positive(w, w.occupancy("r").Users, "it is counted")
	})
}

// A connection that comes back as another user, in a room over its bound, takes its own
// place and no further one, and never ends a member without joining.
func TestAnotherUserInAFullRoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinUser("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "bob"), joinUser("r", "c", "c1", "cat"))
		w.listen()
		require.Equal(w, Done, w.commit("J", capped(joinUser("r", "a", "a2", "amy"), 2, 0))[0].Status)
		w.tells("Ll a/ann 0 2 2", "J a/amy 1 3 3")
		w.counted("r")
	})
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.ok("I", joinUser("r", "b", "b1", "bob"))
		require.Equal(w, Done, w.commit("J", capped(joinUser("r", "a", "a2", "amy"), 0, 2))[0].Status)
		w.counted("r")
	})
}

// An app finds the kept place of a user and ends it. A connection that lives is no kept
// place, and a repeated call finds nothing.
func TestKeptPlaceOfAUser(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.ok("J", joinUser("r", "b", "b1", "bob"))
		for _, user := range []string{"bob", "cat", ""} {
			_, ok, err := w.KeptOf(w.Context(), "r", user)
			require.NoError(w, err)
			assert.False(w, ok, user)
		}
		place, ok, err := w.KeptOf(w.Context(), "r", "ann")
		require.NoError(w, err)
		assert.True(w, ok)
		assert.Equal(w, EntryRef{Room: "r", Conn: "a", Entry: "a1"}, place)
		w.listen()
		for _, want := range []int{1, 0} {
			n, err := w.RemoveKept(w.Context(), []EntryRef{place, {Room: "r", Conn: "b", Entry: "b1"}})
			require.NoError(w, err)
			assert.Equal(w, want, n)
		}
		w.tells("Lr a/ann 0 1 1")
		w.counted("r")
	})
}

// A join that is sent again although its place has been kept since then is not done already:
// it takes the place back.
func TestRepeatedJoinOfAKeptPlace(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinKept("r", "a", "a1", "ann")
		op.TTL, op.Left = time.Minute, time.Minute
		w.ok("I", op)
		w.del(w.keys.Conn("r", "a"))
		require.Equal(w, "k", w.cleanUp(item(GroundExpired, "r", "a", "a1", "I")))
		w.listen()
		res := w.ok("I", op)[0]
		assert.Equal(w, "a", res.Replaced)
		w.tells("J a/ann for a 1 1 1")
		assert.Zero(w, w.record("r", "a").KeptUntil)
		assert.Equal(w, []EntryRef{{Conn: "a", Entry: "a1", Room: "r"}}, w.owned("I"))
		w.counted("r")
		w.indexed("r")
		assert.Equal(w, "a", w.cleanUp(place(GroundGraceOver, "r", "a", "a1")))
	})
}

// Entries of a dead or silent connection are kept under the same conditions. All
// servers find the same deadline.
func TestCleanUpKeeps(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		silent := joinKept("r", "s", "s1", "sue")
		silent.TTL, silent.Left = time.Minute, time.Minute
		stated := joinKept("r", "a", "a1", "ann")
		stated.StateVersion, stated.State = 1, []byte("1")
		w.ok("I", silent, stated, joinKept("r", "b", "b1", "bob"), joinKept("r", "b2", "b2", "bob"), joinUser("r", "c", "c1", "cat"), join("r", "x", "x1"))
		w.listen()
		w.del(w.keys.Conn("r", "s"))
		assert.Equal(w, "k0", w.cleanUp(item(GroundExpired, "r", "s", "s1", "I"), item(GroundExpired, "r", "s", "s0", "I")))
		w.tells("Ds s/sue 1 6 5")
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		end := w.clockProof().Now - 9000
		dead := func(conn, entry string) CleanUpItem {
			it := item(GroundDead, "r", conn, entry, "I")
			it.Since = end
			return it
		}
		assert.Equal(w, "k+k++", w.cleanUp(dead("a", "a1"), dead("b", "b1"), dead("b2", "b2"), dead("c", "c1"), dead("x", "x1")))
		w.tells("S a/ann 1 6 5", "Dd a/ann 1 6 5", "Ld b/bob 1 5 5", "Dd b2/bob 1 5 5", "Ld c/cat 0 4 4", "Ld x 0 3 3")
		assert.Equal(w, end+time.Hour.Milliseconds(), w.record("r", "a").KeptUntil)
		assert.Equal(w, CauseServerLost, w.record("r", "a").KeptCause)
		assert.Empty(w, w.owned("I"))
		w.counted("r")
		w.indexed("r")
		// Another server, later, with another idea of the end of the lease.
		again := dead("a", "a1")
		again.Since += 5000
		held := w.dump()
		assert.Equal(w, "k0", w.cleanUp(again, dead("b", "b1")))
		assert.Equal(w, held, w.dump())
		assert.Empty(w, w.heard())
		// The entry of another incarnation is no business of this clean-up.
		w.ok("J", joinKept("r", "a", "a2", "ann"))
		assert.Equal(w, "0", w.cleanUp(dead("a", "a1")))
		assert.Equal(w, "a", w.cleanUp(item(GroundDead, "r", "a", "a2", "J")))
	})
}

// If the server died long ago, the time is over when it is found.
func TestCleanUpAfterGrace(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinUser("r", "a", "a1", "ann")
		op.Grace = 5 * time.Second
		w.ok("I", op)
		w.listen()
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		it := item(GroundDead, "r", "a", "a1", "I")
		it.Since = w.clockProof().Now - 5000
		assert.Equal(w, "+", w.cleanUp(it))
		w.tells("Ld a/ann 0 0 0")
		w.counted("r")
		assert.Empty(w, w.keptIn())
	})
}

// The list of dead servers has the end of each lease.
func TestDeadSince(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		_, err := w.Register(w.Context(), "I", -7*time.Second)
		require.NoError(w, err)
		now, err := w.Register(w.Context(), "J", time.Minute)
		require.NoError(w, err)
		require.True(w, w.declareDead("I"))
		require.NoError(w, w.DeclareDead(w.Context(), "K"))
		r := w.renew("J", time.Minute)
		assert.Equal(w, []string{"I", "K"}, r.Dead)
		assert.InDelta(w, now-7000, r.DeadSince[0], 3000)
		assert.InDelta(w, now, r.DeadSince[1], 3000)
	})
}

// A place ends if the app removes it, or if its owner leaves after all.
func TestPlaceIsRemoved(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		w.away("b", "b1", "bob")
		w.ok("I", joinKept("r", "c", "c1", "cat"))
		w.listen()
		assert.Equal(w, "+0a0", w.cleanUp(place(GroundRemoved, "r", "a", "a1"), place(GroundRemoved, "r", "a", "a1"),
			place(GroundRemoved, "r", "c", "c1"), place(GroundRemoved, "r", "b", "b0")))
		w.tells("Lr a/ann 0 2 2")
		out := leave("r", "b", "b1")
		out.Known = true
		w.ok("I", out)
		w.tells("Ll b/bob 0 1 1")
		res, err := w.again("I", out)
		require.NoError(w, err)
		assert.Equal(w, Gone, res[0].Status)
		assert.Empty(w, w.heard())
		w.counted("r")
		w.indexed("r")
	})
}

// If the index of kept places cannot be written, the entry leaves at once. Prevents: a
// place that is kept forever, because nothing finds it.
func TestKeptKeyOfAnotherType(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Kept(0), "mine", 0).Err())
		op := joinKept("r", "a", "a1", "ann")
		op.StateVersion, op.State = 1, []byte("1")
		w.ok("I", op, joinKept("r", "b", "b1", "bob"), join("q", "x", "x1"))
		w.listen()
		res := w.ok("I", leave("q", "x", "x1"), disconnect("r", "a", "a1"))
		assert.Zero(w, res[1].KeptUntil)
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		assert.Equal(w, "+0", w.cleanUp(item(GroundDead, "r", "b", "b1", "I"), place(GroundGraceOver, "r", "b", "b1")))
		assert.Equal(w, []string{"Ll x", "Lb a/ann 0 1 1", "Ld b/bob 0 0 0"}, told(w.events()))
		w.counted("r")
		next, err := w.NextKept(w.Context(), []int{0})
		require.NoError(w, err)
		assert.Equal(w, []int64{0}, next)
	})
}

// Users with live connections and kept places at the same time come from a Redis that
// lost keys. A recount ends the places.
func TestRecountEndsSurplusPlaces(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.away("a", "a1", "ann")
		raw := w.rdb.HGet(w.Context(), w.keys.Members("r"), "a").Val()
		w.ok("J", joinUser("r", "b", "b1", "ann"))
		w.away("c", "c1", "cat")
		twin := w.rdb.HGet(w.Context(), w.keys.Members("r"), "c").Val()
		require.NoError(w, w.rdb.HSet(w.Context(), w.keys.Members("r"), "a", raw, "d", strings.Replace(twin, "c1", "d1", 1)).Err())
		w.listen()
		w.ok("J", joinUser("r", "e", "e1", "eve"))
		for _, e := range w.events() {
			assert.True(w, e.Counted, "%v", e)
		}
		w.counted("r")
		w.absent("r", "a")
	})
}

// Places in rooms of any name, and pages of the index.
func TestPagesOfKeptPlaces(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		var want []EntryRef
		for i, room := range nasty {
			op := joinUser(room, "c", "e", "ann")
			op.Grace = time.Hour + time.Duration(i)*time.Minute
			w.ok("I", op, disconnect(room, "c", "e"))
			want = append(want, EntryRef{Conn: "c", Entry: "e", Room: room})
		}
		w.rdb.ZAdd(w.Context(), w.keys.Kept(0), z(5, "of other software"))
		var got []EntryRef
		for skip, first := 0, true; first || skip > 0; first = false {
			places, next, err := w.Kept(w.Context(), 0, skip, 7)
			require.NoError(w, err)
			for _, p := range places {
				got = append(got, p.EntryRef)
				assert.Equal(w, "+", w.cleanUp(place(GroundRemoved, p.Room, p.Conn, p.Entry)), fmt.Sprintf("%q", p.Room))
				w.rdb.ZAdd(w.Context(), w.keys.Kept(0), z(float64(p.Until), fmt.Sprintf("e %s %s %s", p.Conn, p.Entry, p.Room)))
			}
			skip = next
		}
		assert.Equal(w, want, got)
	})
}

// CleanUp says until when a place is kept, to the server that hands it over and to those
// that come later.
func TestCleanUpTellsTheDeadline(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		silent := joinKept("r", "b", "b1", "bob")
		silent.TTL, silent.Left = time.Minute, time.Minute
		w.ok("I", joinKept("r", "a", "a1", "ann"), silent)
		require.NoError(w, w.rdb.Del(w.Context(), w.keys.Conn("r", "b")).Err())
		began := w.clockProof().Now
		dead := item(GroundDead, "r", "a", "a1", "I")
		dead.Since = began - 1000
		items := []CleanUpItem{
			dead, item(GroundExpired, "r", "b", "b1", "I"), place(GroundGraceOver, "r", "a", "a1"), place(GroundGraceOver, "r", "x", "x1"),
		}
		w.whileDead("I", func() { require.Equal(w, "kka0", w.cleanUp(items...)) })
		hour := time.Hour.Milliseconds()
		assert.Equal(w, dead.Since+hour, items[0].KeptUntil)
		assert.GreaterOrEqual(w, items[1].KeptUntil, began+hour)
		assert.Equal(w, w.record("r", "b").KeptUntil, items[1].KeptUntil)
		assert.Equal(w, items[0].KeptUntil, items[2].KeptUntil)
		assert.Zero(w, items[3].KeptUntil)

		later := item(GroundDead, "r", "a", "a1", "I")
		items = []CleanUpItem{later}
		w.whileDead("I", func() { require.Equal(w, "k", w.cleanUp(items...)) })
		assert.Equal(w, dead.Since+hour, items[0].KeptUntil, "the first deadline holds")
	})
}
