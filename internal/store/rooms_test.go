package store

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestSnapshotOfSmallRoom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		snap, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.True(w, snap.Position.None())
		assert.Empty(w, snap.Records)
		assert.Empty(w, w.dump(), "a read creates nothing")

		op := joinTTL("r", "a", "a1", time.Minute)
		op.MetaVersion, op.Meta, op.StateVersion, op.State = 1, []byte("1"), 1, []byte(`{}`)
		w.ok("I", op, join("r", "b", "b1"))
		snap, err = w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.False(w, snap.Paged)
		assert.Equal(w, w.position("r"), snap.Position)
		assert.ElementsMatch(w, []Record{w.record("r", "a"), w.record("r", "b")}, snap.Records)

		w.ok("I", leave("r", "a", "a1"), leave("r", "b", "b1"))
		snap, err = w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		assert.EqualValues(w, 4, snap.Position.Seq, "an empty room has a position")
		assert.Empty(w, snap.Records)
	})
}

// paging runs f once, after the first page of a hash was read.
type paging struct{ f func() }

func (p *paging) DialHook(next redis.DialHook) redis.DialHook { return next }
func (p *paging) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (p *paging) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if f := p.f; f != nil && cmd.Name() == "hscan" {
			p.f = nil
			f()
		}
		return err
	}
}

// A large room is read in pages. Members that stay all the time are in the snapshot,
// and changes during the read can be merged by their seq.
func TestSnapshotInPagesWhileTheRoomChanges(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const members = 1200
		var ops []Op
		for i := range members {
			ops = append(ops, join("r", fmt.Sprintf("c%d", i), "e1"))
		}
		w.ok("I", ops...)
		before := w.position("r")
		w.listen()
		hook := &paging{f: func() {
			for i := range 100 { // leave, come, change
				state := Op{
					Kind: OpUpdate, Room: "r", Conn: fmt.Sprintf("c%d", 200+i), Entry: "e1", StateVersion: 1, State: []byte(`{}`),
				}
				w.ok("I", leave("r", fmt.Sprintf("c%d", i), "e1"), join("r", fmt.Sprintf("n%d", i), "e1"), state)
			}
		}}
		w.client.(*redis.Client).AddHook(hook)
		snap, err := w.Snapshot(w.Context(), "r")
		require.NoError(w, err)
		require.True(w, snap.Paged)
		require.Nil(w, hook.f)
		assert.Equal(w, before, snap.Position)

		got := make(map[string]Record)
		for _, r := range snap.Records {
			_, twice := got[r.Conn]
			require.False(w, twice, r.Conn)
			got[r.Conn] = r
		}
		for i := 100; i < members; i++ {
			require.Contains(w, got, fmt.Sprintf("c%d", i))
		}
		gone := make(map[string]uint64)
		for _, e := range w.events() {
			if e.Seq <= got[e.Conn].Seq || e.Seq <= gone[e.Conn] {
				continue
			}
			if e.Type == Left {
				delete(got, e.Conn)
				gone[e.Conn] = e.Seq
				continue
			}
			got[e.Conn] = e.Record
		}
		require.Len(w, got, members)
		for conn, r := range got {
			require.Equal(w, w.record("r", conn), r)
			if testing.Short() {
				break
			}
		}
	})
}

func TestPositionsOfManyRooms(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		var rooms []string
		var ops []Op
		for i := range 650 {
			rooms = append(rooms, fmt.Sprintf("r%d", i))
			if i%3 > 0 {
				ops = append(ops, join(rooms[i], "a", "a1"))
			}
			if i%3 > 1 {
				ops = append(ops, join(rooms[i], "b", "b1"))
			}
		}
		w.ok("I", ops...)
		calls := w.Stats().Calls
		positions, err := w.Positions(w.Context(), rooms)
		require.NoError(w, err)
		after := w.Stats().Calls
		assert.LessOrEqual(w, after-calls, uint64(3))
		require.Len(w, positions, len(rooms))
		for i, p := range positions {
			assert.EqualValues(w, i%3, p.Seq)
			assert.Equal(w, i%3 == 0, p.None())
			assert.Equal(w, i%3 == 0, p.Tag == "")
		}
		none, err := w.Positions(w.Context(), nil)
		require.NoError(w, err)
		assert.Empty(w, none)
	})
}

func TestRoomsOwnersAndCounts(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "1"), join("r", "b", "1"), join("q", "a", "1"))
		w.ok("J", join("r", "c", "1"))
		assert.Equal(w, []string{"q", "r"}, w.rooms())
		assert.Equal(w, map[string]string{"I": "2", "J": "1"}, w.owners("r"))
		n, err := w.Count(w.Context(), "r")
		require.NoError(w, err)
		assert.Equal(w, 3, n)
		w.ok("I", leave("r", "a", "1"), leave("r", "b", "1"), leave("q", "a", "1"))
		assert.Equal(w, []string{"r"}, w.rooms())
		assert.Equal(w, map[string]string{"J": "1"}, w.owners("r"))
		assert.Empty(w, w.owners("nowhere"))

		calls := 0
		w.ok("I", join("q", "a", "2"))
		require.NoError(w, w.Rooms(w.Context(), func(string) bool { calls++; return false }))
		assert.Equal(w, 1, calls)
	})
}

func TestSomeMembers(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		var ops []Op
		for i := range 700 {
			ops = append(ops, join("r", fmt.Sprintf("c%d", i), "e"))
		}
		w.ok("I", ops...)
		for _, limit := range []int{-1, 0, 1, 20, 500, 501, 699, 700, 9000} {
			records, total, err := w.Some(w.Context(), "r", limit)
			require.NoError(w, err)
			assert.Equal(w, 700, total)
			seen := make(map[string]bool)
			for _, r := range records {
				seen[r.Conn] = true
			}
			want := 700
			if limit >= 0 {
				want = min(limit, 700)
			}
			assert.Len(w, seen, want, "limit %d", limit)
			assert.Len(w, records, want, "limit %d", limit)
		}
		before := w.Store.Stats()
		_, _, err := w.Some(w.Context(), "r", 20)
		require.NoError(w, err)
		assert.EqualValues(w, 1, w.Store.Stats().Calls-before.Calls, "one round trip")
		records, total, err := w.Some(w.Context(), "nowhere", 10)
		require.NoError(w, err)
		assert.Empty(w, records)
		assert.Zero(w, total)
	})
}

// An error differs from a missing record, in any place of the round trip.
func TestRecordsErrorsAndMissing(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "a1"))
		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Members("bad"), "mine", 0).Err())
		refs := []EntryRef{{Room: "nowhere", Conn: "a"}, {Room: "r", Conn: "a"}, {Room: "r", Conn: "b"}}
		records, err := w.Records(w.Context(), refs)
		require.NoError(w, err)
		assert.Equal(w, []Record{{}, w.record("r", "a"), {}}, records)
		for at := range 3 {
			broken := append([]EntryRef{}, refs...)
			broken[at].Room = "bad"
			_, err = w.Records(w.Context(), broken)
			require.ErrorIs(w, err, ErrUnavailable, "at %d", at)
		}
		r, ok, err := w.FindIn(w.Context(), []string{"nowhere", "r"}, "a")
		require.NoError(w, err)
		assert.True(w, ok)
		assert.Equal(w, "a1", r.Entry)
		_, ok, err = w.FindIn(w.Context(), []string{"nowhere", "bad"}, "a")
		require.Error(w, err)
		assert.False(w, ok)
		_, ok, err = w.FindIn(w.Context(), nil, "a")
		require.NoError(w, err)
		assert.False(w, ok)
		none, err := w.ConnMetas(w.Context(), nil)
		require.NoError(w, err)
		assert.Empty(w, none)

		require.NoError(w, w.rdb.HSet(w.Context(), w.keys.Members("odd"), "a", "not a record").Err())
		for _, read := range []func() error{
			func() error { _, _, err := w.Store.Record(w.Context(), "odd", "a"); return err },
			func() error { _, err := w.Snapshot(w.Context(), "odd"); return err },
			func() error { _, _, err := w.Some(w.Context(), "odd", 5); return err },
		} {
			require.ErrorIs(w, read(), errFormat)
			require.NotErrorIs(w, read(), ErrUnavailable)
		}
		res := w.commit("I", join("odd", "a", "e1"))
		require.Error(w, res[0].Err)
		assert.False(w, errors.Is(res[0].Err, context.Canceled))
	})
}
