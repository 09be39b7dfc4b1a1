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

// A key of another type in a room's place is no outage: the join fails, and does not
// take place later.
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

// joinEdge does something about batches with a join.
type joinEdge struct {
	local.Store
	armed *atomic.Bool
	after func(results []store.OpResult)
}

func (e joinEdge) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
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
			return testhook.Seams{Local: joinEdge{st, armed, after}, Lease: st, Hub: st}
		})
	}
}

// Redis goes away between a join and the reading of who is there: the join has taken
// place, so it is not answered with an error.
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

// Redis is out of memory for joins, and answers everything else. A client hears at
// once that it is in, and is in when there is memory. Until then others, and its own
// subscription, do not know of it.
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

// If a call fails where no write follows, Redis is not taken to be away for ever.
func TestAFailureOfLongAgoIsNoOutage(t *testing.T) {
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
