package mesh_test

import (
	"context"
	"net/http"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// peerEnds are when peers' connections ended, sorted.
func peerEnds(peers []*harness.Peer) (wait func() []time.Time) {
	var mu sync.Mutex
	var at []time.Time
	var all sync.WaitGroup
	for _, p := range peers {
		all.Go(func() {
			<-p.Ended
			mu.Lock()
			defer mu.Unlock()
			at = append(at, time.Now())
		})
	}
	return func() []time.Time {
		all.Wait()
		slices.SortFunc(at, time.Time.Compare)
		return at
	}
}

// mostWithin returns how many of the times lie within d of each other, at most.
func mostWithin(at []time.Time, d time.Duration) int {
	most := 0
	for i, from := range at {
		n := 0
		for _, t := range at[i:] {
			if t.Sub(from) < d {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}

func TestDrainClosesEvenly(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		sockets, spread := 100, 10*time.Second
		if !w.Virtual {
			sockets, spread = 40, 4*time.Second
		}
		s, other := w.Tracked(), w.Tracked()
		watcher := other.Dial()
		watcher.Subscribe("lobby")
		peers := s.DialAll(sockets, "lobby")
		w.Eventually(5*time.Second, func() bool { return watcher.Count("join", "") == sockets }, "all joins")
		ends := peerEnds(peers)

		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), spread))
		took := time.Since(begun)
		at := ends()
		for _, p := range peers {
			p.Told(t)
		}
		w.Eventually(2*time.Second, func() bool { return watcher.Count("leave", "") == sockets }, "all leaves")
		w.Sleep(100 * time.Millisecond)
		for _, p := range peers {
			assert.Equal(t, 1, watcher.Count("leave", p.ID), "one leave each")
		}
		assert.Zero(t, s.Stats().Connections)
		assert.Greater(t, took, spread*9/10)
		if w.Virtual { // else it depends on how fast the machine is
			assert.LessOrEqual(t, took, spread)
			assert.LessOrEqual(t, mostWithin(at, time.Second), sockets/10+1)
			assert.LessOrEqual(t, mostWithin(at, 90*time.Millisecond), 1)
		}
	})
}

// What a server that drains goes on doing, and what not.
func TestDrainMeanwhile(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		shortLease := func(o *mesh.Options) { o.LeaseTTL = time.Second }
		s, other := w.Tracked(shortLease), w.Tracked(shortLease)
		ctx := t.Context()
		require.NoError(t, s.Presence().Connect(ctx, "own", nil))
		require.NoError(t, s.Presence().Join(ctx, "lobby", "own"))
		watcher := other.Dial()
		watcher.Subscribe("lobby")
		peers := s.DialAll(3, "lobby")
		ended := make(chan error, 1)
		app := harness.Upgrading(w, s.Server, mesh.ConnOptions{}, ctx, ended)

		seen, stopSeeing := context.WithCancel(ctx)
		events := make(chan mesh.Event, 100)
		var iterating sync.WaitGroup
		defer iterating.Wait()
		defer stopSeeing()
		iterating.Go(func() {
			for e, err := range s.Presence().Subscribe(seen, "lobby", mesh.SubscribeOptions{}) {
				if err != nil {
					return
				}
				events <- e
			}
		})
		require.Equal(t, mesh.EventSnapshot, (<-events).Type)

		drained := make(chan error, 1)
		begun := time.Now()
		go func() { drained <- s.Drain(ctx, 8*time.Second) }() // several leases
		w.Eventually(time.Second, func() bool { return s.Ready(ctx) != nil }, "Ready fails at once")
		require.ErrorIs(t, s.Ready(ctx), mesh.ErrClosed)
		require.ErrorIs(t, s.Presence().Ready(ctx), mesh.ErrClosed)
		require.NoError(t, other.Ready(ctx))
		_, resp, err := s.TryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		_, _, err = app.TryDial()
		assert.Equal(t, websocket.CloseServiceRestart, harness.CloseCodeOf(err), "%v", err)
		require.ErrorIs(t, <-ended, mesh.ErrClosed)

		// The last of the sockets is served until its turn comes.
		w.Eventually(8*time.Second, func() bool { return s.Stats().Connections == 2 }, "two have been closed")
		last := peers[slices.IndexFunc(peers, func(p *harness.Peer) bool {
			select {
			case <-p.Ended:
				return false
			default:
				return true
			}
		})]
		assert.Equal(t, "true", last.State("lobby", map[string]any{"a": 1}))
		watcher.Expect(time.Second, "state", last.ID)
		// New connections of the app's own transport, too.
		require.NoError(t, s.Presence().Connect(ctx, "late", nil))
		require.NoError(t, s.Presence().Join(ctx, "lobby", "late"))
		watcher.Expect(time.Second, "join", "late")
		for e := range events {
			if e.Type == mesh.EventJoin && e.ConnectionID == "late" {
				break
			}
		}

		require.NoError(t, <-drained)
		assert.Greater(t, time.Since(begun), 5*time.Second)
		w.Sleep(3 * time.Second)
		assert.Zero(t, watcher.Count("leave", "own"), "those are no sockets")
		assert.Zero(t, watcher.Count("leave", "late"))
		st := s.Stats()
		assert.Equal(t, 2, st.Connections)
		assert.Zero(t, st.Reregistered+other.Stats().ServersDeclaredDead, "it has renewed its lease")
		stopSeeing()
		s.End()
		w.Eventually(2*time.Second, func() bool { return watcher.Count("leave", "own") == 1 && watcher.Count("leave", "late") == 1 }, "Shutdown ends them")
	})
}

func TestDrainAtOnce(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const sockets = 300
		s, other := w.Tracked(slowWrites(time.Millisecond)), w.Tracked()
		watcher := other.Dial()
		watcher.Subscribe("lobby")
		peers := s.DialAll(sockets, "lobby")
		w.Eventually(5*time.Second, func() bool { return watcher.Count("join", "") == sockets }, "all joins")
		before := s.Stats().Batches
		require.NoError(t, s.Drain(t.Context(), 0))
		for _, p := range peers {
			p.Told(t)
		}
		w.Eventually(2*time.Second, func() bool { return watcher.Count("leave", "") == sockets }, "all leaves")
		w.Eventually(2*time.Second, func() bool { return s.Stats().Unwritten == 0 }, "all is written")
		w.LeftTogether(s.Stats().Batches-before, 2*sockets)
	})
}

// Clients come back as the stock one does: 2 s later, to another server.
func TestDrainSendsClientsToTheOthers(t *testing.T) {
	t.Parallel()
	const gap = 2 * time.Second
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const sockets = 20
		s, other := w.Tracked(), w.Tracked()
		watcher := other.Dial()
		watcher.Subscribe("lobby")
		var all sync.WaitGroup
		var mu sync.Mutex
		back := map[string]string{}
		for _, p := range s.DialAll(sockets, "lobby") {
			all.Go(func() {
				<-p.Ended
				w.Sleep(gap)
				again := other.Dial()
				again.Join("lobby")
				mu.Lock()
				defer mu.Unlock()
				back[p.ID] = again.ID
			})
		}
		require.NoError(t, s.Drain(t.Context(), 3*time.Second))
		all.Wait()
		s.End()
		w.Eventually(2*time.Second, func() bool { return watcher.Count("join", "") == 2*sockets && watcher.Count("leave", "") == sockets }, "all are back")
		came := map[string]time.Time{}
		watcher.Mu.Lock()
		defer watcher.Mu.Unlock()
		for i, u := range watcher.Updates {
			came[u.Type+u.ConnectionID] = watcher.Times[i]
		}
		require.Len(t, back, sockets)
		for was, is := range back {
			if w.Virtual {
				assert.InDelta(t, gap, came["join"+is].Sub(came["leave"+was]), float64(200*time.Millisecond))
			}
		}
	})
}

// Who does not answer the close frame, or does not even read, is cut off.
func TestDrainCutsThoseThatDoNotAnswer(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, other := w.Tracked(), w.Tracked()
		watcher := other.Dial()
		watcher.Subscribe("lobby")
		for range 5 {
			s.Raw().Send(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
		}
		w.Eventually(time.Second, func() bool { return watcher.Count("join", "") == 5 }, "joins")
		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), time.Second))
		assert.LessOrEqual(t, time.Since(begun), time.Second+2*time.Second+100*time.Millisecond)
		w.Eventually(time.Second, func() bool { return watcher.Count("leave", "") == 5 }, "leaves")
	})
}

func TestDrainWaitsForHooks(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var mu sync.Mutex
		reasons := map[string]error{}
		s.OnDisconnection(func(ctx context.Context, c *mesh.Connection, reason error) {
			w.Sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			reasons[c.ID()] = reason
		})
		ended := make(chan error, 10)
		app := harness.Upgrading(w, s.Server, mesh.ConnOptions{}, t.Context(), ended)
		peers := append(s.DialAll(3), app.DialAll(3)...)
		require.NoError(t, s.Drain(t.Context(), time.Second))
		mu.Lock()
		defer mu.Unlock()
		for _, p := range peers {
			require.ErrorIs(t, reasons[p.ID], mesh.ErrClosed)
			assert.ErrorContains(t, reasons[p.ID], "1012")
		}
		require.Len(t, ended, 3, "ServeConn has returned")
		assert.ErrorContains(t, <-ended, "1012")
	})
}
