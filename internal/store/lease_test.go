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

func (w *world) declareDead(inc string) bool {
	w.Helper()
	ok, err := w.DeclareDeadIfExpired(w.Context(), w.clockProof(), inc)
	require.NoError(w, err)
	return ok
}

// leases lists the live and the dead servers.
func (w *world) leases() []ServerLease {
	w.Helper()
	list, now, err := w.ServerLeases(w.Context(), 100)
	require.NoError(w, err)
	assert.InDelta(w, w.clockProof().Now, now, 5000)
	return list
}

func TestLease(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		r := w.renew("I", time.Minute)
		assert.False(w, r.Listed, "a renewal does not register")
		assert.NotNil(w, r.Dead)
		assert.Empty(w, r.Dead)
		assert.Empty(w, w.leases())

		now, err := w.Register(w.Context(), "I", time.Minute)
		require.NoError(w, err)
		assert.InDelta(w, w.clockProof().Now, now, 5000)
		_, err = w.Register(w.Context(), "J", 10*time.Second)
		require.NoError(w, err)
		_, err = w.Register(w.Context(), "K", 20*time.Second)
		require.NoError(w, err)
		w.ok("I", join("r", "a", "a1"), Op{Kind: OpConnect, Conn: "a"})
		w.listen()

		r = w.renew("I", time.Minute)
		assert.True(w, r.Listed)
		assert.InDelta(w, w.clockProof().Now, r.Now, 5000)
		assert.Equal(w, "J", r.Next)
		assert.InDelta(w, 10*time.Second, r.NextIn, float64(5*time.Second))
		assert.Equal(w, []message{{w.keys.ServerChannel("I"), "beat I"}}, w.heard())
		assert.EqualValues(w, 2, max(r.Owned, w.renew("I", time.Minute).Owned), "one of two renewals returns it")
		assert.Equal(w, "K", w.renew("J", 30*time.Second).Next, "not itself")
		assert.Equal(w, "J", w.renew("K", time.Hour).Next)
		living := w.leases()
		require.Len(w, living, 3)
		assert.InDelta(w, w.clockProof().Now+time.Hour.Milliseconds(), living[2].At, 5000)

		quiet, err := w.Renew(w.Context(), "I", time.Minute, "", false)
		require.NoError(w, err)
		assert.Nil(w, quiet.Dead)
		again := New(w.client, testKeys{buckets: 2})
		elsewhere, err := again.Renew(w.Context(), "I", time.Minute, "", false)
		require.NoError(w, err)
		assert.EqualValues(w, -1, elsewhere.Owned)
	})
}

func TestDeclareDead(t *testing.T) {
	t.Parallel()
	everywhere(t, func(w *world) {
		_, err := w.Register(w.Context(), "I", time.Minute)
		require.NoError(w, err)
		_, err = w.Register(w.Context(), "J", time.Minute)
		require.NoError(w, err)
		assert.False(w, w.declareDead("I"), "it lives")
		assert.False(w, w.declareDead("nobody"))
		assert.Empty(w, w.renew("J", time.Minute).Dead)

		require.True(w, w.renew("I", -time.Second).Listed)
		r := w.renew("J", time.Minute)
		assert.Equal(w, "I", r.Next)
		assert.Negative(w, r.NextIn)
		assert.True(w, w.declareDead("I"))
		assert.False(w, w.declareDead("I"), "once")
		assert.Equal(w, []string{"I"}, w.renew("J", time.Minute).Dead)
		assert.False(w, w.renew("I", time.Minute).Listed, "a dead server cannot renew")
		assert.Equal(w, []string{"I"}, w.renew("J", time.Minute).Dead)

		require.NoError(w, w.DeclareDead(w.Context(), "J"))
		require.NoError(w, w.DeclareDead(w.Context(), "J"))
		assert.ElementsMatch(w, []string{"I", "J"}, w.renew("J", time.Minute).Dead)
		assert.False(w, w.renew("J", time.Minute).Listed)
		require.NoError(w, w.RemoveDead(w.Context(), "I"))
		require.NoError(w, w.RemoveDead(w.Context(), "I"))
		assert.Equal(w, []string{"J"}, w.renew("J", time.Minute).Dead)
		require.NoError(w, w.RemoveDead(w.Context(), "J"))
		require.NoError(w, w.DeclareDead(w.Context(), "J"), "one that was late in the network")
		require.NoError(w, w.Fence(w.Context(), 0, "J"), "by a server that cleaned up beside another")
		require.NoError(w, w.DeclareDead(w.Context(), "J"))
		assert.Empty(w, w.renew("J", time.Minute).Dead)
		_, err = w.Commit(w.Context(), 0, "J", 1, 0, []Op{{Kind: OpJoin, Room: "r", Conn: "c", Entry: "E"}})
		require.ErrorIs(w, err, ErrFenced)
		assert.Equal(w, []string{"t:format"}, w.permanent(), "only the format, which renewals restore")
	})
}

// If many servers see that a lease has run out, one declares the server dead. A later
// renewal of the lease fails.
func TestOneServerDeclaresDead(t *testing.T) {
	t.Parallel()
	w := newWorld(t, redistest.Start(t))
	j := w.clockProof()
	for round := range 20 {
		inc := fmt.Sprintf("I%d", round)
		_, err := w.Register(w.Context(), inc, 0)
		require.NoError(w, err)
		var buried atomic.Int64
		var present atomic.Bool
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				ok, err := w.DeclareDeadIfExpired(w.Context(), j, inc)
				if assert.NoError(w, err) && ok {
					buried.Add(1)
				}
			})
		}
		wg.Go(func() {
			r, err := w.Renew(w.Context(), inc, time.Minute, "", false)
			assert.NoError(w, err)
			present.Store(r.Listed)
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
		for _, found := range []string{"1", "3", "0", "", "ts", "99999999999999999999999999999999999"} {
			require.NoError(w, w.rdb.Set(w.Context(), w.keys.Format(), found, 0).Err())
			err := w.CheckFormat(w.Context())
			require.ErrorIs(w, err, ErrOtherFormat, found)
			require.ErrorContains(w, err, w.keys.Format())
		}
		for _, key := range []string{w.keys.Format(), w.keys.Instances(), w.keys.Dead(), w.keys.Rooms(0), w.keys.OtherServerKeys()[0]} {
			require.NoError(w, w.rdb.FlushAll(w.Context()).Err())
			require.NoError(w, w.rdb.HSet(w.Context(), key, "a", "b").Err())
			err := w.CheckFormat(w.Context())
			require.ErrorIs(w, err, ErrOtherFormat, key)
			require.ErrorContains(w, err, key)
			require.Len(w, w.dump(), 1, "nothing has been claimed")
		}
	})
}
