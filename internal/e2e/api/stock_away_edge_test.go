package api

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// A key of the wrong type in the place of a room is no outage. The join fails, and does
// not take place later.
func TestAFailedJoinDoesNotTakePlaceLater(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		c, admin := s.Stock(""), w.Client()
		key := w.Keys().Members("blocked")
		require.NoError(t, admin.Set(t.Context(), key, "an operator's", 0).Err())
		require.Equal(t, "EUNAVAILABLE", c.Wait(c.JoinRoom("blocked")).Code())
		require.NoError(t, admin.Del(t.Context(), key).Err())
		w.Sleep(30 * time.Second)
		members, err := s.InRedis("blocked")
		require.NoError(t, err)
		require.Empty(t, members)
		require.True(t, c.Wait(c.JoinRoom("blocked")).Ok())
	})
}

// joinSeam refuses batches with a join, or calls a function after one.
type joinSeam struct {
	local.Store
	armed *atomic.Bool
	after func(results []store.OpResult)
}

func (e joinSeam) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	joins := slices.ContainsFunc(ops, func(op store.Op) bool { return op.Kind == store.OpJoin })
	if joins && e.armed.Load() && e.after == nil {
		refused := fmt.Errorf("%w: %w: OOM", store.ErrUnavailable, store.ErrFull)
		return slices.Repeat([]store.OpResult{{Err: refused}}, len(ops)), nil
	}
	results, err := e.Store.Commit(ctx, bucket, inc, number, known, ops)
	if joins && e.after != nil && e.armed.Swap(false) {
		e.after(results)
	}
	return results, err
}

func onJoin(armed *atomic.Bool, after func([]store.OpResult)) func(*mesh.Options) {
	return func(o *mesh.Options) {
		testhook.SetSeams(o, func(st *store.Store) testhook.Seams {
			return testhook.Seams{Local: joinSeam{st, armed, after}, Lease: st, Hub: st}
		})
	}
}

// Redis goes away between a join and the reading of the members. The join has taken
// place, so the answer is no error.
func TestRedisGoesAwayRightAfterAJoin(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var armed atomic.Bool
		s := w.Tracked(onJoin(&armed, func([]store.OpResult) { w.Mem.Hang() }))
		c := s.Stock("")
		w.Sleep(time.Second)
		armed.Store(true)
		began := time.Now()
		require.Equal(t, []string{c.ID}, c.StaleOK(c.JoinRoom("lobby")).IDs(t))
		require.LessOrEqual(t, time.Since(began), 2100*time.Millisecond)
		w.Back()
		w.Sleep(time.Second)
		members, err := s.InRedis("lobby")
		require.NoError(t, err)
		require.Contains(t, members, c.ID)
	})
}

// Redis is out of memory for joins, and answers everything else. A client gets a
// success at once, and is a member as soon as Redis has memory. Until then, its own
// subscription and others do not show it.
func TestJoinWithoutMemory(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var armed atomic.Bool
		s := w.Tracked(onJoin(&armed, nil))
		c, other := s.Stock(""), s.Dial()
		other.Join("lobby")
		armed.Store(true)
		began := time.Now()
		joined := c.StaleOK(c.JoinRoom("lobby"))
		require.ElementsMatch(t, []string{c.ID, other.ID}, joined.IDs(t))
		first := c.ViewOf(c.SubscribePresence("lobby"))
		require.False(t, first.Stale, "Redis answers")
		require.Equal(t, []string{other.ID}, first.IDs(t))
		require.LessOrEqual(t, time.Since(began), 500*time.Millisecond)
		w.Sleep(10 * time.Second)
		require.Empty(t, c.Got("lobby"))
		armed.Store(false)
		w.Sleep(2 * time.Second)
		require.Equal(t, harness.MemberStates{c.ID: "", other.ID: ""}, c.Sees(first, "lobby"))
		require.Equal(t, 1, c.JoinsOf(first, "lobby", c.ID))
	})
}

// If no write follows a failed call, Redis counts as away only for a limited time.
func TestAnOldFailureIsNoOutage(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.LeaseTTL = time.Hour }) // no heartbeat
		w.Sleep(3 * time.Second)
		require.False(t, testhook.IsAway(s.Server, "lobby"))
		testhook.PartsOf(s.Server).Store.MayHaveFailed()
		require.True(t, testhook.IsAway(s.Server, "lobby"))
		w.Sleep(testhook.LimitsOf().Fail - time.Millisecond)
		require.True(t, testhook.IsAway(s.Server, "lobby"))
		w.Sleep(time.Millisecond)
		require.False(t, testhook.IsAway(s.Server, "lobby"))
	})
}
