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

// silentWorld is a server whose room "club" has a join guard and whose room
// "hall" has none, both with a TTL of a second.
func silentWorld(w *world, setup ...func(*Options)) (s *testServer, banned *sync.Map, asked *atomic.Int64) {
	s = w.server(append(setup, noCommandLimit)...)
	banned, asked = new(sync.Map), new(atomic.Int64)
	s.track("^club$", PresenceOptions{TTL: time.Second, JoinGuard: func(ctx context.Context, m Member, _ string) (bool, error) {
		asked.Add(1)
		how, out := banned.Load(m.ID)
		if how == "hangs" {
			<-ctx.Done()
			return true, nil
		}
		return !out, nil
	}})
	s.track("^hall$", PresenceOptions{TTL: time.Second})
	return s, banned, asked
}

func TestASilentMemberIsAskedAbout(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s, banned, asked := silentWorld(w)
		watcher, good, bad := s.dial(), s.dial(), s.dial()
		for _, room := range []string{"club", "hall"} {
			watcher.subscribe(room)
			good.join(room)
			bad.join(room)
		}
		require.EqualValues(t, 2, asked.Load())
		in := func(room string, p *peer) bool {
			ok, err := s.Rooms().Contains(t.Context(), room, p.id)
			require.NoError(t, err)
			return ok
		}
		gone := func(p *peer) {
			p.mute()
			w.eventually(5*time.Second, func() bool { return !in("club", p) && !in("hall", p) }, "it leaves by silence")
		}
		gone(good)
		require.Equal(t, "true", good.state("club", map[string]any{"n": 1}), "it is in again before its request")
		assert.True(t, in("club", good))
		assert.True(t, in("hall", good))
		assert.EqualValues(t, 3, asked.Load(), "once for the return")

		gone(good)
		assert.True(t, good.room("mesh/join-room", "club").Success)
		assert.LessOrEqual(t, asked.Load(), int64(5), "the request may have its answer from the return")
		asked.Store(0)

		gone(bad)
		banned.Store(bad.id, true)
		bad.call("mesh/noop", nil)
		w.eventually(2*time.Second, func() bool { return in("hall", bad) }, "the other room")
		w.eventually(2*time.Second, func() bool { return bad.pushed("mesh/membership-ended") == 1 }, "the push")
		assert.JSONEq(t, `{"roomName":"club"}`, string(bad.pushesOf("mesh/membership-ended")[0].Payload))
		for range 3 {
			bad.call("mesh/noop", nil)
		}
		assert.Equal(t, "false", bad.state("club", map[string]any{"n": 1}))
		assert.False(t, in("club", bad))
		assert.EqualValues(t, 1, asked.Load(), "not again at each frame")
		w.eventually(w.unhurried(2*time.Second), func() bool { return watcher.countIn("club", "leave", bad.id) == 1 }, "its leave")
		assert.Equal(t, 1, watcher.countIn("club", "join", bad.id))
		assert.False(t, bad.room("mesh/join-room", "club").Success)
		banned.Delete(bad.id)
		assert.True(t, bad.room("mesh/join-room", "club").Success)
	})
}

// A guard that hangs holds up neither the other rooms nor the reader.
func TestAHangingJoinGuardAfterASilence(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s, banned, _ := silentWorld(w)
		p := s.dial()
		p.join("club")
		p.join("hall")
		p.mute()
		w.sleep(3 * time.Second)
		banned.Store(p.id, "hangs")
		began := time.Now()
		assert.Equal(t, "true", p.state("hall", map[string]any{"n": 1}))
		assert.Zero(t, time.Since(began))
		done := make(chan struct{})
		go func() {
			defer close(done)
			assert.Equal(t, "false", p.state("club", map[string]any{"n": 1}), "the answer is the guard's")
		}()
		for range 12 { // stays alive in the other room
			w.sleep(500 * time.Millisecond)
			require.NoError(t, p.send(map[string]any{"command": "pong"}))
		}
		<-done
		in, err := s.Rooms().Contains(t.Context(), "hall", p.id)
		require.NoError(t, err)
		assert.True(t, in)
		assert.Equal(t, 1, p.pushed("mesh/membership-ended"))
	})
}

// Every way out settles a return that waits, and every way in.
func TestAReturnInFlight(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		do func(ctx context.Context, p *PresenceManager) error
		in bool
	}{
		"nothing": {in: true, do: func(context.Context, *PresenceManager) error { return nil }},
		"Leave":   {do: func(ctx context.Context, p *PresenceManager) error { _, err := p.Leave(ctx, "club", "c"); return err }},
		"Remove": {do: func(ctx context.Context, p *PresenceManager) error {
			_, err := p.Rooms().Remove(ctx, "club", "c")
			return err
		}},
		"Clear": {do: func(ctx context.Context, p *PresenceManager) error { return p.Rooms().Clear(ctx, "club") }},
		"a new ban": {do: func(ctx context.Context, p *PresenceManager) error {
			return p.Connections().SetMetadata(ctx, "c", "banned", MetadataOptions{})
		}},
		"Disconnect": {do: func(ctx context.Context, p *PresenceManager) error { return p.Disconnect(ctx, "c") }},
		"Add":        {in: true, do: func(ctx context.Context, p *PresenceManager) error { return p.Rooms().Add(ctx, "club", "c") }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				ctx := t.Context()
				p := w.manager()
				require.NoError(t, p.TrackPresence(Exact("club"), PresenceOptions{TTL: 2 * time.Second, JoinGuard: notBanned}))
				require.NoError(t, p.Connect(ctx, "c", nil))
				require.NoError(t, p.Join(ctx, "club", "c"))
				w.sleep(4 * time.Second)
				require.NoError(t, p.Touch("c"))
				w.sleep(100 * time.Millisecond)
				require.NoError(t, c.do(ctx, p))
				w.sleep(time.Second)
				in, err := p.Rooms().Contains(ctx, "club", "c")
				require.NoError(t, err)
				assert.Equal(t, c.in, in)
				assert.Empty(t, p.n.joins.open, "nothing is left behind")
			})
		})
	}
}

// An entry that another server may have ended because its TTL had passed is asked about,
// too, on a server that does not end entries itself.
func TestAReturnAfterCleanExpired(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		off := false
		p, other := w.manager(func(o *Options) { o.EnablePresenceExpirationEvents = &off }), w.manager(func(o *Options) { o.EnablePresenceExpirationEvents = &off })
		var banned atomic.Bool
		var asked atomic.Int64
		guard := func(context.Context, Member, string) (bool, error) { asked.Add(1); return !banned.Load(), nil }
		require.NoError(t, p.TrackPresence(Exact("club"), PresenceOptions{TTL: 2 * time.Second, JoinGuard: guard}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "club", "c"))
		in := func() bool {
			ok, err := p.Rooms().Contains(ctx, "club", "c")
			require.NoError(t, err)
			return ok
		}
		for _, by := range []*PresenceManager{p, other} {
			asked.Store(0)
			w.sleep(20 * time.Second)
			require.True(t, in(), "it has not been ended")
			require.NoError(t, p.Touch("c"))
			w.sleep(time.Second)
			require.Zero(t, asked.Load(), "it had not ended")

			w.sleep(20 * time.Second)
			n, err := by.CleanExpired(ctx, "club")
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.NoError(t, p.Touch("c"))
			w.sleep(time.Second)
			assert.True(t, in())
			assert.EqualValues(t, 1, asked.Load())

			w.sleep(20 * time.Second)
			_, err = by.CleanExpired(ctx, "club")
			require.NoError(t, err)
			banned.Store(true)
			require.NoError(t, p.Touch("c"))
			w.sleep(time.Second)
			assert.False(t, in())
			banned.Store(false)
			require.NoError(t, p.Join(ctx, "club", "c"))
		}
	})
}

// What Redis lost had not ended: no guard is asked.
func TestARebuildAsksNoGuard(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		p := w.manager()
		var asked atomic.Int64
		guard := func(context.Context, Member, string) (bool, error) { return asked.Add(1) == 1, nil }
		require.NoError(t, p.TrackPresence(Exact("club"), PresenceOptions{JoinGuard: guard}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "club", "c"))
		require.NoError(t, w.client().FlushAll(ctx).Err())
		w.sleep(20 * time.Second)
		in, err := p.Rooms().Contains(ctx, "club", "c")
		require.NoError(t, err)
		assert.True(t, in)
		assert.EqualValues(t, 1, asked.Load())
	})
}

func (p *peer) countIn(room, kind, conn string) int {
	n := 0
	for _, u := range p.got() {
		if u.RoomName == room && u.Type == kind && u.ConnectionID == conn {
			n++
		}
	}
	return n
}
