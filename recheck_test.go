package mesh

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A recheck that comes when the one before it has its answer, but has not ended
// yet, is not lost.
func TestARecheckAtTheEndOfAnother(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		p, ctx := w.manager(), t.Context()
		var banned atomic.Bool
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{JoinGuard: func(context.Context, Member, string) (bool, error) {
			return !banned.Load(), nil
		}}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "lobby", "c"))
		c, err := p.n.conn("c")
		require.NoError(t, err)
		q := &joinQuestion{conn: c, room: "lobby", kind: askedRecheck}
		require.NoError(t, p.n.joins.begin(q))
		p.n.joins.askAgain(q)
		require.True(t, c.In("lobby"))
		banned.Store(true)
		require.NoError(t, p.Recheck("c"))
		require.False(t, p.n.joins.endUnlessStale(q))
		p.n.joins.askAgain(q)
		require.True(t, p.n.joins.endUnlessStale(q))
		assert.False(t, c.In("lobby"))
		assert.Empty(t, p.n.joins.open)
	})
}

// A connection that is let in by the app between the no of the guard and its leave
// is in, and its join says so.
func TestAddBetweenTheNoAndTheLeave(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		p, ctx := w.manager(), t.Context()
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{JoinGuard: never}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		c, err := p.n.conn("c")
		require.NoError(t, err)
		q := &joinQuestion{conn: c, room: "lobby"}
		require.NoError(t, p.n.joins.begin(q))
		defer p.n.joins.end(q)
		err = p.n.joins.ask(ctx, q, false, func(answer error) error {
			if answer == nil {
				return nil
			}
			require.NoError(t, p.Rooms().Add(ctx, "lobby", "c"))
			_, err := p.n.joins.exclude(ctx, q, answer)
			return err
		})
		require.NoError(t, err)
		assert.True(t, c.In("lobby"))
	})
}

// A client that is taken out while its join is being answered is told that it is
// not in.
func TestAJoinIsAnsweredAfterARemoval(t *testing.T) {
	t.Parallel()
	yes := func(context.Context, Member, string) (bool, error) { return true, nil }
	for name, c := range map[string]struct {
		guard Guard
		do    func(ctx context.Context, s *Server, banned *atomic.Bool, id string) error
	}{
		"Remove": {yes, func(ctx context.Context, s *Server, _ *atomic.Bool, id string) error {
			_, err := s.Rooms().Remove(ctx, "lobby", id)
			return err
		}},
		"Clear": {yes, func(ctx context.Context, s *Server, _ *atomic.Bool, _ string) error {
			return s.Rooms().Clear(ctx, "lobby")
		}},
		"Recheck": {yes, func(ctx context.Context, s *Server, banned *atomic.Bool, id string) error {
			banned.Store(true)
			return s.Connections().Recheck(ctx, id)
		}},
		"Recheck, of a connection that sees nothing": {never, func(ctx context.Context, s *Server, banned *atomic.Bool, _ string) error {
			banned.Store(true)
			return s.Rooms().Recheck(ctx, "lobby")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				s, there := w.server(), w.server()
				var banned atomic.Bool
				s.track("^lobby$", PresenceOptions{
					Guard: func(ctx context.Context, m Member, room string) (bool, error) {
						time.Sleep(300 * time.Millisecond)
						return c.guard(ctx, m, room)
					},
					JoinGuard: func(context.Context, Member, string) (bool, error) { return !banned.Load(), nil },
				})
				p := s.dial()
				var asking sync.WaitGroup
				asking.Go(func() {
					assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/join-room", inRoomPayload("lobby"))))
				})
				w.sleep(100 * time.Millisecond)
				require.NoError(t, c.do(t.Context(), there.Server, &banned, p.id))
				asking.Wait()
				in, err := there.Rooms().Contains(t.Context(), "lobby", p.id)
				require.NoError(t, err)
				assert.False(t, in)
			})
		})
	}
}

// The same for a join that waits for Redis, and for the app.
func TestARecheckBeatsAJoinThatWaitsForRedis(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		p, ctx := w.manager(), t.Context()
		var banned atomic.Bool
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{JoinGuard: func(context.Context, Member, string) (bool, error) {
			return !banned.Load(), nil
		}}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		w.sleep(100 * time.Millisecond)
		w.away()
		var asking sync.WaitGroup
		asking.Go(func() { assert.ErrorIs(t, p.Join(ctx, "lobby", "c"), ErrRefused) })
		w.sleep(50 * time.Millisecond)
		banned.Store(true)
		require.NoError(t, p.Recheck("c"))
		w.sleep(50 * time.Millisecond)
		w.back()
		asking.Wait()
	})
}
