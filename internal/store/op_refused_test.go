package store

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// A broken room does not affect the other ops of a batch.
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
				assert.NotContains(w, w.owned("I"), EntryRef{Conn: "a", Entry: "a1", Room: "bad"})
				assert.Contains(w, w.owned("I"), EntryRef{Conn: "b", Entry: "x1", Room: "bad"})

				require.NoError(w, w.Fence(w.Context(), 0, "I"))
				_, err := w.CleanUp(w.Context(), w.clockProof(), []CleanUpItem{
					{Mode: GroundDead, Room: "bad", Conn: "d", Entry: "x2", Incarnation: "I"},
					{Mode: GroundDead, Room: "good", Conn: "a", Entry: "a1", Incarnation: "I"},
				})
				require.ErrorIs(w, err, ErrUnavailable)
				w.absent("good", "a")
			})
		})
	}
}

// An OpConnect is refused alone if its key has another type.
func TestConnectRefusedAlone(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.ConnMeta("bad"), "mine", 0).Err())
		res := w.commit("I", Op{Kind: OpConnect, Conn: "bad"}, Op{Kind: OpDisconnect, Conn: "bad"}, Op{Kind: OpConnect, Conn: "good"})
		require.ErrorIs(w, res[0].Err, ErrUnavailable)
		require.ErrorIs(w, res[1].Err, ErrUnavailable)
		require.NoError(w, res[2].Err)
		assert.Equal(w, []EntryRef{{Conn: "good"}}, w.owned("I"))
	})
}

// If Redis has no memory left, ops that need more are refused one by one and can be
// repeated later. Refreshes, renewals and leaves succeed.
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

	// An entry is verified without a change.
	full.Kind = OpUpdate
	w.ok("I", full)

	// Refreshes succeed, whatever else the op contains.
	refresh := Op{Kind: OpUpdate, Room: "q", Conn: "t", Entry: "t1", TTL: time.Hour, Left: time.Hour}
	w.ok("I", refresh)
	w.expectTTL(time.Hour, w.keys.Conn("q", "t"))
	refresh.Left, refresh.StateVersion, refresh.State = 2*time.Hour, 1, []byte(`{"x":1}`)
	res := w.commit("I", refresh)
	require.ErrorContains(w, res[0].Err, "OOM")
	w.expectTTL(2*time.Hour, w.keys.Conn("q", "t"))
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
	assert.True(w, renewal.Listed)
	require.NoError(w, w.Fence(w.Context(), 0, "I"))
	statuses, err := w.CleanUp(w.Context(), w.clockProof(), []CleanUpItem{
		{Mode: GroundDead, Room: "r", Conn: "b", Entry: "b1", Incarnation: "I"},
	})
	require.NoError(w, err)
	assert.Equal(w, []CleanUpStatus{Ended}, statuses)

	require.NoError(w, w.rdb.ConfigSet(w.Context(), "maxmemory", "0").Err())
	require.NoError(w, w.rdb.Set(w.Context(), w.keys.Fence(0, "I"), w.numbers["I"], time.Hour).Err())
	w.numbers["I"]++
	res, err = w.again("I", batch...)
	require.NoError(w, err)
	assert.Equal(w, Done, res[0].Status)
	assert.Equal(w, Gone, res[1].Status)
	assert.Equal(w, "LJ", kinds(w.events()))
}
