package store

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

func TestJoinTellsAndWritesEverything(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.listen()
		op := Op{
			Kind: OpJoin, Room: "lobby", Conn: "c1", Entry: "e1", TTL: 20 * time.Second, Left: 21 * time.Second,
			MetaVersion: 3, Meta: []byte(`{"a":1}`),
			StateVersion: 2, State: []byte(`{"s":true}`), StateSilent: true, StateLeft: 9 * time.Second,
		}
		before := w.judgment().Now
		res := w.ok("I", op)[0]
		after := w.judgment().Now

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
		assert.Equal(w, OpResult{Status: Done, Position: e.Position(), Total: 1}, res)
		assert.Equal(w, e.Position(), w.position("lobby"))

		w.lives(21*time.Second, w.keys.Conn("lobby", "c1"))
		w.lives(9*time.Second, w.keys.State("lobby", "c1"))
		assert.Equal(w, "e1", w.rdb.Get(w.Context(), w.keys.Conn("lobby", "c1")).Val())
		assert.JSONEq(w, `{"s":true}`, w.rdb.Get(w.Context(), w.keys.State("lobby", "c1")).Val())
		assert.Equal(w, []OwnedRef{{Conn: "c1", Entry: "e1", Room: "lobby"}}, w.owned("I"))
		assert.Equal(w, []string{"lobby"}, w.rooms())
		assert.Equal(w, map[string]string{"I": "1"}, w.homes("lobby"))
		w.lives(24*time.Hour, w.keys.Fence(0, "I"))
	})
}

// Events of a room are numbered without a gap and each names the one before.
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
		require.Equal(w, "+", w.reap(ReapItem{Mode: ReapCleared, Room: "r", Conn: "a", Entry: "a2", Incarnation: "J"}))
		prev, seq, epoch, said := "-", uint64(0), "", ""
		for _, e := range w.events() {
			if e.Room != "r" {
				continue
			}
			said += string(e.Type)
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
		assert.Equal(w, "JJMSLRL", said)
		assert.Equal(w, Position{Epoch: epoch, Seq: seq, Tag: prev}, w.position("r"))
	})
}

func TestLeaveTellsAndTakesEverythingAway(t *testing.T) {
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
		assert.Empty(w, w.eternal())
		assert.Empty(w, w.owned("I"))
		assert.Empty(w, w.rooms())
		assert.Empty(w, w.homes("r"))
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")))
		assert.Zero(w, w.pttl(w.keys.State("r", "c")))
		w.lives(visited, w.keys.Seq("r"))

		// Who comes back finds the old epoch, which stays again.
		w.ok("I", join("r", "c", "e2"))
		assert.Equal(w, time.Duration(-1), w.pttl(w.keys.Seq("r")))
		assert.Equal(w, e.Epoch, w.position("r").Epoch)
		assert.EqualValues(w, 3, w.position("r").Seq)
	})
}

// sample is a batch of every kind of op, on what prepare has made.
func sample() (prepare, batch []Op) {
	there := joinTTL("r", "there", "t1", time.Minute)
	there.StateVersion, there.State = 1, []byte(`{"v":1}`)
	prepare = []Op{there, join("r", "goes", "g1"), join("q", "last", "l1"), {Kind: OpConnect, Conn: "bye", MetaVersion: 1, Meta: []byte(`1`)}}
	comes := joinTTL("r", "comes", "c1", time.Minute)
	comes.MetaVersion, comes.Meta = 1, []byte(`{}`)
	comes.StateVersion, comes.State, comes.StateLeft = 1, []byte(`{}`), time.Minute
	batch = []Op{
		comes,
		{
			Kind: OpUpdate, Room: "r", Conn: "there", Entry: "t1", TTL: time.Minute, Left: 61 * time.Second,
			MetaVersion: 2, Meta: []byte(`2`), StateVersion: 2,
		},
		leave("r", "goes", "g1"), leave("q", "last", "l1"),
		{Kind: OpConnect, Conn: "hello", MetaVersion: 1, Meta: []byte(`{"n":1}`)},
		{Kind: OpDisconnect, Conn: "bye"},
		{Kind: OpUpdate, Room: "r", Conn: "nobody", Entry: "n1", StateVersion: 1, State: []byte(`{}`)},
		{Kind: OpLeave, Room: "r", Conn: "comes", Entry: "older", Cause: CauseLeft},
	}
	return prepare, batch
}

// A batch may run twice, as clients retry: the second run changes and
// publishes nothing.
func TestBatchTwiceIsBatchOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		prepare, batch := sample()
		for i := range batch {
			batch[i].Known = batch[i].Kind == OpLeave
		}
		w.ok("I", prepare...)
		w.listen()
		first := w.commit("I", batch...)
		require.Equal(w, "JMSLL", kinds(w.events()))
		held := w.dump()
		for range 3 {
			second, err := w.again("I", batch...)
			require.NoError(w, err)
			assert.Empty(w, w.heard())
			assert.Equal(w, held, w.dump())
			for i, r := range second {
				require.NoError(w, r.Err)
				if batch[i].Kind == OpLeave && first[i].Status == Done {
					assert.Equal(w, Gone, r.Status)
					continue
				}
				assert.Equal(w, first[i].Status, r.Status, "op %d", i)
			}
		}
	})
}

func TestLateAndFencedBatchesChangeNothing(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		prepare, batch := sample()
		w.ok("I", prepare...) // number 1
		w.ok("I", join("s", "x", "x1"))
		_, err := w.Commit(w.Context(), 0, "I", 9, 0, nil)
		require.NoError(w, err)
		w.ok("J", join("s", "y", "y1"))
		w.listen()
		held := w.dump()

		for _, number := range []uint64{1, 2, 8} {
			res, err := w.Commit(w.Context(), 0, "I", number, 0, batch)
			require.ErrorIs(w, err, ErrLate)
			assert.Nil(w, res)
		}
		assert.Equal(w, held, w.dump())

		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		w.lives(fenceLife, w.keys.Fence(0, "I"))
		held = w.dump()
		for _, number := range []uint64{1, 9, 10, 1 << 40} {
			_, err := w.Commit(w.Context(), 0, "I", number, 0, batch)
			require.ErrorIs(w, err, ErrFenced)
		}
		assert.Equal(w, held, w.dump())
		assert.Empty(w, w.heard())
		w.ok("J", leave("s", "y", "y1")) // others go on
	})
}

// Where Redis has lost everything, the fence too, only who has never written
// may begin: the others may have been dead for long.
func TestForgottenIncarnation(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"))
		_, err := w.Commit(w.Context(), 0, "I", 2, 1, []Op{join("r", "b", "b1")})
		require.NoError(w, err)
		require.NoError(w, w.rdb.FlushAll(w.Context()).Err())
		_, err = w.Commit(w.Context(), 0, "I", 3, 2, []Op{join("r", "c", "c1")})
		require.ErrorIs(w, err, ErrLost)
		require.NotErrorIs(w, err, ErrUnavailable)
		assert.Empty(w, w.dump())
		_, err = w.Commit(w.Context(), 0, "I", 4, 0, []Op{join("r", "d", "d1")})
		require.NoError(w, err)
		_, err = w.Commit(w.Context(), 0, "I", 5, 4, []Op{join("r", "e", "e1")})
		require.NoError(w, err)
		assert.Equal(w, 2, len(w.owned("I")))
	})
}

// Where Redis has gone back behind a batch that it had acknowledged, the next
// one is refused; the owner then begins anew.
func TestAcknowledgedBatchLost(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		_, err := w.Commit(w.Context(), 0, "I", 1, 0, []Op{join("r", "a", "a1")})
		require.NoError(w, err)
		_, err = w.Commit(w.Context(), 0, "I", 2, 1, []Op{join("r", "b", "b1")})
		require.NoError(w, err)
		_, err = w.Commit(w.Context(), 0, "I", 2, 1, []Op{join("r", "b", "b1")})
		require.NoError(w, err, "the same again")
		was := w.dump()
		_, err = w.Commit(w.Context(), 0, "I", 4, 3, []Op{join("r", "c", "c1")})
		require.ErrorIs(w, err, ErrLost)
		assert.Equal(w, was, w.dump())
		_, err = w.Commit(w.Context(), 0, "I", 5, 0, []Op{join("r", "c", "c1")})
		require.NoError(w, err)
		_, err = w.Commit(w.Context(), 0, "I", 9, 5, []Op{join("r", "d", "d1")})
		require.NoError(w, err, "numbers between that never arrived are none that were acknowledged")
	})
}

// Metadata that a connection of the same id left behind on another server are
// not those of a new one; those of one that registers again are.
func TestFreshConnection(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("dead", Op{Kind: OpConnect, Conn: "c", MetaVersion: 7, Meta: []byte(`{"admin":true}`), Fresh: true})
		fresh := Op{Kind: OpConnect, Conn: "c", Fresh: true}
		for range 2 {
			res, err := w.Commit(w.Context(), 0, "I", 1, 0, []Op{fresh})
			require.NoError(w, err)
			assert.EqualValues(w, 8, res[0].MetaVersion)
			assert.Nil(w, res[0].Meta)
		}
		m, err := w.ConnMeta(w.Context(), "c")
		require.NoError(w, err)
		assert.Equal(w, MetaValue{Version: 8, Owner: "I"}, m)
		res, err := w.Commit(w.Context(), 0, "J", 1, 0, []Op{{Kind: OpConnect, Conn: "c", MetaVersion: 8}})
		require.NoError(w, err)
		assert.Zero(w, res[0].MetaVersion)
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
		assert.Equal(w, map[string]string{"I": "1", "J": "1"}, w.homes("r"))
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")), "the new one has no TTL")
		assert.Zero(w, w.pttl(w.keys.State("r", "c")), "the state ended with the old one")

		// Nothing of the old one touches the new one.
		held := w.dump()[w.keys.Members("r")]
		out := w.commit("I", leave("r", "c", "old"), Op{
			Kind: OpUpdate, Room: "r", Conn: "c", Entry: "old", TTL: time.Minute, Left: time.Minute,
			StateVersion: 9, State: []byte(`{}`),
		})
		assert.Equal(w, Other, out[0].Status)
		assert.Equal(w, Other, out[1].Status)
		assert.Equal(w, held, w.dump()[w.keys.Members("r")])
		assert.Zero(w, w.pttl(w.keys.Conn("r", "c")))
		assert.Equal(w, []OwnedRef{{Conn: "d", Entry: "d1", Room: "r"}}, w.owned("I"), "its place in the index has gone")
		assert.Empty(w, w.heard())

		// The same owner may do so too; its index then names the new one only.
		w.ok("J", join("r", "c", "newer"))
		own := Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "new", StateVersion: 9, State: []byte(`{}`)}
		assert.Equal(w, Gone, w.commit("J", own)[0].Status, "nobody else has it")
		assert.Equal(w, "R", kinds(w.events()))
		assert.Equal(w, map[string]string{"I": "1", "J": "1"}, w.homes("r"))
		assert.Equal(w, []OwnedRef{{Conn: "c", Entry: "newer", Room: "r"}}, w.owned("J"))
		w.ok("J", leave("r", "c", "newer"))
		w.ok("I", leave("r", "d", "d1"))
		assert.Empty(w, w.homes("r"))
		assert.Empty(w, w.eternal())
	})
}

// A join whose outcome was not known is made anew, and by then the state, the
// metadata or the rule may be others.
func TestJoinAnewBringsWhatIsNewer(t *testing.T) {
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

		// One that was under way all the while is older and changes nothing.
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

		assert.Empty(w, state(1, "", false, 0), "there was none to clear")
		assert.Equal(w, "S", state(2, `{"n":2}`, false, time.Minute))
		w.lives(time.Minute, key)
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
		w.lives(61*time.Second, key)
		assert.Equal(w, time.Minute, w.record("r", "c").TTL)
		require.NoError(w, w.rdb.Del(w.Context(), key).Err()) // run out and gone, but not ended
		w.ok("I", refresh)
		w.lives(61*time.Second, key)

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

func TestNothingStaysBehind(t *testing.T) {
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
		assert.Empty(w, w.eternal())
		assert.Empty(w, w.rooms())
	})
}

func TestConnectAndDisconnect(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		res := w.ok("I", Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: []byte(`{"n":1}`)})
		assert.Zero(w, res[0].MetaVersion)
		meta := func() MetaValue {
			m, err := w.ConnMeta(w.Context(), "c")
			require.NoError(w, err)
			return m
		}
		assert.Equal(w, MetaValue{Version: 1, Data: []byte(`{"n":1}`), Owner: "I"}, meta())
		assert.Equal(w, []OwnedRef{{Conn: "c"}}, w.owned("I"))

		_, ok, err := w.SetConnMeta(w.Context(), "c", 1, 0, []byte(`{"n":2} x`))
		require.NoError(w, err)
		require.True(w, ok)
		res = w.ok("J", Op{Kind: OpConnect, Conn: "c", MetaVersion: 1, Meta: []byte(`{"n":1}`)})
		assert.EqualValues(w, 2, res[0].MetaVersion, "Redis knows better")
		assert.Equal(w, `{"n":2} x`, string(res[0].Meta))
		assert.Equal(w, "J", meta().Owner)

		w.ok("I", Op{Kind: OpDisconnect, Conn: "c"})
		assert.Empty(w, w.owned("I"))
		assert.Equal(w, "J", meta().Owner, "it is not the first one's any more")
		w.ok("J", Op{Kind: OpDisconnect, Conn: "c"})
		assert.Equal(w, MetaValue{}, meta())
		assert.Empty(w, w.eternal())

		w.ok("I", Op{Kind: OpConnect, Conn: "none"}) // without metadata
		m, err := w.ConnMeta(w.Context(), "none")
		require.NoError(w, err)
		assert.Equal(w, MetaValue{Owner: "I"}, m)
	})
}

// What one room's keys are like is nothing to the others of a batch.
func TestOpRefusedAlone(t *testing.T) {
	t.Parallel()
	for _, broken := range []struct {
		name string
		key  func(Keys) string
		mine string
	}{
		{"members", func(k Keys) string { return k.Members("bad") }, "mine"},
		{"seq", func(k Keys) string { return k.Seq("bad") }, "mine"},
		{"seq that counts nothing", func(k Keys) string { return k.Seq("bad") }, "mine 7x too"},
		{"seq without an epoch", func(k Keys) string { return k.Seq("bad") }, "7 8"},
	} {
		t.Run(broken.name, func(t *testing.T) {
			t.Parallel()
			everywhere(t, func(w *world) {
				w.ok("I", join("good", "b", "b1"), join("bad", "b", "x1"), join("bad", "d", "x2"))
				key := broken.key(w.keys)
				require.NoError(w, w.rdb.Del(w.Context(), key).Err())
				require.NoError(w, w.rdb.Set(w.Context(), key, broken.mine, 0).Err())
				w.listen()
				held := w.dump()
				state := func(room, entry string) Op {
					return Op{Kind: OpUpdate, Room: room, Conn: "b", Entry: entry, StateVersion: 1, State: []byte(`{}`)}
				}
				res := w.commit("I",
					join("good", "a", "a1"), joinTTL("bad", "a", "a1", time.Minute),
					state("bad", "x1"), state("good", "b1"),
					leave("bad", "b", "x1"), leave("good", "b", "b1"))
				for i, r := range res {
					if i == 1 || i == 2 || i == 4 {
						require.ErrorIs(w, r.Err, ErrUnavailable, "op %d", i)
						continue
					}
					require.NoError(w, r.Err, "op %d", i)
					assert.Equal(w, Done, r.Status, "op %d", i)
				}
				for _, e := range w.events() {
					assert.Equal(w, "good", e.Room)
				}
				for k, v := range w.dump() {
					if strings.Contains(k, "bad") {
						assert.Equal(w, held[k], v, "%s has been touched", k)
					}
				}
				assert.NotContains(w, w.owned("I"), OwnedRef{Conn: "a", Entry: "a1", Room: "bad"})
				assert.Contains(w, w.owned("I"), OwnedRef{Conn: "b", Entry: "x1", Room: "bad"})

				_, err := w.Reap(w.Context(), w.judgment(), []ReapItem{
					{Mode: ReapCleared, Room: "bad", Conn: "d", Entry: "x2", Incarnation: "I"},
					{Mode: ReapCleared, Room: "good", Conn: "a", Entry: "a1", Incarnation: "I"},
				})
				require.ErrorIs(w, err, ErrUnavailable)
				w.absent("good", "a")
			})
		})
	}
}

// An OpConnect whose key is somebody else's is refused alone, too.
func TestConnectRefusedAlone(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.ConnMeta("bad"), "mine", 0).Err())
		res := w.commit("I", Op{Kind: OpConnect, Conn: "bad"}, Op{Kind: OpDisconnect, Conn: "bad"}, Op{Kind: OpConnect, Conn: "good"})
		require.ErrorIs(w, res[0].Err, ErrUnavailable)
		require.ErrorIs(w, res[1].Err, ErrUnavailable)
		require.NoError(w, res[2].Err)
		assert.Equal(w, []OwnedRef{{Conn: "good"}}, w.owned("I"))
	})
}

// Where Redis has no memory left, what would take more is refused op by op and
// can be done later; whoever lives goes on living, and leaves get through.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	_, err := w.Register(w.Context(), "I", time.Minute)
	require.NoError(w, err)
	full := timedJoin()
	full.Room, full.MetaVersion, full.Meta = "full", 1, []byte(`{"m":1}`)
	w.ok("I", join("r", "a", "a1"), join("r", "b", "b1"), joinTTL("q", "t", "t1", time.Minute), full)
	w.listen()
	require.NoError(w, w.rdb.ConfigSet(w.Context(), "maxmemory", "1").Err())

	// An entry is verified that has nothing new.
	full.Kind = OpUpdate
	w.ok("I", full)

	// Who is alive goes on being so, whatever else is asked for.
	refresh := Op{Kind: OpUpdate, Room: "q", Conn: "t", Entry: "t1", TTL: time.Hour, Left: time.Hour}
	w.ok("I", refresh)
	w.lives(time.Hour, w.keys.Conn("q", "t"))
	refresh.Left, refresh.StateVersion, refresh.State = 2*time.Hour, 1, []byte(`{"x":1}`)
	res := w.commit("I", refresh)
	require.ErrorContains(w, res[0].Err, "OOM")
	w.lives(2*time.Hour, w.keys.Conn("q", "t"))
	assert.Nil(w, w.record("q", "t").State)
	assert.Empty(w, w.heard())

	w.numbers["I"]++
	update := Op{Kind: OpUpdate, Room: "r", Conn: "b", Entry: "b1", StateVersion: 1, State: []byte(`{"x":1}`)}
	batch := []Op{join("r", "c", "c1"), update, leave("r", "a", "a1"), {Kind: OpConnect, Conn: "c"}}
	res, err = w.again("I", batch...)
	require.NoError(w, err)
	for _, i := range []int{0, 1, 3} {
		require.ErrorIs(w, res[i].Err, ErrUnavailable)
		require.ErrorIs(w, res[i].Err, ErrFull)
		require.ErrorContains(w, res[i].Err, "OOM")
	}
	require.NoError(w, res[2].Err)
	assert.Equal(w, Done, res[2].Status)
	assert.Equal(w, "L", kinds(w.events()))

	_, err = w.Register(w.Context(), "J", time.Minute)
	require.ErrorIs(w, err, ErrUnavailable)
	require.ErrorIs(w, err, ErrFull, "a whole call")

	renewal, err := w.Renew(w.Context(), "I", time.Minute, "beat", false)
	require.NoError(w, err)
	assert.True(w, renewal.Present)
	require.NoError(w, w.Fence(w.Context(), 0, "dead"))
	statuses, err := w.Reap(w.Context(), w.judgment(), []ReapItem{
		{Mode: ReapCleared, Room: "r", Conn: "b", Entry: "b1", Incarnation: "I"},
	})
	require.NoError(w, err)
	assert.Equal(w, []ReapStatus{Ended}, statuses)

	require.NoError(w, w.rdb.ConfigSet(w.Context(), "maxmemory", "0").Err())
	w.numbers["I"]++
	res, err = w.again("I", batch...)
	require.NoError(w, err)
	assert.Equal(w, Done, res[0].Status)
	assert.Equal(w, Gone, res[1].Status)
	assert.Equal(w, "LJ", kinds(w.events()))
}

func TestScriptsFlushed(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		flush := func() { require.NoError(w, w.rdb.ScriptFlush(w.Context()).Err()) }
		w.ok("I", joinTTL("r", "c", "e1", time.Minute))
		flush()
		w.ok("I", join("r", "d", "d1"))
		flush()
		snap, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.Len(w, snap.Records, 2)
		flush()
		assert.EqualValues(w, 2, w.position("r").Seq)
		flush()
		assert.Equal(w, "a", w.reap(ReapItem{Mode: ReapExpired, Room: "r", Conn: "c", Entry: "e1", Incarnation: "I"}))
	})
}

func TestBatchesOfTwoBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.Store = New(w.client, testKeys{buckets: 2})
		for bucket, room := range []string{"even", "odd"} {
			_, err := w.Commit(w.Context(), bucket, "I", uint64(9-bucket), 0, []Op{join(room, "c", "e1")})
			require.NoError(w, err, "numbers are each bucket's own")
		}
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		_, err := w.Commit(w.Context(), 0, "I", 20, 0, []Op{leave("even", "c", "e1")})
		require.ErrorIs(w, err, ErrFenced)
		_, err = w.Commit(w.Context(), 1, "I", 20, 0, []Op{leave("odd", "c", "e1")})
		require.NoError(w, err)
		assert.Equal(w, []string{"even"}, w.rooms())
		size, err := w.OwnedSize(w.Context(), 0, "I")
		require.NoError(w, err)
		assert.EqualValues(w, 1, size)
		positions, err := w.Positions(w.Context(), []string{"odd", "nowhere", "even", "odd"})
		require.NoError(w, err)
		assert.EqualValues(w, []uint64{2, 0, 1, 2}, []uint64{positions[0].Seq, positions[1].Seq, positions[2].Seq, positions[3].Seq})
		assert.True(w, positions[1].None())
	})
}

func TestCommitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		ctx, cancel := context.WithCancel(w.Context())
		cancel()
		_, err := w.Commit(ctx, 0, "I", 1, 0, []Op{join("r", "c", "e1")})
		require.ErrorIs(w, err, ErrUnavailable)
		require.ErrorIs(w, err, context.Canceled)
	})
}

// A join of an entry whose record was lost takes the copy of its state away.
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
