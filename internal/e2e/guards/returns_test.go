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
	"github.com/meshpresence/mesh/internal/testhook"
)

// silentWorld is a server whose room "club" has a join guard and whose room
// "hall" has none, both with a TTL: a second, or in real time five, such that a
// slow machine makes no member silent.
func silentWorld(w *harness.World, setup ...func(*mesh.Options)) (s *harness.Server, banned *sync.Map, asked *atomic.Int64) {
	s = w.Server(append(setup, harness.NoCommandLimit)...)
	banned, asked = new(sync.Map), new(atomic.Int64)
	ttl := time.Second
	if !w.Virtual {
		ttl = 5 * time.Second
	}
	s.Track("^club$", mesh.PresenceOptions{TTL: ttl, JoinGuard: func(ctx context.Context, m mesh.Member, _ string) (bool, error) {
		asked.Add(1)
		how, out := banned.Load(m.ID)
		if how == "hangs" {
			<-ctx.Done()
			return true, nil
		}
		return !out, nil
	}})
	s.Track("^hall$", mesh.PresenceOptions{TTL: ttl})
	return s, banned, asked
}

func TestASilentMemberIsAskedAbout(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		if !w.Virtual {
			harness.UnhurriedOnly(t, "leases and TTLs of one or two seconds")
		}
		s, banned, asked := silentWorld(w)
		watcher, good, bad := s.Dial(), s.Dial(), s.Dial()
		for _, room := range []string{"club", "hall"} {
			watcher.Subscribe(room)
			good.Join(room)
			bad.Join(room)
		}
		// In real time a member may have been silent for too long before its next
		// frame, and then its guard is asked about one more return.
		times := func(want int64, why string) {
			t.Helper()
			assert.GreaterOrEqual(t, asked.Load(), want, why)
			assert.True(t, !w.Virtual || asked.Load() == want, "%s: asked %d times, not %d", why, asked.Load(), want)
		}
		times(2, "once for each join")
		in := func(room string, p *harness.Peer) bool {
			ok, err := s.Rooms().Contains(t.Context(), room, p.ID)
			require.NoError(t, err)
			return ok
		}
		gone := func(p *harness.Peer) {
			p.Mute()
			w.Eventually(5*time.Second, func() bool { return !in("club", p) && !in("hall", p) }, "it leaves by silence")
		}
		gone(good)
		require.Equal(t, "true", good.State("club", map[string]any{"n": 1}), "it is in again before its request")
		assert.True(t, in("club", good))
		assert.True(t, in("hall", good))
		times(3, "once for the return")

		gone(good)
		assert.True(t, good.Room("mesh/join-room", "club").Success)
		assert.True(t, !w.Virtual || asked.Load() <= 5, "the request may have its answer from the return")
		asked.Store(0)

		gone(bad)
		banned.Store(bad.ID, true)
		bad.Call("mesh/noop", nil)
		w.Eventually(2*time.Second, func() bool { return in("hall", bad) }, "the other room")
		w.Eventually(2*time.Second, func() bool { return bad.Pushed("mesh/membership-ended") == 1 }, "the push")
		assert.JSONEq(t, `{"roomName":"club"}`, string(bad.PushesOf("mesh/membership-ended")[0].Payload))
		for range 3 {
			bad.Call("mesh/noop", nil)
		}
		assert.Equal(t, "false", bad.State("club", map[string]any{"n": 1}))
		assert.False(t, in("club", bad))
		times(1, "not again at each frame")
		w.Eventually(2*time.Second, func() bool { return watcher.CountIn("club", "leave", bad.ID) == 1 }, "its leave")
		assert.Equal(t, 1, watcher.CountIn("club", "join", bad.ID))
		assert.False(t, bad.Room("mesh/join-room", "club").Success)
		banned.Delete(bad.ID)
		assert.True(t, bad.Room("mesh/join-room", "club").Success)
	})
}

// A guard that hangs holds up neither the other rooms nor the reader.
func TestAHangingJoinGuardAfterASilence(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, banned, _ := silentWorld(w)
		p := s.Dial()
		p.Join("club")
		p.Join("hall")
		p.Mute()
		w.Sleep(3 * time.Second)
		banned.Store(p.ID, "hangs")
		began := time.Now()
		assert.Equal(t, "true", p.State("hall", map[string]any{"n": 1}))
		assert.Zero(t, time.Since(began))
		done := make(chan struct{})
		go func() {
			defer close(done)
			assert.Equal(t, "false", p.State("club", map[string]any{"n": 1}), "the answer is the guard's")
		}()
		for range 12 { // stays alive in the other room
			w.Sleep(500 * time.Millisecond)
			require.NoError(t, p.Send(map[string]any{"command": "pong"}))
		}
		<-done
		in, err := s.Rooms().Contains(t.Context(), "hall", p.ID)
		require.NoError(t, err)
		assert.True(t, in)
		assert.Equal(t, 1, p.Pushed("mesh/membership-ended"))
	})
}

// Every way out settles a return that waits, and every way in.
func TestAReturnInFlight(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		do func(ctx context.Context, p *mesh.PresenceManager) error
		in bool
	}{
		"nothing": {in: true, do: func(context.Context, *mesh.PresenceManager) error { return nil }},
		"Leave": {do: func(ctx context.Context, p *mesh.PresenceManager) error {
			_, err := p.Leave(ctx, "club", "c")
			return err
		}},
		"Remove": {do: func(ctx context.Context, p *mesh.PresenceManager) error {
			_, err := p.Rooms().Remove(ctx, "club", "c")
			return err
		}},
		"Clear": {do: func(ctx context.Context, p *mesh.PresenceManager) error { return p.Rooms().Clear(ctx, "club") }},
		"a new ban": {do: func(ctx context.Context, p *mesh.PresenceManager) error {
			return p.Connections().SetMetadata(ctx, "c", "banned", mesh.MetadataOptions{})
		}},
		"Disconnect": {do: func(ctx context.Context, p *mesh.PresenceManager) error { return p.Disconnect(ctx, "c") }},
		"Add":        {in: true, do: func(ctx context.Context, p *mesh.PresenceManager) error { return p.Rooms().Add(ctx, "club", "c") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				ctx := t.Context()
				p := w.Manager()
				require.NoError(t, p.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{TTL: 2 * time.Second, JoinGuard: harness.NotBanned}))
				require.NoError(t, p.Connect(ctx, "c", nil))
				require.NoError(t, p.Join(ctx, "club", "c"))
				w.Sleep(4 * time.Second)
				require.NoError(t, p.Touch("c"))
				w.Sleep(100 * time.Millisecond)
				require.NoError(t, c.do(ctx, p))
				w.Sleep(time.Second)
				in, err := p.Rooms().Contains(ctx, "club", "c")
				require.NoError(t, err)
				assert.Equal(t, c.in, in)
				assert.Zero(t, testhook.OpenJoins(p), "nothing is left behind")
			})
		})
	}
}

// An entry that another server may have ended because its TTL had passed is asked about,
// too, on a server that does not end entries itself.
func TestAReturnAfterCleanExpired(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		off := false
		p, other := w.Manager(func(o *mesh.Options) { o.EnablePresenceExpirationEvents = &off }), w.Manager(func(o *mesh.Options) { o.EnablePresenceExpirationEvents = &off })
		var banned atomic.Bool
		var asked atomic.Int64
		guard := func(context.Context, mesh.Member, string) (bool, error) { asked.Add(1); return !banned.Load(), nil }
		require.NoError(t, p.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{TTL: 2 * time.Second, JoinGuard: guard}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "club", "c"))
		in := func() bool {
			ok, err := p.Rooms().Contains(ctx, "club", "c")
			require.NoError(t, err)
			return ok
		}
		for _, by := range []*mesh.PresenceManager{p, other} {
			asked.Store(0)
			w.Sleep(20 * time.Second)
			require.True(t, in(), "it has not been ended")
			require.NoError(t, p.Touch("c"))
			w.Sleep(time.Second)
			require.Zero(t, asked.Load(), "it had not ended")

			w.Sleep(20 * time.Second)
			n, err := by.CleanExpired(ctx, "club")
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.NoError(t, p.Touch("c"))
			w.Sleep(time.Second)
			assert.True(t, in())
			assert.EqualValues(t, 1, asked.Load())

			w.Sleep(20 * time.Second)
			_, err = by.CleanExpired(ctx, "club")
			require.NoError(t, err)
			banned.Store(true)
			require.NoError(t, p.Touch("c"))
			w.Sleep(time.Second)
			assert.False(t, in())
			banned.Store(false)
			require.NoError(t, p.Join(ctx, "club", "c"))
		}
	})
}

// What Redis lost had not ended: no guard is asked.
func TestARebuildAsksNoGuard(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager()
		var asked atomic.Int64
		guard := func(context.Context, mesh.Member, string) (bool, error) { return asked.Add(1) == 1, nil }
		require.NoError(t, p.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{JoinGuard: guard}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "club", "c"))
		require.NoError(t, w.Client().FlushAll(ctx).Err())
		w.Sleep(20 * time.Second)
		in, err := p.Rooms().Contains(ctx, "club", "c")
		require.NoError(t, err)
		assert.True(t, in)
		assert.EqualValues(t, 1, asked.Load())
	})
}
