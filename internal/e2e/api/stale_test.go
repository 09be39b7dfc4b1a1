package api

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// stalePushes returns the payloads of a peer's pushes about stale rooms.
func stalePushes(p *harness.Peer) (list []string) {
	for _, f := range p.PushesOf("mesh/presence-stale") {
		list = append(list, string(f.Payload))
	}
	return list
}

const (
	isStale   = `{"stale":true}`
	recovered = `{"stale":false}`
)

// TestSubscribersAreToldThatRedisIsAway checks that a socket with subscriptions gets one
// push when its server has no Redis, and one when it has it back.
func TestSubscribersAreToldThatRedisIsAway(t *testing.T) {
	t.Parallel()
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		two, one, late, none := s.Dial(), s.Dial(), s.Dial(), s.Dial()
		two.Subscribe("a")
		two.Subscribe("b")
		one.Subscribe("a")
		none.Join("a")
		w.Away()
		for _, p := range []*harness.Peer{two, one} {
			w.Eventually(20*time.Second, func() bool { return len(stalePushes(p)) == 1 }, "told")
		}
		require.True(t, late.Subscribe("a").Stale, "told by the answer")
		w.Sleep(3 * time.Second)
		for _, p := range []*harness.Peer{two, one} {
			require.Equal(t, []string{isStale}, stalePushes(p), "once")
		}
		require.Empty(t, stalePushes(late))
		w.Back()
		for _, p := range []*harness.Peer{two, one, late} {
			w.Eventually(30*time.Second, func() bool {
				got := stalePushes(p)
				return len(got) > 0 && got[len(got)-1] == recovered
			}, "recovered")
		}
		w.Sleep(5 * time.Second)
		for _, p := range []*harness.Peer{two, one} {
			require.Equal(t, []string{isStale, recovered}, stalePushes(p))
		}
		require.Equal(t, []string{recovered}, stalePushes(late))
		require.Empty(t, stalePushes(none), "it has no subscription")
		require.False(t, one.Subscribe("a").Stale)
		require.False(t, late.Subscribe("a").Stale)
	})
}

// TestRecoveryComesAfterTheRepairs checks that the client knows everything when it is told
// of the recovery.
func TestRecoveryComesAfterTheRepairs(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		watcher, a, b := s1.Dial(), s2.Dial(), s2.Dial()
		a.Join("lobby")
		watcher.Subscribe("lobby")
		for range 2 {
			before := len(stalePushes(watcher))
			w.Mem.Cut()
			w.Eventually(10*time.Second, func() bool { return len(stalePushes(watcher)) == before+1 }, "told")
			require.Equal(t, isStale, stalePushes(watcher)[before])
			b.Join("lobby")
			w.Mem.Heal()
			w.Eventually(30*time.Second, func() bool { return len(stalePushes(watcher)) == before+2 }, "recovered")
			require.Equal(t, recovered, stalePushes(watcher)[before+1])
			w.Eventually(20*time.Second, func() bool { return watcher.Count("join", b.ID) > 0 }, "the join, when its server is back, too")
		}
		w.Sleep(time.Minute)
		require.Len(t, stalePushes(watcher), 4)
		require.Zero(t, watcher.Count("leave", ""))
	})
}

// A short interruption is not worth a push.
func TestShortInterruptionsAreNotTold(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		p := s.Dial()
		p.Subscribe("lobby")
		for range 5 {
			w.Mem.CutOnce() // the connections, which are dialled again at once
			w.Sleep(5 * time.Second)
		}
		require.Empty(t, stalePushes(p))
		require.False(t, p.Subscribe("lobby").Stale)
	})
}

// A client that unsubscribes or ends while rooms are stale leaves nothing behind.
func TestClientsGoWhileRoomsAreStale(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		p, q := s.Dial(), s.Dial()
		p.Subscribe("lobby")
		q.Subscribe("lobby")
		w.Mem.Cut()
		w.Eventually(10*time.Second, func() bool { return len(stalePushes(p)) == 1 && len(stalePushes(q)) == 1 }, "told")
		require.Equal(t, "true", string(p.Call("mesh/unsubscribe-presence", map[string]any{"roomName": "lobby"})))
		q.Close()
		w.Eventually(time.Second, func() bool { return len(stalePushes(p)) == 2 }, "none of its rooms is stale")
		require.Equal(t, recovered, stalePushes(p)[1])
		w.Mem.Heal()
		w.Sleep(20 * time.Second)
		require.Len(t, stalePushes(p), 2)
	})
}
