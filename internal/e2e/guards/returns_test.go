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

// silentWorld starts a server with a room "club" with a join guard, and a room "hall"
// without one. Both have a TTL of a second. In real time it is five seconds, so that a
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
		// In real time, a member may have been silent for too long before its next
		// frame. Then its guard is asked about one more return.
		times := func(want int64, text string) {
			t.Helper()
			assert.GreaterOrEqual(t, asked.Load(), want, text)
			assert.True(t, !w.Virtual || asked.Load() == want, "%s: asked %d times, not %d", text, asked.Load(), want)
		}
		times(2, "once for each join")
		in := func(room string, p *harness.Peer) bool {
			ok, err := s.Rooms().Contains(t.Context(), room, p.ID)
			require.NoError(t, err)
			return ok
		}
		silence := func(p *harness.Peer) {
			p.Mute()
			w.Eventually(5*time.Second, func() bool { return !in("club", p) && !in("hall", p) }, "the member leaves by silence")
		}
		silence(good)
		require.Equal(t, "true", good.State("club", map[string]any{"n": 1}), "the member returns before its request")
		assert.True(t, in("club", good))
		assert.True(t, in("hall", good))
		times(3, "once for the return")

		silence(good)
		assert.True(t, good.Room("mesh/join-room", "club").Success)
		assert.True(t, !w.Virtual || asked.Load() <= 5, "the request may use the answer for the return")
		asked.Store(0)

		silence(bad)
		banned.Store(bad.ID, true)
		bad.Call("mesh/noop", nil)
		w.Eventually(2*time.Second, func() bool { return in("hall", bad) }, "the return to the other room")
		w.Eventually(2*time.Second, func() bool { return bad.Pushed("mesh/membership-ended") == 1 }, "the push arrives")
		assert.JSONEq(t, `{"roomName":"club"}`, string(bad.PushesOf("mesh/membership-ended")[0].Payload))
		for range 3 {
			bad.Call("mesh/noop", nil)
		}
		assert.Equal(t, "false", bad.State("club", map[string]any{"n": 1}))
		assert.False(t, in("club", bad))
		times(1, "not again at each frame")
		w.Eventually(2*time.Second, func() bool { return watcher.CountIn("club", "leave", bad.ID) == 1 }, "the leave arrives")
		assert.Equal(t, 1, watcher.CountIn("club", "join", bad.ID))
		assert.False(t, bad.Room("mesh/join-room", "club").Success)
		banned.Delete(bad.ID)
		assert.True(t, bad.Room("mesh/join-room", "club").Success)
	})
}

// A hanging guard delays neither requests about other rooms nor the reading of frames.
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
			assert.Equal(t, "false", p.State("club", map[string]any{"n": 1}), "the guard refuses")
		}()
		for range 12 { // keeps the member alive in the other room
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

// Every call that ends or makes an entry also settles a return that waits for its
// guard.
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
		"Add": {in: true, do: func(ctx context.Context, p *mesh.PresenceManager) error {
			return p.Rooms().Add(ctx, "club", "c", mesh.AddOptions{})
		}},
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
				assert.Zero(t, testhook.OpenJoins(p), "no join is left open")
			})
		})
	}
}

// If CleanExpired has ended an entry, the join guard is also asked about its return.
// These servers do not end entries themselves.
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
			require.True(t, in(), "the entry has not been ended")
			require.NoError(t, p.Touch("c"))
			w.Sleep(time.Second)
			require.Zero(t, asked.Load(), "the entry had not ended")

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

// An entry that Redis lost has not ended, so its rejoin asks no guard.
func TestARejoinAsksNoGuard(t *testing.T) {
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
