package store

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

func (w *world) renew(inc string, ttl time.Duration) Renewal {
	w.Helper()
	r, err := w.Renew(w.Context(), inc, ttl, "beat "+inc, true)
	require.NoError(w, err)
	return r
}

func (w *world) bury(inc string) bool {
	w.Helper()
	ok, err := w.Bury(w.Context(), w.judgment(), inc)
	require.NoError(w, err)
	return ok
}

// instances lists the living and the dead.
func (w *world) instances() []Instance {
	w.Helper()
	list, now, err := w.Instances(w.Context(), 100)
	require.NoError(w, err)
	assert.InDelta(w, w.judgment().Now, now, 5000)
	return list
}

func TestLease(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		r := w.renew("I", time.Minute)
		assert.False(w, r.Present, "a renewal makes nobody alive")
		assert.NotNil(w, r.Dead)
		assert.Empty(w, r.Dead)
		assert.Empty(w, w.instances())

		now, err := w.Register(w.Context(), "I", time.Minute)
		require.NoError(w, err)
		assert.InDelta(w, w.judgment().Now, now, 5000)
		_, err = w.Register(w.Context(), "J", 10*time.Second)
		require.NoError(w, err)
		_, err = w.Register(w.Context(), "K", 20*time.Second)
		require.NoError(w, err)
		w.ok("I", join("r", "a", "a1"), Op{Kind: OpConnect, Conn: "a"})
		w.listen()

		r = w.renew("I", time.Minute)
		assert.True(w, r.Present)
		assert.InDelta(w, w.judgment().Now, r.Now, 5000)
		assert.Equal(w, "J", r.Next)
		assert.InDelta(w, 10*time.Second, r.NextIn, float64(5*time.Second))
		assert.Equal(w, []message{{w.keys.Control("I"), "beat I"}}, w.heard())
		assert.EqualValues(w, 2, max(r.Owned, w.renew("I", time.Minute).Owned), "one of two renewals says it")
		assert.Equal(w, "K", w.renew("J", 30*time.Second).Next, "not itself")
		assert.Equal(w, "J", w.renew("K", time.Hour).Next)
		living := w.instances()
		require.Len(w, living, 3)
		assert.InDelta(w, w.judgment().Now+time.Hour.Milliseconds(), living[2].At, 5000)

		quiet, err := w.Renew(w.Context(), "I", time.Minute, "", false)
		require.NoError(w, err)
		assert.Nil(w, quiet.Dead)
		again := New(w.client, testKeys{buckets: 2})
		elsewhere, err := again.Renew(w.Context(), "I", time.Minute, "", false)
		require.NoError(w, err)
		assert.EqualValues(w, -1, elsewhere.Owned)
	})
}

func TestBurial(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		_, err := w.Register(w.Context(), "I", time.Minute)
		require.NoError(w, err)
		_, err = w.Register(w.Context(), "J", time.Minute)
		require.NoError(w, err)
		assert.False(w, w.bury("I"), "it lives")
		assert.False(w, w.bury("nobody"))
		assert.Empty(w, w.renew("J", time.Minute).Dead)

		require.True(w, w.renew("I", -time.Second).Present)
		r := w.renew("J", time.Minute)
		assert.Equal(w, "I", r.Next)
		assert.Negative(w, r.NextIn)
		assert.True(w, w.bury("I"))
		assert.False(w, w.bury("I"), "once")
		assert.Equal(w, []string{"I"}, w.renew("J", time.Minute).Dead)
		assert.False(w, w.renew("I", time.Minute).Present, "nobody comes back")
		assert.Equal(w, []string{"I"}, w.renew("J", time.Minute).Dead)

		require.NoError(w, w.DeclareDead(w.Context(), "J"))
		require.NoError(w, w.DeclareDead(w.Context(), "J"))
		assert.ElementsMatch(w, []string{"I", "J"}, w.renew("J", time.Minute).Dead)
		assert.False(w, w.renew("J", time.Minute).Present)
		require.NoError(w, w.Cleaned(w.Context(), "I"))
		require.NoError(w, w.Cleaned(w.Context(), "I"))
		assert.Equal(w, []string{"J"}, w.renew("J", time.Minute).Dead)
		require.NoError(w, w.Cleaned(w.Context(), "J"))
		assert.Equal(w, []string{"t:format"}, w.eternal(), "but for the format, which renewals restore")
	})
}

// Of many servers that see a lease run out one buries, and a renewal that
// comes after it is told so.
func TestOneBurial(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	j := w.judgment()
	for round := range 20 {
		inc := fmt.Sprintf("I%d", round)
		_, err := w.Register(w.Context(), inc, 0)
		require.NoError(w, err)
		var buried atomic.Int64
		var present atomic.Bool
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				ok, err := w.Bury(w.Context(), j, inc)
				if assert.NoError(w, err) && ok {
					buried.Add(1)
				}
			})
		}
		wg.Go(func() {
			r, err := w.Renew(w.Context(), inc, time.Minute, "", false)
			assert.NoError(w, err)
			present.Store(r.Present)
		})
		wg.Wait()
		if present.Load() {
			assert.Zero(w, buried.Load())
			continue
		}
		assert.EqualValues(w, 1, buried.Load())
		assert.True(w, slices.Contains(w.renew("nobody", 0).Dead, inc))
	}
}

func TestCheckFormat(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		require.NoError(w, w.CheckFormat(w.Context()))
		require.NoError(w, w.CheckFormat(w.Context()))
		w.ok("I", join("r", "a", "a1"))
		_, err := w.Register(w.Context(), "I", time.Minute)
		require.NoError(w, err)
		require.NoError(w, w.CheckFormat(w.Context()))
		for _, found := range []string{"2", "0", "", "ts", "99999999999999999999999999999999999"} {
			require.NoError(w, w.rdb.Set(w.Context(), w.keys.Format(), found, 0).Err())
			err := w.CheckFormat(w.Context())
			require.ErrorIs(w, err, ErrForeign, found)
			require.ErrorContains(w, err, w.keys.Format())
		}
		for _, key := range []string{w.keys.Format(), w.keys.Instances(), w.keys.Dead(), w.keys.Rooms(0), w.keys.Foreign()[0]} {
			require.NoError(w, w.rdb.FlushAll(w.Context()).Err())
			require.NoError(w, w.rdb.HSet(w.Context(), key, "a", "b").Err())
			err := w.CheckFormat(w.Context())
			require.ErrorIs(w, err, ErrForeign, key)
			require.ErrorContains(w, err, key)
			require.Len(w, w.dump(), 1, "nothing has been claimed")
		}
	})
}
