package guards

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// If a client is removed from a room while its join is being answered, the answer says
// that it is no member.
func TestAJoinIsAnsweredAfterARemoval(t *testing.T) {
	t.Parallel()
	yes := func(context.Context, mesh.Member, string) (bool, error) { return true, nil }
	for name, c := range map[string]struct {
		guard mesh.Guard
		do    func(ctx context.Context, s *mesh.Server, banned *atomic.Bool, id string) error
	}{
		"Remove": {yes, func(ctx context.Context, s *mesh.Server, _ *atomic.Bool, id string) error {
			_, err := s.Rooms().Remove(ctx, "lobby", id)
			return err
		}},
		"Clear": {yes, func(ctx context.Context, s *mesh.Server, _ *atomic.Bool, _ string) error {
			return s.Rooms().Clear(ctx, "lobby")
		}},
		"Recheck": {yes, func(ctx context.Context, s *mesh.Server, banned *atomic.Bool, id string) error {
			banned.Store(true)
			return s.Connections().Recheck(ctx, id)
		}},
		"Recheck, of a connection that may not see the room": {harness.Never, func(ctx context.Context, s *mesh.Server, banned *atomic.Bool, _ string) error {
			banned.Store(true)
			return s.Rooms().Recheck(ctx, "lobby")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s, there := w.Server(), w.Server()
				var banned atomic.Bool
				s.Track("^lobby$", mesh.PresenceOptions{
					Guard: func(ctx context.Context, m mesh.Member, room string) (bool, error) {
						time.Sleep(300 * time.Millisecond)
						return c.guard(ctx, m, room)
					},
					JoinGuard: func(context.Context, mesh.Member, string) (bool, error) { return !banned.Load(), nil },
				})
				p := s.Dial()
				var asking sync.WaitGroup
				asking.Go(func() {
					assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(p.Call("mesh/join-room", harness.InRoomPayload("lobby"))))
				})
				w.Sleep(100 * time.Millisecond)
				require.NoError(t, c.do(t.Context(), there.Server, &banned, p.ID))
				asking.Wait()
				in, err := there.Rooms().Contains(t.Context(), "lobby", p.ID)
				require.NoError(t, err)
				assert.False(t, in)
			})
		})
	}
}

// A recheck also wins over a join of the app that waits for Redis.
func TestARecheckBeatsAJoinThatWaitsForRedis(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p, ctx := w.Manager(), t.Context()
		var banned atomic.Bool
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{JoinGuard: func(context.Context, mesh.Member, string) (bool, error) {
			return !banned.Load(), nil
		}}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		w.Sleep(100 * time.Millisecond)
		w.Away()
		var asking sync.WaitGroup
		asking.Go(func() { assert.ErrorIs(t, p.Join(ctx, "lobby", "c"), mesh.ErrRefused) })
		w.Sleep(50 * time.Millisecond)
		banned.Store(true)
		require.NoError(t, p.Recheck("c"))
		w.Sleep(50 * time.Millisecond)
		w.Back()
		asking.Wait()
	})
}
