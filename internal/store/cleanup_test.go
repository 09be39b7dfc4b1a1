package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

func item(mode CleanUpGround, room, conn, entry, inc string) CleanUpItem {
	return CleanUpItem{Mode: mode, Room: room, Conn: conn, Entry: entry, Incarnation: inc}
}

func TestCleanUpExpired(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		short := joinTTL("r", "short", "s1", 20*time.Millisecond)
		short.Left = 30 * time.Millisecond
		short.StateVersion, short.State = 1, []byte(`{}`)
		w.ok("I", short, joinTTL("r", "long", "l1", time.Minute), join("r", "never", "n1"))
		w.listen()
		w.waitExpired(w.keys.Conn("r", "short"))
		items := []CleanUpItem{
			item(GroundExpired, "r", "long", "l1", "I"),
			item(GroundExpired, "r", "never", "n1", "I"),
			item(GroundExpired, "r", "short", "s0", "I"), // the hint of an older entry
			item(GroundExpired, "r", "short", "s1", "I"),
			item(GroundExpired, "r", "short", "s1", "I"),
			item(GroundExpired, "r", "nobody", "x1", "I"),
			item(GroundExpired, "nowhere", "nobody", "x1", "I"),
		}
		assert.Equal(w, "aa0+000", w.cleanUp(items...))
		events := w.events()
		require.Equal(w, "L", kinds(events))
		assert.Equal(w, CauseSilent, events[0].Cause)
		assert.Equal(w, "s1", events[0].Entry)
		assert.Zero(w, w.pttl(w.keys.State("r", "short")))
		assert.Len(w, w.owned("I"), 2)
		assert.Equal(w, map[string]string{"I": "2"}, w.owners("r"))

		// The entry was refreshed in time, so the hint is outdated.
		w.ok("I", joinTTL("r", "short", "s2", time.Minute))
		assert.Equal(w, "a0", w.cleanUp(item(GroundExpired, "r", "short", "s2", "I"), item(GroundExpired, "r", "short", "s1", "I")))
		assert.Equal(w, "J", kinds(w.events()))
	})
}

func TestCleanUpState(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		op := joinTTL("r", "c", "e1", time.Minute)
		op.MetaVersion, op.Meta = 1, []byte(`{"m":1}`)
		op.StateVersion, op.State, op.StateLeft, op.StateSilent = 3, []byte(`{}`), 20*time.Millisecond, true
		forever := join("r", "d", "d1")
		forever.StateVersion, forever.State = 1, []byte(`{}`)
		w.ok("I", op, forever, join("r", "e", "e1"))
		w.listen()
		state := func(conn, entry string, version uint64) CleanUpItem {
			it := item(GroundStateExpired, "r", conn, entry, "I")
			it.StateVersion = version
			return it
		}
		w.waitExpired(w.keys.State("r", "c"))
		assert.Equal(w, "a000+0", w.cleanUp(state("d", "d1", 1), state("e", "e1", 0), state("c", "e0", 3), state("c", "e1", 2),
			state("c", "e1", 3), state("c", "e1", 3)))
		events := w.events()
		require.Equal(w, "S", kinds(events))
		e := events[0]
		assert.Nil(w, e.Record.State)
		assert.EqualValues(w, 3, e.StateVersion)
		assert.Zero(w, e.StateUntil)
		assert.False(w, e.StateSilent)
		r := w.record("r", "c")
		assert.Nil(w, r.State)
		assert.Equal(w, op.Meta, r.Meta)
		assert.Equal(w, e.Seq, r.Seq)
		w.expectTTL(time.Minute+time.Second, w.keys.Conn("r", "c"))

		// The owner clears the state later, which publishes nothing.
		w.ok("I", Op{Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", TTL: time.Minute, StateVersion: 4})
		assert.Empty(w, w.heard())
		w.ok("I", Op{
			Kind: OpUpdate, Room: "r", Conn: "c", Entry: "e1", TTL: time.Minute,
			StateVersion: 5, State: []byte(`{}`), StateLeft: time.Minute,
		})
		assert.Equal(w, "a0", w.cleanUp(state("c", "e1", 5), state("c", "e1", 3)))
	})
}

func TestCleanUpDead(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"), joinTTL("r", "b", "b1", time.Minute), join("q", "a", "a2"))
		w.ok("J", join("r", "c", "c1"), join("q", "a", "a3")) // a has moved to J in q
		w.listen()
		dead := []CleanUpItem{
			item(GroundDead, "r", "a", "a1", "I"), item(GroundDead, "r", "b", "b1", "I"), item(GroundDead, "q", "a", "a2", "I"),
		}
		assert.Equal(w, "aa0", w.cleanUp(dead...), "no fence, no ground")
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		assert.Equal(w, "++0", w.cleanUp(dead...))
		assert.Equal(w, "000", w.cleanUp(dead...))
		events := w.events()
		require.Equal(w, "LL", kinds(events))
		for _, e := range events {
			assert.Equal(w, CauseServerLost, e.Cause)
			assert.Equal(w, "I", e.Incarnation)
		}
		assert.Empty(w, w.owned("I"))
		assert.Equal(w, map[string]string{"J": "1"}, w.owners("r"))
		assert.Equal(w, map[string]string{"J": "1"}, w.owners("q"))
		assert.Equal(w, "a", w.cleanUp(item(GroundDead, "r", "c", "c1", "J")))
	})
}

func TestCleanUpEmptiesARoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"), joinTTL("r", "b", "b1", time.Minute))
		w.listen()
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		assert.Equal(w, "++", w.cleanUp(item(GroundDead, "r", "a", "a1", "I"), item(GroundDead, "r", "b", "b1", "I")))
		assert.Equal(w, "0", w.cleanUp(item(GroundDead, "r", "a", "a1", "I")))
		for _, e := range w.events() {
			assert.Equal(w, CauseServerLost, e.Cause)
		}
		assert.Empty(w, w.permanent())
		assert.Empty(w, w.rooms())
		w.expectTTL(visited, w.keys.Seq("r"))
	})
}

// Without a known ground the script ends nothing, even if the owner is dead.
func TestUnknownGroundIsRefused(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"))
		require.NoError(w, w.Fence(w.Context(), 0, "I"))
		w.listen()
		held := w.dump()
		for _, ground := range []CleanUpGround{'f', 'l', '+', '%'} {
			for _, entry := range []string{"a1", "other"} {
				list, err := w.CleanUp(w.Context(), w.clockProof(), []CleanUpItem{item(ground, "r", "a", entry, "I")})
				require.ErrorIs(w, err, ErrData, "%c", ground)
				require.Equal(w, []CleanUpStatus{0}, list)
			}
		}
		assert.Equal(w, held, w.dump())
		assert.Empty(w, w.heard())
	})
}

// A server with a wrong idea of Redis's clock ends no entries and declares no server
// dead.
func TestWrongClockProof(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"))
		_, err := w.Register(w.Context(), "I", -time.Minute)
		require.NoError(w, err)
		w.listen()
		held := w.dump()
		for _, off := range []time.Duration{-time.Minute, time.Minute} {
			j := w.clockProof()
			j.Now += off.Milliseconds()
			_, err := w.CleanUp(w.Context(), j, []CleanUpItem{item(GroundDead, "r", "a", "a1", "I")})
			require.ErrorIs(w, err, ErrClock)
			_, err = w.DeclareDeadIfExpired(w.Context(), j, "I")
			require.ErrorIs(w, err, ErrClock)
		}
		assert.Equal(w, held, w.dump())
		assert.Empty(w, w.heard())
		if w.mem == nil {
			return
		}
		j := w.clockProof()
		w.mem.Advance(10 * time.Minute)
		_, err = w.CleanUp(w.Context(), j, []CleanUpItem{item(GroundDead, "r", "a", "a1", "I")})
		require.ErrorIs(w, err, ErrClock, "Redis's clock has jumped")
	})
}

func TestCleanUpManyAcrossBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.Store = New(w.client, testKeys{buckets: 3})
		var items []CleanUpItem
		for i := range 300 {
			room := []string{"abc", "abcd", "abcde"}[i%3]
			conn := fmt.Sprintf("c%d", i)
			_, err := w.Commit(w.Context(), i%3, "I", 1, 0, []Op{join(room, conn, "e")})
			require.NoError(w, err)
			items = append(items, item(GroundDead, room, conn, "e", "I"))
			if i%10 == 0 {
				items = append(items, item(GroundDead, room, "ghost", "e", "I"))
			}
		}
		for bucket := range 3 {
			require.NoError(w, w.Fence(w.Context(), bucket, "I"))
		}
		list, err := w.CleanUp(w.Context(), w.clockProof(), items)
		require.NoError(w, err)
		for i, status := range list {
			want := Ended
			if items[i].Conn == "ghost" {
				want = NotThere
			}
			require.Equal(w, want, status, "item %d", i)
		}
		assert.Empty(w, w.permanent())
	})
}

// Many servers act on the same expired keys while owners leave and refresh. Each entry
// ends once.
func TestManyServersCleanUpOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	const entries, reapers = 300, 8
	var in []Op
	var items []CleanUpItem
	for i := range entries {
		conn := fmt.Sprintf("c%d", i)
		op := joinTTL("r", conn, "e"+conn, time.Millisecond)
		op.Left = time.Millisecond
		op.StateVersion, op.State, op.StateLeft = 1, []byte(`{}`), time.Millisecond
		in = append(in, op)
		st := item(GroundStateExpired, "r", conn, op.Entry, "I")
		st.StateVersion = 1
		items = append(items, st, item(GroundExpired, "r", conn, op.Entry, "I"))
	}
	w.ok("I", in...)
	w.listen()
	w.waitExpired(w.keys.Conn("r", in[entries-1].Conn))
	j := w.clockProof()
	var ended, states, left atomic.Int64
	var wg sync.WaitGroup
	for n := range reapers {
		wg.Go(func() {
			for part := range slices.Chunk(items, 10+7*n) {
				list, err := w.CleanUp(context.WithoutCancel(w.Context()), j, part)
				assert.NoError(w, err)
				for i, s := range list {
					switch {
					case s != Ended:
					case part[i].Mode == GroundStateExpired:
						states.Add(1)
					default:
						ended.Add(1)
					}
				}
			}
		})
	}
	wg.Go(func() {
		for n, op := range in {
			res, err := w.Commit(context.WithoutCancel(w.Context()), 0, "I", uint64(100+n), 0, []Op{leave("r", op.Conn, op.Entry)})
			if assert.NoError(w, err) && res[0].Status == Done {
				left.Add(1)
			}
		}
	})
	wg.Wait()
	leaves, cleared := make(map[string]int), make(map[string]int)
	for _, e := range w.events() {
		if e.Type == Left {
			leaves[e.Conn]++
			continue
		}
		require.Equal(w, string(State), string(e.Type))
		cleared[e.Conn]++
		require.Zero(w, leaves[e.Conn], "a state ended after its entry")
	}
	assert.Len(w, leaves, entries)
	assert.Equal(w, []int{1}, slices.Compact(slices.Sorted(maps.Values(leaves))))
	assert.LessOrEqual(w, slices.Max(append(slices.Collect(maps.Values(cleared)), 0)), 1)
	assert.EqualValues(w, entries, ended.Load()+left.Load())
	assert.EqualValues(w, len(cleared), states.Load())
	assert.Empty(w, w.permanent())
	assert.EqualValues(w, entries+entries+len(cleared), w.position("r").Seq)
}

func TestOwnedPages(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		var ops []Op
		want := make(map[EntryRef]bool)
		for i := range 500 {
			conn := fmt.Sprintf("c%d", i)
			ops = append(ops, join("a room : {of} many\n words", conn, "e1"), Op{Kind: OpConnect, Conn: conn})
			want[EntryRef{Conn: conn, Entry: "e1", Room: "a room : {of} many\n words"}] = true
			want[EntryRef{Conn: conn}] = true
		}
		w.ok("I", ops...)
		got := make(map[EntryRef]bool)
		for _, ref := range w.owned("I") {
			got[ref] = true
		}
		assert.Equal(w, want, got)
		size, err := w.OwnedSize(w.Context(), 0, "I")
		require.NoError(w, err)
		assert.EqualValues(w, 1000, size)
		size, err = w.OwnedSize(w.Context(), 0, "nobody")
		require.NoError(w, err)
		assert.Zero(w, size)

		var conns []string
		for i := range 500 {
			conns = append(conns, fmt.Sprintf("c%d", i))
		}
		w.ok("J", Op{Kind: OpConnect, Conn: "c7"}) // takes the connection over
		require.NoError(w, w.ForgetConnections(w.Context(), 0, "I", conns))
		size, err = w.OwnedSize(w.Context(), 0, "I")
		require.NoError(w, err)
		assert.EqualValues(w, 500, size)
		m, err := w.ConnMetas(w.Context(), []string{"c6", "c7"})
		require.NoError(w, err)
		assert.Equal(w, []MetaValue{{}, {Owner: "J"}}, m)
	})
}
