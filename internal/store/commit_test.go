package store

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestJoinWritesAndPublishes(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.listen()
		op := Op{
			Kind: OpJoin, Room: "lobby", Conn: "c1", Entry: "e1", TTL: 20 * time.Second, Left: 21 * time.Second,
			MetaVersion: 3, Meta: []byte(`{"a":1}`),
			StateVersion: 2, State: []byte(`{"s":true}`), StateSilent: true, StateLeft: 9 * time.Second,
		}
		before := w.clockProof().Now
		res := w.ok("I", op)[0]
		after := w.clockProof().Now

		events := w.events()
		require.Len(w, events, 1)
		e := events[0]
		assert.Equal(w, "lobby", e.Room)
		assert.Equal(w, Joined, e.Type)
		assert.Equal(w, "-", e.Prev, "the first of its epoch")
		assert.Equal(w, Cause('.'), e.Cause)
		assert.GreaterOrEqual(w, e.At, before)
		assert.LessOrEqual(w, e.At, after)
		want := Record{
			Conn: "c1", Entry: "e1", Incarnation: "I", Seq: 1, JoinedAt: e.At, TTL: 20 * time.Second,
			MetaVersion: 3, Meta: op.Meta, StateVersion: 2, State: op.State, StateSilent: true, StateUntil: e.At + 9000,
		}
		assert.Equal(w, want, e.Record)
		assert.Equal(w, want, w.record("lobby", "c1"))
		assert.Equal(w, OpResult{Status: Done, Position: e.Position(), Total: 1, Users: 1}, res)
		assert.Equal(w, e.Position(), w.position("lobby"))

		w.expectTTL(21*time.Second, w.keys.Conn("lobby", "c1"))
		w.expectTTL(9*time.Second, w.keys.State("lobby", "c1"))
		assert.Equal(w, "e1", w.rdb.Get(w.Context(), w.keys.Conn("lobby", "c1")).Val())
		assert.JSONEq(w, `{"s":true}`, w.rdb.Get(w.Context(), w.keys.State("lobby", "c1")).Val())
		assert.Equal(w, []EntryRef{{Conn: "c1", Entry: "e1", Room: "lobby"}}, w.owned("I"))
		assert.Equal(w, []string{"lobby"}, w.rooms())
		assert.Equal(w, map[string]string{"I": "1"}, w.owners("lobby"))
		w.expectTTL(24*time.Hour, w.keys.Fence(0, "I"))
	})
}

// Events of a room are numbered without a gap, and each names the tag of the one
// before.
func TestEventsFormAChain(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.listen()
		w.ok("I", join("r", "a", "a1"), join("r", "b", "b1"), join("other", "a", "x1"))
		update := Op{
			Kind: OpUpdate, Room: "r", Conn: "a", Entry: "a1",
			MetaVersion: 1, Meta: []byte(`1`), StateVersion: 1, State: []byte(`{}`),
		}
		w.ok("I", update, leave("r", "b", "b1"))
		w.ok("J", join("r", "a", "a2"))
		require.NoError(w, w.Fence(w.Context(), 0, "J"))
		require.Equal(w, "+", w.cleanUp(CleanUpItem{Mode: GroundDead, Room: "r", Conn: "a", Entry: "a2", Incarnation: "J"}))
		prev, seq, epoch, types := "-", uint64(0), "", ""
		for _, e := range w.events() {
			if e.Room != "r" {
				continue
			}
			types += string(e.Type)
			seq++
			if epoch == "" {
				epoch = e.Epoch
			}
			assert.Equal(w, prev, e.Prev)
			assert.Equal(w, seq, e.Seq)
			assert.Equal(w, epoch, e.Epoch)
			assert.NotEqual(w, e.Prev, e.Tag)
			prev = e.Tag
		}
		assert.Equal(w, "JJMSLRL", types)
		assert.Equal(w, Position{Epoch: epoch, Seq: seq, Tag: prev}, w.position("r"))
	})
}

func TestLeaveDeletesAndPublishes(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinTTL("r", "c", "e1", time.Minute)
		op.MetaVersion, op.Meta, op.StateVersion, op.State = 1, []byte(`{}`), 1, []byte(`{}`)
		w.ok("I", op)
		w.listen()
		out := leave("r", "c", "e1")
		out.Cause = CauseSilent
		w.ok("I", out)
		events := w.events()
		require.Equal(w, "L", kinds(events))
		e := events[0].Event
		assert.Equal(w, CauseSilent, e.Cause)
		e.JoinedAt, e.TTL = 0, 0
		assert.Equal(w, Record{Conn: "c", Entry: "e1", Incarnation: "I", Seq: 2}, e.Record)
		w.absent("r", "c")
		assert.Empty(w, w.permanent())
		assert.Empty(w, w.owned("I"))
		assert.Empty(w, w.rooms())
		assert.Empty(w, w.owners("r"))
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")))
		assert.Zero(w, w.pttl(w.keys.State("r", "c")))
		w.expectTTL(visited, w.keys.Seq("r"))

		// A connection that returns finds the old epoch, which then is kept again.
		w.ok("I", join("r", "c", "e2"))
		assert.Equal(w, time.Duration(-1), w.pttl(w.keys.Seq("r")))
		assert.Equal(w, e.Epoch, w.position("r").Epoch)
		assert.EqualValues(w, 3, w.position("r").Seq)
	})
}

func TestReplacedEntry(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		first := joinTTL("r", "c", "old", time.Minute)
		first.StateVersion, first.State = 7, []byte(`{"old":1}`)
		w.ok("I", first, join("r", "d", "d1"))
		joined := w.record("r", "c").JoinedAt
		w.listen()

		res := w.ok("J", join("r", "c", "new"))[0]
		events := w.events()
		require.Equal(w, "R", kinds(events))
		e := events[0]
		assert.Equal(w, Record{Conn: "c", Entry: "new", Incarnation: "J", Seq: 3, JoinedAt: joined}, e.Record)
		assert.Equal(w, e.Record, w.record("r", "c"))
		assert.Equal(w, 2, res.Total)
		assert.Equal(w, map[string]string{"I": "1", "J": "1"}, w.owners("r"))
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")), "the new one has no TTL")
		assert.Zero(w, w.pttl(w.keys.State("r", "c")), "the state ended with the old one")

		// The old entry does not affect the new one any more.
		held := w.dump()[w.keys.Members("r")]
		out := w.commit("I", leave("r", "c", "old"), Op{
			Kind: OpUpdate, Room: "r", Conn: "c", Entry: "old", TTL: time.Minute, Left: time.Minute,
			StateVersion: 9, State: []byte(`{}`),
		})
		assert.Equal(w, Other, out[0].Status)
		assert.Equal(w, Other, out[1].Status)
		assert.Equal(w, held, w.dump()[w.keys.Members("r")])
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")))
		assert.Equal(w, []EntryRef{{Conn: "d", Entry: "d1", Room: "r"}}, w.owned("I"), "it was removed from the index")
		assert.Empty(w, w.heard())

		// The same owner may replace its entry too. Then its index has only the new
		// one.
		w.ok("J", join("r", "c", "newer"))
		own := Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "new", StateVersion: 9, State: []byte(`{}`)}
		assert.Equal(w, Gone, w.commit("J", own)[0].Status, "no other server has it")
		assert.Equal(w, "R", kinds(w.events()))
		assert.Equal(w, map[string]string{"I": "1", "J": "1"}, w.owners("r"))
		assert.Equal(w, []EntryRef{{Conn: "c", Entry: "newer", Room: "r"}}, w.owned("J"))
		w.ok("J", leave("r", "c", "newer"))
		w.ok("I", leave("r", "d", "d1"))
		assert.Empty(w, w.owners("r"))
		assert.Empty(w, w.permanent())
	})
}

// If the outcome of a join is unknown, it is sent again. The state, the metadata or the
// rule may have changed by then.
func TestRepeatedJoinWritesNewerParts(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinTTL("r", "c", "e1", time.Minute)
		w.ok("I", op)
		w.listen()
		op.TTL, op.Left = 0, 0
		op.MetaVersion, op.Meta = 1, []byte(`{"n":1}`)
		op.StateVersion, op.State = 4, []byte(`{"s":1}`)
		res := w.ok("I", op)[0]
		require.Equal(w, "MS", kinds(w.events()))
		r := w.record("r", "c")
		assert.Equal(w, op.Meta, r.Meta)
		assert.EqualValues(w, 1, r.MetaVersion)
		assert.Equal(w, op.State, r.State)
		assert.EqualValues(w, 4, r.StateVersion)
		assert.Zero(w, r.TTL)
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")))
		assert.Equal(w, 1, res.Total)
		assert.Equal(w, w.position("r"), res.Position)

		// An earlier join that arrives now is older and changes nothing.
		held := w.dump()
		w.ok("I", Op{Kind: OpJoin, Room: "r", Conn: "c", Entry: "e1", StateVersion: 3, State: []byte(`{"old":1}`)})
		delete(held, w.keys.Fence(0, "I"))
		now := w.dump()
		delete(now, w.keys.Fence(0, "I"))
		assert.Equal(w, held, now)
		assert.Empty(w, w.heard())
	})
}

func TestStateVersions(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "c", "e1"))
		w.listen()
		state := func(version uint64, data string, silent bool, left time.Duration) string {
			w.ok("I", Op{
				Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1",
				StateVersion: version, State: []byte(data), StateSilent: silent, StateLeft: left,
			})
			events := w.events()
			for _, e := range events {
				assert.Equal(w, version, e.StateVersion)
				assert.Equal(w, data, string(e.Record.State))
				assert.Equal(w, silent, e.StateSilent)
				assert.Nil(w, e.Meta)
				if left > 0 {
					assert.Equal(w, e.At+left.Milliseconds(), e.StateUntil)
				} else {
					assert.Zero(w, e.StateUntil)
				}
			}
			return kinds(events)
		}
		key := w.keys.State("r", "c")

		assert.Empty(w, state(1, "", false, 0), "there was no state to clear")
		assert.Equal(w, "S", state(2, `{"n":2}`, false, time.Minute))
		w.expectTTL(time.Minute, key)
		assert.Equal(w, "S", state(5, `{"n":5}`, true, 0))
		assert.Equal(w, time.Duration(-1), w.pttl(key))
		for _, version := range []uint64{1, 4, 5} {
			assert.Empty(w, state(version, `{"late":1}`, false, 0))
		}
		assert.JSONEq(w, `{"n":5}`, string(w.record("r", "c").State))
		assert.JSONEq(w, `{"n":5}`, w.rdb.Get(w.Context(), key).Val())
		assert.True(w, w.record("r", "c").StateSilent)

		assert.Equal(w, "S", state(6, "", false, 0))
		assert.Empty(w, state(6, "", false, 0))
		assert.Empty(w, state(7, "", false, 0), "cleared before")
		assert.Zero(w, w.pttl(key))
		assert.Nil(w, w.record("r", "c").State)
		assert.Empty(w, state(6, `{"late":1}`, false, 0))
	})
}

func TestMetadataVersions(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := join("r", "c", "e1")
		op.StateVersion, op.State = 1, []byte(`{"s":1}`)
		w.ok("I", op)
		w.listen()
		meta := func(version uint64, data string) string {
			w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", MetaVersion: version, Meta: []byte(data)})
			events := w.events()
			for _, e := range events {
				assert.Equal(w, data, string(e.Record.Meta))
				assert.Equal(w, version, e.MetaVersion)
			}
			return kinds(events)
		}
		assert.Equal(w, "M", meta(3, `{"n":3}`))
		assert.Empty(w, meta(2, `{"n":2}`))
		assert.Empty(w, meta(3, `{"n":9}`))
		assert.Equal(w, "M", meta(4, ""))
		r := w.record("r", "c")
		assert.Nil(w, r.Meta)
		assert.JSONEq(w, `{"s":1}`, string(r.State), "the state has stayed")
	})
}

func TestRefreshOnlyWhatIsPresent(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", joinTTL("r", "c", "e1", time.Second), join("r", "d", "d1"))
		w.listen()
		key := w.keys.Conn("r", "c")
		refresh := Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", TTL: time.Minute, Left: 61 * time.Second}
		w.ok("I", refresh)
		w.expectTTL(61*time.Second, key)
		assert.Equal(w, time.Minute, w.record("r", "c").TTL)
		require.NoError(w, w.rdb.Del(w.Context(), key).Err()) // expired, but not ended
		w.ok("I", refresh)
		w.expectTTL(61*time.Second, key)

		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", TTL: 0, Left: time.Millisecond})
		assert.Zero(w, w.pttl(key), "the rule has no TTL any more")
		assert.Zero(w, w.record("r", "c").TTL)

		w.ok("I", leave("r", "c", "e1"))
		assert.Equal(w, "L", kinds(w.events()))
		refresh.TTL = time.Minute
		assert.Equal(w, Gone, w.commit("I", refresh)[0].Status)
		assert.Zero(w, w.pttl(key), "a late refresh brings nothing back")
		w.absent("r", "c")
		assert.Empty(w, w.heard())
	})
}

func TestNoKeyStaysBehind(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		for i := range 3 {
			inc := fmt.Sprintf("I%d", i)
			var in, out []Op
			for n := range 20 {
				conn := fmt.Sprintf("c%d-%d", i, n)
				in = append(in, Op{Kind: OpConnect, Conn: conn, MetaVersion: 1, Meta: []byte(`{}`)})
				for r := range 3 {
					op := join(fmt.Sprintf("room%d", r), conn, fmt.Sprintf("e%d", r))
					if r > 0 {
						op.TTL, op.Left = time.Hour, time.Hour
						op.StateVersion, op.State = 1, []byte(`{}`)
					}
					in = append(in, op)
					out = append(out, leave(op.Room, conn, op.Entry))
				}
				out = append(out, Op{Kind: OpDisconnect, Conn: conn})
			}
			w.ok(inc, in...)
			w.ok(inc, out...)
		}
		assert.Empty(w, w.permanent())
		assert.Empty(w, w.rooms())
	})
}

// A join of an entry whose record was lost deletes the copy of its state.
func TestAJoinDeletesTheStateOfALostRecord(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		for _, ttl := range []time.Duration{0, time.Minute} {
			first := Op{Kind: OpJoin, Room: "r", Conn: "a", Entry: "a1", TTL: ttl, Left: ttl, StateVersion: 1, State: []byte("s")}
			w.ok("I", first)
			require.NoError(w, w.rdb.Del(w.Context(), w.keys.Members("r")).Err())
			again := Op{Kind: OpJoin, Room: "r", Conn: "a", Entry: "a2", TTL: ttl, Left: ttl, StateVersion: 2, Stated: true}
			w.ok("I", again)
			require.Zero(w, w.rdb.Exists(w.Context(), w.keys.State("r", "a")).Val())
			w.ok("I", Op{Kind: OpLeave, Room: "r", Conn: "a", Entry: "a2", Cause: CauseLeft})
		}
	})
}
