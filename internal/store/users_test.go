package store

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// Entries without a user leave no trace of users: the layout is that of rooms without
// the feature, byte for byte.
func TestPlainEntriesHaveNoNumbers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.CountUsers()
		w.listen()
		w.ok("I", join("r", "a", "a1"), joinTTL("r", "b", "b1", time.Minute))
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "a", Entry: "a1", MetaVersion: 1, Meta: []byte("1"), StateVersion: 1, State: []byte("2")})
		raw := w.rdb.HGet(w.Context(), w.keys.Members("r"), "a").Val()
		r := w.record("r", "a")
		assert.Equal(w, fmt.Sprintf("a1 I 0 1 1 . 1 1 0 %d 4\n12", r.JoinedAt), raw)
		at := w.position("r")
		assert.Equal(w, fmt.Sprintf("%s 4 %s I 2", at.Epoch, at.Tag), w.rdb.Get(w.Context(), w.keys.Seq("r")).Val())
		for _, m := range w.heard() {
			assert.Contains(w, m.payload, " . ", "the cause is one byte")
			assert.NotContains(w, m.payload, ":")
		}
		w.counted("r")
		w.ok("I", leave("r", "a", "a1"), Op{Kind: OpLeave, Room: "r", Conn: "b", Entry: "b1", Cause: CauseClosed, TTL: time.Minute})
		assert.Empty(w, w.permanent())
	})
}

// An op about an entry without a user names no key of users, unless the room may have
// users.
func TestPlainCallsNameNoUsers(t *testing.T) {
	t.Parallel()
	keys := testKeys{buckets: 1}
	plain := []Op{join("hall", "a", "a1"), leave("hall", "b", "b1"), {Kind: OpUpdate, Room: "hall", Conn: "c", Entry: "c1", StateVersion: 1}}
	_, names, args := CommitCall(keys, 0, "I", 1, 0, plain)
	assert.NotContains(t, strings.Join(names, " "), "users")
	assert.NotContains(t, args, "r")
	for _, personal := range []Op{joinUser("hall", "d", "d1", "ann"), disconnect("hall", "d", "d1")} {
		_, names, _ = CommitCall(keys, 0, "I", 1, 0, append([]Op{personal, join("q", "a", "a1")}, plain...))
		assert.Contains(t, names, keys.Users("hall"))
		assert.NotContains(t, names, keys.Users("q"))
	}
}

// Each event tells the number of the user's connections and the numbers of the room
// after it. A 1 in a join means that the user arrived, a 0 in a leave that the user
// left.
func TestUsersAreCounted(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.listen()
		w.ok("I", join("r", "x", "x1"))
		res := w.ok("I", joinUser("r", "a", "a1", "ann"))[0]
		assert.Equal(w, []int{2, 2}, []int{res.Total, res.Users})
		res = w.ok("J", joinUser("r", "b", "b1", "ann"))[0]
		assert.Equal(w, []int{3, 2}, []int{res.Total, res.Users}, "two connections of one user")
		res = w.ok("J", join("r", "y", "y1"))[0]
		assert.Equal(w, []int{4, 3}, []int{res.Total, res.Users}, "a connection without a user counts as one")
		w.tells("J x", "J a/ann 1 2 2", "J b/ann 2 3 2", "J y 0 4 3")
		assert.Equal(w, Numbers{Connections: 4, Users: 3}, w.occupancy("r").Numbers)
		w.counted("r")
		assert.Equal(w, "ann", w.record("r", "a").User)

		w.ok("J", Op{Kind: OpUpdate, Room: "r", Conn: "b", Entry: "b1", StateVersion: 1, State: []byte("1"), MetaVersion: 1, Meta: []byte("2")})
		w.tells("M b/ann 2 4 3", "S b/ann 2 4 3")
		w.ok("I", leave("r", "a", "a1"))
		w.ok("J", Op{Kind: OpLeave, Room: "r", Conn: "b", Entry: "b1", Cause: CauseClosed, Stated: true})
		w.tells("Ll a/ann 1 3 3", "Lc b/ann 0 2 2")
		w.counted("r")
		w.ok("I", leave("r", "x", "x1"))
		w.ok("J", leave("r", "y", "y1"))
		w.tells("Ll x 0 1 1", "Ll y 0 0 0")
		w.counted("r")
		assert.Empty(w, w.permanent())
	})
}

// Servers that know nothing of users, for example because their connections have no
// metadata, count entries of rooms with users all the same.
func TestPlainOpsInRoomsWithUsers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		stated := joinUser("r", "b", "b1", "bob")
		stated.StateVersion, stated.State, stated.StateLeft = 1, []byte("1"), time.Millisecond
		w.ok("I", joinUser("r", "a", "a1", "ann"), stated)
		w.listen()
		w.ok("J", join("r", "x", "x1"), join("r", "y", "y1"))
		w.ok("J", Op{Kind: OpUpdate, Room: "r", Conn: "x", Entry: "x1", StateVersion: 1, State: []byte("1")})
		w.ok("I", leave("r", "a", "a1"))
		w.tells("J x 0 3 3", "J y 0 4 4", "S x 0 4 4", "Ll a/ann 0 3 3")
		w.waitExpired(w.keys.State("r", "b"))
		it := item(GroundStateExpired, "r", "b", "b1", "I")
		it.StateVersion = 1
		require.Equal(w, "+", w.cleanUp(it))
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		require.Equal(w, "+", w.cleanUp(item(GroundDead, "r", "b", "b1", "I")))
		w.tells("S b/bob 1 3 3", "Ld b/bob 0 2 2")
		w.counted("r")
	})
}

// The user in the record counts, not the one of the op. Prevents: numbers that drift if
// a connection joins again under another user, or if versions of the app differ.
func TestTheRecordedUserCounts(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinUser("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "ann"), joinUser("r", "c", "c1", "bob"))
		w.listen()
		// Another entry under another user is another person.
		joined := w.record("r", "a").JoinedAt
		time.Sleep(2 * time.Millisecond)
		w.ok("I", joinUser("r", "a", "a2", "bob"))
		w.tells("Ll a/ann 1 2 2", "J a/bob 2 3 2")
		assert.Greater(w, w.record("r", "a").JoinedAt, joined)
		w.counted("r")
		// The same user stays, and so does the time of the join.
		joined = w.record("r", "a").JoinedAt
		time.Sleep(2 * time.Millisecond)
		w.ok("J", joinUser("r", "a", "a3", "bob"))
		w.tells("R a/bob 2 3 2")
		assert.Equal(w, joined, w.record("r", "a").JoinedAt)
		// A leave that names another user, and one that names none.
		w.ok("J", Op{Kind: OpLeave, Room: "r", Conn: "a", Entry: "a3", Cause: CauseLeft, User: "ann"})
		w.ok("I", leave("r", "b", "b1"))
		w.tells("Ll a/bob 1 2 2", "Ll b/ann 0 1 1")
		w.counted("r")
		assert.NotContains(w, w.owned("I"), EntryRef{Conn: "a", Entry: "a1", Room: "r"})
	})
}

// Metadata bring a user, change and remove it.
func TestMetadataChangeTheUser(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinTTL("r", "a", "a1", time.Minute), join("r", "b", "b1"), join("r", "c", "c1"))
		w.listen()
		meta := func(conn, user string, version uint64, grace time.Duration) []string {
			w.commit("I", Op{
				Kind: OpUpdate, Room: "r", Conn: conn, Entry: conn + "1", TTL: w.record("r", conn).TTL, Person: true, User: user, Grace: grace,
				MetaVersion: version, Meta: fmt.Append(nil, version),
			})
			w.counted("r")
			return told(w.events())
		}
		assert.Equal(w, []string{"M a/ann 1 3 3"}, meta("a", "ann", 1, time.Minute))
		assert.Equal(w, []string{"M b/ann 2 3 2"}, meta("b", "ann", 1, 0))
		assert.Empty(w, meta("b", "ann", 1, 0), "the same again")
		assert.Empty(w, meta("b", "bob", 0, 0), "older metadata")
		assert.Equal(w, []string{"M b/bob 1 3 3"}, meta("b", "bob", 2, 0))
		assert.Equal(w, []string{"M b/eve 1 3 3"}, meta("b", "eve", 2, 0), "the app takes another field for the user")
		assert.Equal(w, []string{"M a 0 3 3"}, meta("a", "", 2, 0))
		r := w.record("r", "a")
		assert.Equal(w, "2", string(r.Meta))
		assert.Equal(w, time.Minute, r.TTL)
		assert.Zero(w, r.Grace)
		assert.Empty(w, meta("a", "", 2, 7*time.Second))
		assert.Equal(w, 7*time.Second, w.record("r", "a").Grace, "it is updated as the TTL is")
		// Metadata without a person leave both alone.
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "b", Entry: "b1", MetaVersion: 9, Meta: []byte("9")})
		assert.Equal(w, "eve", w.record("r", "b").User)
		w.counted("r")
	})
}

// Items of later versions in a record survive changes by this one.
func TestExtraIsKept(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinUser("r", "a", "a1", "ann")
		op.MetaVersion, op.Meta, op.StateVersion, op.State, op.Grace = 1, []byte(`{"m":1}`), 1, []byte(`{"s":1}`), time.Hour
		w.ok("I", op)
		raw := w.rdb.HGet(w.Context(), w.keys.Members("r"), "a").Val()
		raw = strings.Replace(raw, " 3 3600000 0\nann", " 3 3600000 6\nannzxyz 1", 1)
		require.Contains(w, raw, "zxyz 1")
		later := func() {
			got := w.rdb.HGet(w.Context(), w.keys.Members("r"), "a").Val()
			require.Contains(w, got, " 6")
			require.Contains(w, got, "\nannzxyz 1{")
		}
		require.NoError(w, w.rdb.HSet(w.Context(), w.keys.Members("r"), "a", raw).Err())
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "a", Entry: "a1", TTL: time.Minute, Left: time.Minute})
		later()
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "a", Entry: "a1", MetaVersion: 2, Meta: []byte(`{"m":2}`), StateVersion: 2, State: []byte(`{"s":2}`)})
		later()
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "a", Entry: "a1", Person: true, User: "ann", Grace: time.Hour, StateVersion: 3, State: []byte(`{"s":3}`)})
		later()
		r := w.record("r", "a")
		assert.Equal(w, []string{"ann", `{"m":2}`, `{"s":3}`}, []string{r.User, string(r.Meta), string(r.State)})
		w.ok("I", disconnect("r", "a", "a1"))
		later()
		assert.NotZero(w, w.record("r", "a").KeptUntil)
		w.counted("r")
	})
}

// A room that the position, the members or the hash of users is lost of counts right
// from the next change on. Prevents: a user who stays listed forever, or never arrives.
func TestLostNumbers(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(w *world){
		"users":             func(w *world) { w.del(w.keys.Users("r")) },
		"position":          func(w *world) { w.del(w.keys.Seq("r")) },
		"position, users":   func(w *world) { w.del(w.keys.Seq("r"), w.keys.Users("r")) },
		"one member":        func(w *world) { w.rdb.HDel(w.Context(), w.keys.Members("r"), "b") },
		"a user in hash":    func(w *world) { w.rdb.HDel(w.Context(), w.keys.Users("r"), "ann") },
		"count in the hash": func(w *world) { w.rdb.HDel(w.Context(), w.keys.Users("r"), "") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, func(w *world) {
				kept := joinUser("r", "k", "k1", "kay")
				kept.Grace = time.Hour
				w.ok("I", joinUser("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "ann"), join("r", "x", "x1"), kept)
				w.ok("I", disconnect("r", "k", "k1"))
				lose(w)
				if name == "a user in hash" {
					w.ok("I", leave("r", "a", "a1")) // finds it
				}
				w.listen()
				w.ok("J", join("r", "y", "y1"))
				counts := make(map[string]int)
				snap, err := w.Snapshot(w.Context(), "r")
				require.NoError(w, err)
				for _, r := range snap.Records {
					counts[r.Incarnation]++
				}
				w.commit("I", Op{Kind: OpRecount, Room: "r", Entries: counts["I"]})
				w.commit("J", Op{Kind: OpRecount, Room: "r", Entries: counts["J"]})
				if name != "one member" { // its owner's count shows that it is missing
					w.counted("r")
				}
				e := w.events()
				require.Equal(w, "J", kinds(e))
				require.True(w, e[0].Counted)
				require.Equal(w, len(snap.Records), e[0].Connections)
				require.Equal(w, 4, e[0].Users, "ann, kay, x, y")
			})
		})
	}
}

// The first entry of a room deletes the hash before it counts, the last one deletes it
// afterwards. So does the end of an entry without a record. Prevents: a hash that stays
// forever after the members or the position were lost.
func TestUsersDoNotLeak(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string][]string{"members": {"members"}, "members and position": {"members", "seq"}} {
		for next, act := range map[string]func(w *world){
			"a plain join": func(w *world) { w.CountUsers(); w.ok("J", join("r", "x", "x1")); w.ok("J", leave("r", "x", "x1")) },
			"a join":       func(w *world) { w.ok("J", joinUser("r", "x", "x1", "eve")); w.ok("J", leave("r", "x", "x1")) },
			"leaves": func(w *world) {
				for _, conn := range []string{"a", "b"} {
					w.commit("I", Op{Kind: OpLeave, Room: "r", Conn: conn, Entry: conn + "1", Cause: CauseLeft, Known: true, User: "ann"})
				}
			},
			"a clean-up": func(w *world) {
				require.NoError(w, w.Fence(w.Context(), 0, "I"))
				w.CountUsers()
				w.cleanUp(item(GroundDead, "r", "a", "a1", "I"), item(GroundDead, "r", "b", "b1", "I"))
			},
		} {
			t.Run(name+", "+next, func(t *testing.T) {
				t.Parallel()
				everywhere(t, func(w *world) {
					w.ok("I", joinUser("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "ann"))
					for _, key := range lost {
						w.del(map[string]string{"members": w.keys.Members("r"), "seq": w.keys.Seq("r")}[key])
					}
					act(w)
					require.Zero(w, w.rdb.Exists(w.Context(), w.keys.Users("r"), w.keys.Recount("r")).Val())
					require.Empty(w, w.numbersIn("r"))
					w.ok("J", joinUser("r", "y", "y1", "ann"))
					w.counted("r")
					w.ok("J", leave("r", "y", "y1"))
					w.counted("r")
				})
			})
		}
	}
}

// If the key of users belongs to other software, it is left alone. Joins and leaves
// work, and events have no numbers.
func TestUsersKeyOfAnotherType(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		key := w.keys.Users("r")
		require.NoError(w, w.rdb.Set(w.Context(), key, "mine", 0).Err())
		w.listen()
		op := joinUser("r", "a", "a1", "ann")
		op.Grace, op.MaxUsers = time.Hour, 1
		w.ok("I", op, joinUser("r", "b", "b1", "bob"), join("r", "x", "x1"))
		assert.Equal(w, -1, w.occupancy("r").Users)
		assert.Zero(w, w.ok("I", disconnect("r", "a", "a1"))[0].KeptUntil, "it cannot be known whether it was the last one")
		w.ok("I", leave("r", "b", "b1"))
		w.tells("J a/ann", "J b/bob", "J x", "Lb a/ann", "Ll b/bob")
		w.del(key)
		w.ok("J", joinUser("r", "a", "a2", "ann"))
		w.tells("J a/ann 1 2 2")
		w.counted("r")
		require.NoError(w, w.rdb.Del(w.Context(), key).Err())
		require.NoError(w, w.rdb.Set(w.Context(), key, "mine", 0).Err())
		w.ok("J", leave("r", "a", "a2"))
		w.ok("I", leave("r", "x", "x1"))
		assert.Equal(w, "mine", w.rdb.Get(w.Context(), key).Val())
	})
}

// A large room is counted again in several calls. Until that is done, events have no
// numbers. Changes in between are counted once.
func TestRecountOfALargeRoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const members = 1800
		var ops []Op
		for i := range members {
			op := joinUser("r", fmt.Sprint("c", i), "e", fmt.Sprint("u", i%700))
			if i%10 == 0 {
				op.User = ""
			}
			ops = append(ops, op)
		}
		w.ok("I", ops...)
		w.counted("r")
		w.del(w.keys.Users("r"))
		w.listen()
		calls := 0
		for ; calls < 20; calls++ {
			i := calls * 87 % members
			gone, back := fmt.Sprint("c", i), fmt.Sprint("n", calls)
			w.ok("I", leave("r", gone, "e"), joinUser("r", back, "e", "new"), joinUser("r", fmt.Sprint("c", members-1-i), "f", "other"))
			if w.occupancy("r").Users >= 0 {
				break
			}
			assert.True(w, w.check("I", "r").Rooms[0].Uncounted)
			for _, e := range w.events() {
				assert.False(w, e.Counted)
			}
		}
		if w.real != nil { // the embedded Redis scans everything at once
			assert.Positive(w, calls, "500 records in a call of Redis")
		}
		assert.False(w, w.check("I", "r").Rooms[0].Uncounted)
		w.counted("r")

		// A recount that no server continues begins again.
		w.del(w.keys.Users("r"))
		w.ok("I", joinUser("r", "z", "z1", "zoe"))
		assert.Equal(w, w.real != nil, w.pttl(w.keys.Recount("r")) > 0)
		w.del(w.keys.Recount("r"))
		for range 10 {
			w.commit("I", Op{Kind: OpRecount, Room: "r", Entries: w.check("I", "r").Rooms[0].Entries})
		}
		w.counted("r")
	})
}

// After a room was lost, the servers write their entries again, one after the other.
// Prevents: a user whose second tab was open all the time is reported as left and as
// arrived, because the first tab was closed in between.
func TestRebuiltRooms(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const lease = 300 * time.Millisecond
		rebuilt := func(conn, entry, user string) Op {
			op := joinUser("r", conn, entry, user)
			op.Rebuild = lease
			return op
		}
		w.ok("I", joinUser("r", "a", "a1", "ann"))
		w.ok("J", joinUser("r", "b", "b1", "ann"))
		w.del(w.keys.Members("r"), w.keys.Seq("r"), w.keys.Users("r"))
		w.listen()
		w.ok("I", rebuilt("a", "a2", "ann"), rebuilt("x", "x2", "xan"))
		assert.True(w, w.occupancy("r").Rebuilding)
		// The tab is closed, and asks to leave.
		out := w.ok("I", leave("r", "a", "a2"))[0]
		assert.Positive(w, out.KeptUntil)
		res, err := w.again("I", leave("r", "a", "a2"))
		require.NoError(w, err)
		assert.Equal(w, out.KeptUntil, res[0].KeptUntil, "a repetition")
		w.counted("r")
		w.tells("J= a/ann 1 1 1", "J= x/xan 1 2 2", "Dl a/ann 1 2 2")
		// The other server writes its entry again. That is no arrival.
		again := w.ok("J", rebuilt("b", "b2", "ann"))[0]
		assert.Empty(w, again.Replaced)
		w.tells("J= b/ann 2 3 2", "Ll a/ann 1 2 2")
		w.counted("r")
		// A user without another connection leaves when the room has been rebuilt.
		w.ok("I", leave("r", "x", "x2"))
		r := w.record("r", "x")
		w.tells("Dl x/xan 1 2 2")
		assert.Equal(w, CauseLeft, r.KeptCause)
		at, _, _ := w.Kept(w.Context(), 0, 0, 9)
		require.Len(w, at, 1)
		assert.Equal(w, "a", w.cleanUp(at[0].Item()))
		for w.clockProof().Now <= r.KeptUntil {
			time.Sleep(5 * time.Millisecond)
		}
		assert.Equal(w, "+", w.cleanUp(at[0].Item()))
		w.tells("Ll x/xan 0 1 1")
		assert.False(w, w.occupancy("r").Rebuilding)
		assert.Zero(w, w.ok("J", leave("r", "b", "b2"))[0].KeptUntil)
		w.tells("Ll b/ann 0 0 0")
		w.counted("r")
		assert.Empty(w, w.keptIn())
	})
}

// A server that takes a new incarnation writes its entries again in a room that was not
// lost. Then departures are reported as usual.
func TestRebuildOfOneServer(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinUser("r", "a", "a1", "ann"), joinUser("r", "b", "b1", "bob"))
		w.age("r", time.Minute)
		w.listen()
		op := joinUser("r", "a", "a2", "ann")
		op.Rebuild = 11 * time.Second
		w.ok("J", op)
		assert.False(w, w.occupancy("r").Rebuilding)
		w.ok("J", leave("r", "a", "a2"))
		w.tells("R= a/ann 1 2 2", "Ll a/ann 0 1 1")
		w.counted("r")
	})
}

// Leaves and changes of many users in one call, on a real Redis without memory.
func TestUsersWithoutMemory(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	a := joinUser("r", "a", "a1", "ann")
	a.Grace = time.Hour
	b := joinUser("r", "b", "b1", "bob")
	b.Grace = time.Hour
	w.ok("I", a, joinUser("r", "c", "c1", "ann"), b, joinTTL("r", "x", "x1", time.Minute))
	w.listen()
	require.NoError(w, w.rdb.ConfigSet(w.Context(), "maxmemory", "1").Err())
	res := w.commit("I", joinUser("r", "d", "d1", "dan"), leave("r", "c", "c1"), disconnect("r", "a", "a1"),
		Op{Kind: OpUpdate, Room: "r", Conn: "b", Entry: "b1", Person: true, User: "eve", MetaVersion: 1, Meta: []byte("1")})
	require.ErrorIs(w, res[0].Err, ErrFull)
	require.ErrorIs(w, res[3].Err, ErrFull)
	assert.Positive(w, res[2].KeptUntil)
	w.tells("Ll c/ann 1 3 3", "Db a/ann 1 3 3")
	w.counted("r")
	require.NoError(w, w.Fence(w.Context(), 0, "I"))
	assert.Equal(w, "k+", w.cleanUp(item(GroundDead, "r", "b", "b1", "I"), item(GroundDead, "r", "x", "x1", "I")))
	w.tells("Dd b/bob 1 3 3", "Ld x 0 2 2")
	w.counted("r")
	w.indexed("r")
	assert.Equal(w, "++", w.cleanUp(item(GroundRemoved, "r", "a", "a1", NoOwner), item(GroundRemoved, "r", "b", "b1", NoOwner)))
	w.counted("r")
}
