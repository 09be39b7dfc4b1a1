package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// tripCount counts the round trips of the calls under test. It leaves out the handshake
// of new connections and the probes of idle ones.
type tripCount struct{ atomic.Int64 }

func (c *tripCount) DialHook(next redis.DialHook) redis.DialHook { return next }

func (c *tripCount) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error { c.count(cmd); return next(ctx, cmd) }
}

func (c *tripCount) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error { c.count(cmds[0]); return next(ctx, cmds) }
}

func (c *tripCount) count(cmd redis.Cmder) {
	switch cmd.Name() {
	case "sscan", "hscan", "scard", "hlen":
		c.Add(1)
	}
}

// trips counts the round trips from now on.
func (w *world) trips() *tripCount {
	c := new(tripCount)
	w.client.(*redis.Client).AddHook(c)
	return c
}

func TestServerLeases(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		assert.Empty(w, w.leases())
		assert.Empty(w, w.dump(), "a read creates nothing")
		for i, inc := range []string{"I", "J", "K", "L"} {
			_, err := w.Register(w.Context(), inc, time.Duration(i+1)*time.Minute)
			require.NoError(w, err)
		}
		require.NoError(w, w.DeclareDead(w.Context(), "I"))
		now := w.clockProof().Now
		list := w.leases()
		require.Len(w, list, 4)
		for i, want := range []ServerLease{{"J", false, now + 120_000}, {"K", false, now + 180_000}, {"L", false, now + 240_000}, {"I", true, now}} {
			assert.Equal(w, want.Incarnation, list[i].Incarnation)
			assert.Equal(w, want.Dead, list[i].Dead)
			assert.InDelta(w, want.At, list[i].At, 5000)
		}
		few, _, err := w.ServerLeases(w.Context(), 1)
		require.NoError(w, err)
		require.Len(w, few, 2, "one of each, the earliest")
		assert.Equal(w, "J", few[0].Incarnation)
	})
}

func TestSizesOfManyKeys(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		w.ok("I", join("r", "a", "1"), join("r", "b", "1"), join("q", "a", "1"), Op{Kind: OpConnect, Conn: "a"})
		w.ok("J", join("r", "c", "1"))
		counts, err := w.Counts(w.Context(), []string{"q", "nowhere", "r"})
		require.NoError(w, err)
		assert.Equal(w, []int64{1, 0, 3}, counts)
		owned, err := w.OwnedSizes(w.Context(), []string{"J", "X", "I"})
		require.NoError(w, err)
		assert.Equal(w, []int64{1, 0, 4}, owned)

		rooms := make([]string, 3*sizesPerCall/2)
		for i := range rooms {
			rooms[i] = fmt.Sprint(i)
		}
		rooms[sizesPerCall] = "r"
		trips := w.trips()
		counts, err = w.Counts(w.Context(), rooms)
		require.NoError(w, err)
		require.Len(w, counts, len(rooms))
		assert.EqualValues(w, 3, counts[sizesPerCall])
		assert.EqualValues(w, 2, trips.Load())

		require.NoError(w, w.rdb.Set(w.Context(), w.keys.Members("bad"), "mine", 0).Err())
		_, err = w.Counts(w.Context(), []string{"r", "bad"})
		require.ErrorIs(w, err, ErrUnavailable)
		none, err := w.Counts(w.Context(), nil)
		require.NoError(w, err)
		assert.Empty(w, none)
	})
}

// The owned entries are spread over all buckets.
func TestOwnedSizesOverBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		s := New(w.client, testKeys{buckets: 3})
		for b := range 3 {
			for i := range b + 1 {
				require.NoError(w, w.rdb.SAdd(w.Context(), w.keys.Owned(b, "I"), i).Err())
			}
		}
		owned, err := s.OwnedSizes(w.Context(), []string{"J", "I"})
		require.NoError(w, err)
		assert.Equal(w, []int64{0, 6}, owned)
	})
}

// A page stops at its limit in any bucket, and the next page continues there.
func TestRoomsFromOverBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const buckets = 5
		s := New(w.client, testKeys{buckets: buckets})
		want := 0
		for _, b := range []int{0, 2, 4} {
			for i := range 30 * (b + 1) {
				require.NoError(w, w.rdb.SAdd(w.Context(), w.keys.Rooms(b), fmt.Sprintf("%d-%d", b, i)).Err())
				want++
			}
		}
		var got []string
		for page := (RoomPage{More: true}); page.More; {
			next, err := s.RoomsFrom(w.Context(), "", page.Next, 20)
			require.NoError(w, err)
			assert.EqualValues(w, want, next.Total)
			assert.LessOrEqual(w, len(next.Rooms), 60)
			if next.More { // the last page may turn out to be empty
				assert.NotEmpty(w, next.Rooms)
			}
			got, page = append(got, next.Rooms...), next
		}
		slices.Sort(got)
		assert.Len(w, slices.Compact(got), want)

		page, err := s.RoomsFrom(w.Context(), "4-1", Cursor{}, 1000)
		require.NoError(w, err)
		assert.False(w, page.More)
		assert.Len(w, page.Rooms, 61)
		for _, room := range page.Rooms {
			assert.True(w, strings.HasPrefix(room, "4-1"), room)
		}
	})
}

// A few rooms in many buckets are one page.
func TestRoomsFromManyBuckets(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const buckets = 64
		s := New(w.client, testKeys{buckets: buckets})
		for b := range buckets {
			require.NoError(w, w.rdb.SAdd(w.Context(), w.keys.Rooms(b), fmt.Sprint("r", b)).Err())
		}
		page, err := s.RoomsFrom(w.Context(), "", Cursor{}, 2*buckets)
		require.NoError(w, err)
		assert.Len(w, page.Rooms, buckets)
		assert.False(w, page.More)
	})
}

// If many names match, a page holds about as many as were asked for.
func TestRoomsFromReturnsAboutTheLimit(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const names = 4000
		var args []any
		for i := range names {
			args = append(args, fmt.Sprintf("%c%d", 'a'+i%8, i))
		}
		require.NoError(w, w.rdb.SAdd(w.Context(), w.keys.Rooms(0), args...).Err())
		for _, c := range []struct {
			prefix      string
			limit, want int
		}{{"", 50, names}, {"a", 10, names / 8}, {"b", 200, names / 8}, {"c1", 20, 0}} {
			seen := make(map[string]bool)
			for page := (RoomPage{More: true}); page.More; {
				next, err := w.RoomsFrom(w.Context(), c.prefix, page.Next, c.limit)
				require.NoError(w, err)
				assert.LessOrEqual(w, len(next.Rooms), 3*c.limit+20, c.prefix)
				for _, room := range next.Rooms {
					seen[room] = true
				}
				page = next
			}
			if c.want == 0 {
				assert.NotEmpty(w, seen)
				continue
			}
			assert.Len(w, seen, c.want, c.prefix)
		}
	})
}

// If few names match, a page looks at a limited number of names.
func TestRoomsFromLooksAtABoundedNumber(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		const names = namesPerPage + 5000
		for part := 0; part < names; part += 1000 {
			var args []any
			for i := range 1000 {
				args = append(args, fmt.Sprint("r", part+i))
			}
			require.NoError(w, w.rdb.SAdd(w.Context(), w.keys.Rooms(0), args...).Err())
		}
		pages, place, trips := 0, Cursor{}, w.trips()
		for more := true; more; pages++ {
			trips.Store(0)
			page, err := w.RoomsFrom(w.Context(), "none", place, 10)
			require.NoError(w, err)
			assert.Empty(w, page.Rooms)
			assert.LessOrEqual(w, trips.Load(), int64(namesPerPage/namesPerScan+1))
			place, more = page.Next, page.More
		}
		if w.real != nil { // the embedded Redis counts only matches
			assert.Greater(w, pages, 1)
		}
	})
}

func TestEntriesFrom(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		page, err := w.EntriesFrom(w.Context(), "r", Cursor{}, 10)
		require.NoError(w, err)
		assert.InDelta(w, w.clockProof().Now, page.Now, 5000)
		page.Now = 0
		assert.Equal(w, EntryPage{Records: []Record{}}, page)
		assert.Empty(w, w.dump(), "a read creates nothing")

		var ops []Op
		for i := range 90 {
			ops = append(ops, join("r", fmt.Sprintf("c%02d", i), "e"))
		}
		w.ok("I", ops...)
		page, err = w.EntriesFrom(w.Context(), "r", Cursor{}, 90)
		require.NoError(w, err)
		require.Len(w, page.Records, 90)
		assert.False(w, page.More)
		assert.Equal(w, w.position("r"), page.Position)
		for i, r := range page.Records {
			require.Equal(w, w.record("r", fmt.Sprintf("c%02d", i)), r, "sorted")
		}

		seen := make(map[string]int)
		for place, more := (Cursor{}), true; more; {
			page, err := w.EntriesFrom(w.Context(), "r", place, 40)
			require.NoError(w, err)
			assert.LessOrEqual(w, len(page.Records), 60)
			assert.Equal(w, 90, page.Total)
			assert.Equal(w, w.position("r"), page.Position)
			for _, r := range page.Records {
				seen[r.Conn]++
			}
			place, more = page.Next, page.More
		}
		assert.Len(w, seen, 90)

		require.NoError(w, w.rdb.HSet(w.Context(), w.keys.Members("odd"), "a", "not a record").Err())
		_, err = w.EntriesFrom(w.Context(), "odd", Cursor{}, 5)
		require.ErrorIs(w, err, errFormat)
	})
}

// A set or hash that Redis returns as a whole is cut, and the next page begins after
// the last name.
func TestSliceFrom(t *testing.T) {
	t.Parallel()
	self := func(s string) string { return s }
	names := func() []string { return []string{"c", "a", "d", "b", "a"} }
	page, to, more := sliceFrom(Cursor{Bucket: 2}, names(), 0, 3, self)
	assert.Equal(t, []string{"a", "b", "c"}, page)
	assert.Equal(t, Cursor{Bucket: 2, After: "c"}, to)
	assert.True(t, more)
	page, to, more = sliceFrom(to, names(), 0, 3, self)
	assert.Equal(t, []string{"d"}, page)
	assert.False(t, more)
	assert.Equal(t, 2, to.Bucket)

	// It has grown and now comes in parts. Names that were returned before are left
	// out.
	page, to, more = sliceFrom(Cursor{After: "b"}, []string{"d", "a"}, 7, 3, self)
	assert.Equal(t, []string{"d"}, page)
	assert.Equal(t, Cursor{Scan: 7, After: "b"}, to)
	assert.True(t, more)
	page, _, more = sliceFrom(to, []string{"b", "c"}, 0, 1, self)
	assert.Equal(t, []string{"c"}, page)
	assert.False(t, more)

	// In parts, a page is as Redis returns it.
	page, to, more = sliceFrom(Cursor{Scan: 5}, names(), 9, 2, self)
	assert.Equal(t, []string{"a", "b", "c", "d"}, page)
	assert.Equal(t, Cursor{Scan: 9}, to)
	assert.True(t, more)
}

func TestGlobEscape(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		names := []string{`a*`, `a?`, `a[b]`, `a[^b]`, `a\`, `ab`, `a-b`, `a`}
		for _, name := range names {
			require.NoError(w, w.rdb.SAdd(w.Context(), "s", name).Err())
		}
		for _, name := range names {
			got, _, err := w.client.(*redis.Client).SScan(w.Context(), "s", 0, globEscape(name), 100).Result()
			require.NoError(w, err)
			assert.Equal(w, []string{name}, got)
		}
	})
}
