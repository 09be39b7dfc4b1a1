package store

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// sample returns a batch with every kind of op, and the ops that prepare for it.
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

// Redis clients may send a batch twice. The second run changes and publishes nothing.
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
		w.expectTTL(fenceLife, w.keys.Fence(0, "I"))
		held = w.dump()
		for _, number := range []uint64{1, 9, 10, 1 << 40} {
			_, err := w.Commit(w.Context(), 0, "I", number, 0, batch)
			require.ErrorIs(w, err, ErrFenced)
		}
		assert.Equal(w, held, w.dump())
		assert.Empty(w, w.heard())
		w.ok("J", leave("s", "y", "y1")) // another server goes on
	})
}

// If Redis has lost everything including the fence, only an incarnation that has never
// written may begin. The others may have been dead for long.
func TestForgottenIncarnation(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"))
		_, err := w.Commit(w.Context(), 0, "I", 2, 1, []Op{join("r", "b", "b1")})
		require.NoError(w, err)
		require.NoError(w, w.rdb.FlushAll(w.Context()).Err())
		_, err = w.Commit(w.Context(), 0, "I", 3, 2, []Op{join("r", "c", "c1")})
		require.ErrorIs(w, err, ErrForgotten)
		require.NotErrorIs(w, err, ErrUnavailable)
		assert.Empty(w, w.dump())
		_, err = w.Commit(w.Context(), 0, "I", 4, 0, []Op{join("r", "d", "d1")})
		require.NoError(w, err)
		_, err = w.Commit(w.Context(), 0, "I", 5, 4, []Op{join("r", "e", "e1")})
		require.NoError(w, err)
		assert.Equal(w, 2, len(w.owned("I")))
	})
}

// If Redis has gone back behind a batch that it had acknowledged, the next one is
// refused. The owner then takes a new incarnation.
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
		require.ErrorIs(w, err, ErrForgotten)
		assert.Equal(w, was, w.dump())
		_, err = w.Commit(w.Context(), 0, "I", 5, 0, []Op{join("r", "c", "c1")})
		require.NoError(w, err)
		_, err = w.Commit(w.Context(), 0, "I", 9, 5, []Op{join("r", "d", "d1")})
		require.NoError(w, err, "batches that never arrived were not acknowledged")
	})
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
		assert.Equal(w, "a", w.cleanUp(CleanUpItem{Mode: GroundExpired, Room: "r", Conn: "c", Entry: "e1", Incarnation: "I"}))
	})
}

func TestBatchesOfTwoBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.Store = New(w.client, testKeys{buckets: 2})
		for bucket, room := range []string{"even", "odd"} {
			_, err := w.Commit(w.Context(), bucket, "I", uint64(9-bucket), 0, []Op{join(room, "c", "e1")})
			require.NoError(w, err, "each bucket has its own numbers")
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
