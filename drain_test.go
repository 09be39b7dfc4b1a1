package mesh

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
)

// peerEnds are when peers' connections ended, sorted.
func peerEnds(peers []*peer) (wait func() []time.Time) {
	var mu sync.Mutex
	var at []time.Time
	var all sync.WaitGroup
	for _, p := range peers {
		all.Go(func() {
			<-p.ended
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

// told checks that the server has told the peer that it restarts. In real time a
// peer that the machine did not let answer in time has been cut off.
func (p *peer) told(t *testing.T) {
	t.Helper()
	if code := p.closed(5 * time.Second); p.w.virtual {
		assert.Equal(t, websocket.CloseServiceRestart, code)
	}
}

func (s *testServer) dialAll(n int, rooms ...string) []*peer {
	s.w.t.Helper()
	peers := make([]*peer, n)
	for i := range peers {
		peers[i] = s.dial()
		for _, room := range rooms {
			peers[i].join(room)
		}
	}
	return peers
}

func TestDrainClosesEvenly(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		sockets, spread := 100, 10*time.Second
		if !w.virtual {
			sockets, spread = 40, 4*time.Second
		}
		s, other := w.tracked(), w.tracked()
		watcher := other.dial()
		watcher.subscribe("lobby")
		peers := s.dialAll(sockets, "lobby")
		w.eventually(5*time.Second, func() bool { return watcher.count("join", "") == sockets }, "all joins")
		ends := peerEnds(peers)

		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), spread))
		took := time.Since(begun)
		at := ends()
		for _, p := range peers {
			p.told(t)
		}
		w.eventually(2*time.Second, func() bool { return watcher.count("leave", "") == sockets }, "all leaves")
		w.sleep(100 * time.Millisecond)
		for _, p := range peers {
			assert.Equal(t, 1, watcher.count("leave", p.id), "one leave each")
		}
		assert.Zero(t, s.Stats().Connections)
		assert.Greater(t, took, spread*9/10)
		if w.virtual { // else it depends on how fast the machine is
			assert.LessOrEqual(t, took, spread)
			assert.LessOrEqual(t, mostWithin(at, time.Second), sockets/10+1)
			assert.LessOrEqual(t, mostWithin(at, 90*time.Millisecond), 1)
		}
	})
}

// What a server that drains goes on doing, and what not.
func TestDrainMeanwhile(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		shortLease := func(o *Options) { o.LeaseTTL = time.Second }
		s, other := w.tracked(shortLease), w.tracked(shortLease)
		ctx := t.Context()
		require.NoError(t, s.Presence().Connect(ctx, "own", nil))
		require.NoError(t, s.Presence().Join(ctx, "lobby", "own"))
		watcher := other.dial()
		watcher.subscribe("lobby")
		peers := s.dialAll(3, "lobby")
		ended := make(chan error, 1)
		app := upgrading(w, s.Server, ConnOptions{}, ctx, ended)

		seen, stopSeeing := context.WithCancel(ctx)
		events := make(chan Event, 100)
		var iterating sync.WaitGroup
		defer iterating.Wait()
		defer stopSeeing()
		iterating.Go(func() {
			for e, err := range s.Presence().Subscribe(seen, "lobby", SubscribeOptions{}) {
				if err != nil {
					return
				}
				events <- e
			}
		})
		require.Equal(t, EventSnapshot, (<-events).Type)

		drained := make(chan error, 1)
		begun := time.Now()
		go func() { drained <- s.Drain(ctx, 8*time.Second) }() // several leases
		w.eventually(time.Second, func() bool { return s.Ready(ctx) != nil }, "Ready fails at once")
		require.ErrorIs(t, s.Ready(ctx), ErrClosed)
		require.ErrorIs(t, s.Presence().Ready(ctx), ErrClosed)
		require.NoError(t, other.Ready(ctx))
		_, resp, err := s.tryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		_, _, err = app.tryDial()
		assert.Equal(t, websocket.CloseServiceRestart, closeCodeOf(err), "%v", err)
		require.ErrorIs(t, <-ended, ErrClosed)

		// The last of the sockets is served until its turn comes.
		w.eventually(8*time.Second, func() bool { return s.Stats().Connections == 2 }, "two have been closed")
		last := peers[slices.IndexFunc(peers, func(p *peer) bool {
			select {
			case <-p.ended:
				return false
			default:
				return true
			}
		})]
		assert.Equal(t, "true", last.state("lobby", map[string]any{"a": 1}))
		watcher.expect(time.Second, "state", last.id)
		// New connections of the app's own transport, too.
		require.NoError(t, s.Presence().Connect(ctx, "late", nil))
		require.NoError(t, s.Presence().Join(ctx, "lobby", "late"))
		watcher.expect(time.Second, "join", "late")
		for e := range events {
			if e.Type == EventJoin && e.ConnectionID == "late" {
				break
			}
		}

		require.NoError(t, <-drained)
		assert.Greater(t, time.Since(begun), 5*time.Second)
		w.sleep(3 * time.Second)
		assert.Zero(t, watcher.count("leave", "own"), "those are no sockets")
		assert.Zero(t, watcher.count("leave", "late"))
		st := s.Stats()
		assert.Equal(t, 2, st.Connections)
		assert.Zero(t, st.Reborn+other.Stats().Buried, "it has renewed its lease")
		stopSeeing()
		s.shutdown()
		w.eventually(w.unhurried(2*time.Second), func() bool { return watcher.count("leave", "own") == 1 && watcher.count("leave", "late") == 1 }, "Shutdown ends them")
	})
}

func TestDrainAtOnce(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const sockets = 300
		s, other := w.tracked(), w.tracked()
		watcher := other.dial()
		watcher.subscribe("lobby")
		peers := s.dialAll(sockets, "lobby")
		w.eventually(w.unhurried(5*time.Second), func() bool { return watcher.count("join", "") == sockets }, "all joins")
		before := s.Stats().Batches
		require.NoError(t, s.Drain(t.Context(), 0))
		for _, p := range peers {
			p.told(t)
		}
		w.eventually(w.unhurried(2*time.Second), func() bool { return watcher.count("leave", "") == sockets }, "all leaves")
		w.eventually(w.unhurried(2*time.Second), func() bool { return s.Stats().Unwritten == 0 }, "all is written")
		// Each bucket has batches of its own, which are smaller on a cluster.
		ops := 128
		if w.keys().Buckets() > 1 {
			ops = 32
		}
		together := 4*(2*sockets)/ops + 20 + 3*(w.keys().Buckets()-1)
		assert.LessOrEqual(t, s.Stats().Batches-before, uint64(together), "they leave together")
	})
}

// Clients come back as the stock one does: 2 s later, to another server.
func TestDrainSendsClientsToTheOthers(t *testing.T) {
	t.Parallel()
	const gap = 2 * time.Second
	everywhere(t, func(t *testing.T, w *world) {
		const sockets = 20
		s, other := w.tracked(), w.tracked()
		watcher := other.dial()
		watcher.subscribe("lobby")
		var all sync.WaitGroup
		var mu sync.Mutex
		back := map[string]string{}
		for _, p := range s.dialAll(sockets, "lobby") {
			all.Go(func() {
				<-p.ended
				w.sleep(gap)
				again := other.dial()
				again.join("lobby")
				mu.Lock()
				defer mu.Unlock()
				back[p.id] = again.id
			})
		}
		require.NoError(t, s.Drain(t.Context(), 3*time.Second))
		all.Wait()
		s.shutdown()
		w.eventually(2*time.Second, func() bool { return watcher.count("join", "") == 2*sockets && watcher.count("leave", "") == sockets }, "all are back")
		came := map[string]time.Time{}
		watcher.mu.Lock()
		defer watcher.mu.Unlock()
		for i, u := range watcher.updates {
			came[u.Type+u.ConnectionID] = watcher.times[i]
		}
		require.Len(t, back, sockets)
		for was, is := range back {
			if w.virtual {
				assert.InDelta(t, gap, came["join"+is].Sub(came["leave"+was]), float64(200*time.Millisecond))
			}
		}
	})
}

// Who does not answer the close frame, or does not even read, is cut off.
func TestDrainCutsThoseThatDoNotAnswer(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s, other := w.tracked(), w.tracked()
		watcher := other.dial()
		watcher.subscribe("lobby")
		for range 5 {
			s.raw().send(`{"id":1,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
		}
		w.eventually(time.Second, func() bool { return watcher.count("join", "") == 5 }, "joins")
		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), time.Second))
		assert.LessOrEqual(t, time.Since(begun), time.Second+2*time.Second+100*time.Millisecond)
		w.eventually(time.Second, func() bool { return watcher.count("leave", "") == 5 }, "leaves")
	})
}

func TestDrainWaitsForHooks(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		var mu sync.Mutex
		reasons := map[string]error{}
		s.OnDisconnection(func(ctx context.Context, c *Connection, reason error) {
			w.sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			reasons[c.ID()] = reason
		})
		ended := make(chan error, 10)
		app := upgrading(w, s.Server, ConnOptions{}, t.Context(), ended)
		peers := append(s.dialAll(3), app.dialAll(3)...)
		require.NoError(t, s.Drain(t.Context(), time.Second))
		mu.Lock()
		defer mu.Unlock()
		for _, p := range peers {
			require.ErrorIs(t, reasons[p.id], ErrClosed)
			assert.ErrorContains(t, reasons[p.id], "1012")
		}
		require.Len(t, ended, 3, "ServeConn has returned")
		assert.ErrorContains(t, <-ended, "1012")
	})
}
