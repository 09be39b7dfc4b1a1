package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// peerEnds begins to record the times at which connections end. wait waits for all of
// them and returns the times, sorted.
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

// mostWithin returns the largest number of times that lie within d of each other.
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
			assert.Equal(t, 1, watcher.Count("leave", p.ID), "one leave per connection")
		}
		assert.Zero(t, s.Stats().Connections)
		assert.Greater(t, took, spread*9/10)
		if w.Virtual { // in real time it depends on the machine
			assert.LessOrEqual(t, took, spread)
			assert.LessOrEqual(t, mostWithin(at, time.Second), sockets/10+1)
			assert.LessOrEqual(t, mostWithin(at, 90*time.Millisecond), 1)
		}
	})
}

// TestUseWhileDraining checks that a draining server refuses new WebSockets, and still
// serves the open ones, connections of the app's own transport and subscriptions.
func TestUseWhileDraining(t *testing.T) {
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

		subscribed, unsubscribe := context.WithCancel(ctx)
		events := make(chan mesh.Event, 100)
		var iterating sync.WaitGroup
		defer iterating.Wait()
		defer unsubscribe()
		iterating.Go(func() {
			for e, err := range s.Presence().Subscribe(subscribed, "lobby", mesh.SubscribeOptions{}) {
				if err != nil {
					return
				}
				events <- e
			}
		})
		require.Equal(t, mesh.EventSnapshot, (<-events).Type)

		drained := make(chan error, 1)
		begun := time.Now()
		go func() { drained <- s.Drain(ctx, 8*time.Second) }() // lasts several leases
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

		// The last socket is served until it is closed.
		w.Eventually(8*time.Second, func() bool { return s.Stats().Connections == 2 }, "two sockets have been closed")
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
		// Connections of the app's own transport are still accepted.
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
		assert.Zero(t, watcher.Count("leave", "own"), "Drain only closes sockets")
		assert.Zero(t, watcher.Count("leave", "late"))
		st := s.Stats()
		assert.Equal(t, 2, st.Connections)
		assert.Zero(t, st.Reregistered+other.Stats().ServersDeclaredDead, "the server renewed its lease")
		unsubscribe()
		s.End()
		w.Eventually(2*time.Second, func() bool { return watcher.Count("leave", "own") == 1 && watcher.Count("leave", "late") == 1 }, "Shutdown ends the other connections")
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
		w.Eventually(2*time.Second, func() bool { return s.Stats().Unwritten == 0 }, "all changes are written")
		w.LeftTogether(s.Stats().Batches-before, 2*sockets)
	})
}

// TestDrainSendsClientsToOtherServers lets clients reconnect to another server after
// 2 s, as stock clients do.
func TestDrainSendsClientsToOtherServers(t *testing.T) {
	t.Parallel()
	const gap = 2 * time.Second
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const sockets = 20
		s, other := w.Tracked(), w.Tracked()
		watcher := other.Dial()
		watcher.Subscribe("lobby")
		var all sync.WaitGroup
		var mu sync.Mutex
		newIDs := map[string]string{} // by the id of the first connection
		for _, p := range s.DialAll(sockets, "lobby") {
			all.Go(func() {
				<-p.Ended
				w.Sleep(gap)
				again := other.Dial()
				again.Join("lobby")
				mu.Lock()
				defer mu.Unlock()
				newIDs[p.ID] = again.ID
			})
		}
		require.NoError(t, s.Drain(t.Context(), 3*time.Second))
		all.Wait()
		s.End()
		w.Eventually(2*time.Second, func() bool { return watcher.Count("join", "") == 2*sockets && watcher.Count("leave", "") == sockets }, "all clients have rejoined")
		received := map[string]time.Time{}
		watcher.Mu.Lock()
		defer watcher.Mu.Unlock()
		for i, u := range watcher.Updates {
			received[u.Type+u.ConnectionID] = watcher.Times[i]
		}
		require.Len(t, newIDs, sockets)
		for oldID, newID := range newIDs {
			if w.Virtual {
				assert.InDelta(t, gap, received["join"+newID].Sub(received["leave"+oldID]), float64(200*time.Millisecond))
			}
		}
	})
}

// TestDrainCutsUnresponsiveClients checks that clients that do not answer the close
// frame are cut off after two seconds.
func TestDrainCutsUnresponsiveClients(t *testing.T) {
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

func TestInvalidDrains(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		fresh, err := mesh.NewServer(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.ErrorIs(t, fresh.Drain(ctx, 0), mesh.ErrNotStarted)
		require.ErrorIs(t, fresh.Ready(ctx), mesh.ErrNotStarted)
		require.NoError(t, fresh.Start(ctx), "a failed Drain changes nothing")
		require.ErrorIs(t, fresh.Drain(ctx, -1), mesh.ErrInvalidOptions)
		require.NoError(t, fresh.Ready(ctx), "a failed Drain changes nothing")
		require.NoError(t, fresh.Drain(ctx, time.Hour), "there is no socket to wait for")
		require.NoError(t, fresh.Drain(ctx, time.Hour), "a second Drain")
		require.ErrorIs(t, fresh.Ready(ctx), mesh.ErrClosed)
		require.NoError(t, fresh.Shutdown(ctx))
		require.ErrorIs(t, fresh.Drain(ctx, 0), mesh.ErrClosed)

		neverStarted, err := mesh.NewServer(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.NoError(t, neverStarted.Shutdown(ctx))
		require.ErrorIs(t, neverStarted.Drain(ctx, 0), mesh.ErrClosed)
		require.ErrorIs(t, neverStarted.Ready(ctx), mesh.ErrClosed)
	})
}

// TestDrainStopsWithItsContext checks that the remaining connections stay open after
// the context of Drain has ended, until Drain is called again.
func TestDrainStopsWithItsContext(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		peers := s.DialAll(10)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err := s.Drain(ctx, 10*time.Second)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.ErrorContains(t, err, "5 connections")
		w.Sleep(time.Minute)
		assert.Equal(t, 5, s.Stats().Connections)
		require.ErrorIs(t, s.Drain(ctx, 0), context.DeadlineExceeded, "the context has ended already")
		for _, p := range peers {
			select {
			case <-p.Ended:
			default:
				assert.Equal(t, "true", string(p.Call("mesh/noop", nil)))
			}
		}
		assert.Equal(t, 5, s.Stats().Connections)
		require.ErrorIs(t, s.Ready(t.Context()), mesh.ErrClosed, "a started drain cannot be undone")
		ends := peerEnds(peers)
		begun := time.Now()
		require.NoError(t, s.Drain(t.Context(), 10*time.Second))
		assert.InDelta(t, 8300*time.Millisecond, time.Since(begun), float64(100*time.Millisecond))
		assert.LessOrEqual(t, mostWithin(ends()[5:], 1600*time.Millisecond), 1, "the rest is spread evenly too")
	})
}

func TestDrainSeveralTimes(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		ends := peerEnds(s.DialAll(100))
		begun := time.Now()
		var all sync.WaitGroup
		for i := range 5 { // these do not change the pace
			all.Go(func() {
				w.Sleep(time.Duration(i) * 13 * time.Millisecond)
				assert.NoError(t, s.Drain(t.Context(), 10*time.Second))
			})
		}
		short, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		all.Go(func() { assert.ErrorIs(t, s.Drain(short, 9*time.Second), context.DeadlineExceeded) })
		w.Sleep(5 * time.Second)
		left := s.Stats().Connections
		assert.InDelta(t, 49, left, 3)
		require.NoError(t, s.Drain(t.Context(), time.Second), "a shorter drain is faster")
		assert.LessOrEqual(t, time.Since(begun), 6*time.Second)
		all.Wait()
		at := ends()
		assert.LessOrEqual(t, time.Since(begun), 6*time.Second, "the other calls have returned too")
		assert.LessOrEqual(t, mostWithin(at[:100-left], time.Second), 13, "simultaneous drains do not add up")
		assert.LessOrEqual(t, mostWithin(at[100-left:], 100*time.Millisecond), left/10+2)
	})
}

func TestDrainThenShutdown(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		peers := s.DialAll(20, "lobby")
		drained := make(chan error, 2)
		for range 2 {
			go func() { drained <- s.Drain(t.Context(), time.Hour) }()
		}
		w.Eventually(time.Second, func() bool { return s.Ready(t.Context()) != nil }, "the drain begins")
		begun := time.Now()
		s.End()
		for range 2 {
			require.ErrorIs(t, <-drained, mesh.ErrClosed)
		}
		for _, p := range peers {
			p.Told(t)
		}
		assert.Less(t, time.Since(begun), w.Unhurried(10*time.Second), "Shutdown does not wait for the drain")
	})
}

// TestShutdownEndsDrainPromptly checks that Drain returns as soon as Shutdown begins,
// although Shutdown waits for a client that does not answer the close frame.
func TestShutdownEndsDrainPromptly(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		s.Raw() // does not answer the close frame
		drained := make(chan time.Time, 1)
		go func() {
			assert.ErrorIs(t, s.Drain(t.Context(), time.Hour), mesh.ErrClosed)
			drained <- time.Now()
		}()
		w.Sleep(5 * time.Second)
		begun := time.Now()
		s.End()
		assert.Greater(t, time.Since(begun), 900*time.Millisecond)
		assert.Zero(t, (<-drained).Sub(begun))
	})
}

// TestDrainWhileUpgrading checks that a connection that is being upgraded when the
// drain begins is refused.
func TestDrainWhileUpgrading(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		asked, answer := make(chan struct{}), make(chan struct{})
		s := w.Tracked(func(o *mesh.Options) {
			o.Authenticate = func(context.Context, *http.Request) (any, error) {
				close(asked)
				<-answer
				return nil, nil
			}
		})
		refused := make(chan *http.Response, 1)
		go func() {
			_, resp, err := s.TryDial()
			assert.Error(t, err)
			refused <- resp
		}()
		<-asked
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(t.Context(), 0) }()
		w.Sleep(time.Second)
		require.Empty(t, drained, "Drain waits for the upgrade")
		close(answer)
		assert.Equal(t, http.StatusServiceUnavailable, (<-refused).StatusCode)
		require.NoError(t, <-drained)
	})
}

// TestDrainWhileSocketsEndByThemselves checks that the remaining sockets are closed
// evenly, and not faster, if some sockets end by themselves.
func TestDrainWhileSocketsEndByThemselves(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		peers := s.DialAll(100)
		drained := make(chan error, 1)
		begun := time.Now()
		go func() { drained <- s.Drain(t.Context(), 10*time.Second) }()
		w.Sleep(2 * time.Second)
		var open []*harness.Peer
		for _, p := range peers {
			select {
			case <-p.Ended:
			default:
				open = append(open, p)
			}
		}
		for _, p := range open[:len(open)/2] {
			p.Close()
		}
		ends := peerEnds(open[len(open)/2:])
		require.NoError(t, <-drained)
		assert.InDelta(t, 10*time.Second, time.Since(begun), float64(300*time.Millisecond))
		at := ends()
		assert.LessOrEqual(t, mostWithin(at, time.Second), 6, "about 40 sockets in 8 s")
		assert.LessOrEqual(t, mostWithin(at, 190*time.Millisecond), 1)
	})
}

// TestDrainDuringCommands checks that a running command handler is cancelled when its
// connection is closed, and not before.
func TestDrainDuringCommands(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var mu sync.Mutex
		ended := map[string]error{}
		require.NoError(t, s.HandleCommand("work", func(ctx context.Context, c *mesh.Connection, _ json.RawMessage) (any, error) {
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				ended[c.ID()] = ctx.Err()
			}()
			select {
			case <-time.After(5500 * time.Millisecond):
				return "done", nil
			case <-ctx.Done():
				return nil, errors.New("too late")
			}
		}))
		peers := s.DialAll(10)
		var answered sync.WaitGroup
		done := map[string]bool{}
		for _, p := range peers {
			answered.Go(func() {
				answer, err := p.TryCall("work", nil)
				mu.Lock()
				defer mu.Unlock()
				done[p.ID] = err == nil && string(answer) == `"done"`
			})
		}
		require.NoError(t, s.Drain(t.Context(), 10*time.Second))
		answered.Wait()
		n := 0
		mu.Lock()
		defer mu.Unlock()
		for _, p := range peers {
			if done[p.ID] {
				n++
				assert.NoError(t, ended[p.ID])
			} else {
				assert.ErrorIs(t, ended[p.ID], context.Canceled)
			}
		}
		assert.InDelta(t, 4, n, 1)
	})
}

func TestShutdownWithoutStart(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		srv, err := mesh.NewServer(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.NoError(t, srv.Shutdown(t.Context()))
		require.ErrorIs(t, srv.Start(t.Context()), mesh.ErrClosed)
	})
}

func TestShutdown(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const sockets, others = 20, 300
		s1, s2 := w.Tracked(slowWrites(time.Millisecond)), w.Tracked()
		ctx := t.Context()
		watcher := s2.Dial()
		watcher.Subscribe("lobby")
		var peers []*harness.Peer
		for range sockets {
			p := s1.Dial()
			p.Join("lobby")
			p.Subscribe("lobby")
			peers = append(peers, p)
		}
		var joined sync.WaitGroup
		for i := range others {
			joined.Go(func() {
				id := fmt.Sprintf("c%d", i)
				assert.NoError(t, s1.Presence().Connect(ctx, id, nil))
				// On a busy machine Redis may have the join only after the call has ended.
				if err := s1.Presence().Join(ctx, "lobby", id); !errors.Is(err, mesh.ErrUnavailable) {
					assert.NoError(t, err)
				}
			})
		}
		joined.Wait()
		// Wait until the peers have received all joins too, so that their queues are
		// short. Other tests cover long queues.
		w.Eventually(30*time.Second, func() bool {
			last := watcher.Got()
			for _, p := range peers {
				got := p.Got()
				if len(last) < sockets+others || len(got) == 0 || got[len(got)-1].Seq < last[len(last)-1].Seq {
					return false
				}
			}
			return watcher.Count("join", "") == sockets+others
		}, "all joins")
		before := s1.Stats().Batches

		begun := time.Now()
		var ends sync.WaitGroup
		for range 3 {
			ends.Go(func() { assert.NoError(t, s1.Shutdown(ctx)) })
		}
		ends.Wait()
		assert.Less(t, time.Since(begun), w.Unhurried(3*time.Second))
		for _, p := range peers {
			assert.Equal(t, websocket.CloseServiceRestart, p.Closed(time.Second))
			assert.Zero(t, p.Pushed("mesh/presence-ended"))
		}
		w.Eventually(2*time.Second, func() bool { return watcher.Count("leave", "") == sockets+others }, "all leaves, without waiting for the lease to run out")
		for _, u := range watcher.Got() {
			assert.False(t, u.Repair, "%s", u)
		}
		w.LeftTogether(s1.Stats().Batches-before, sockets+2*others)

		_, resp, err := s1.TryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		require.ErrorIs(t, s1.Presence().Join(ctx, "lobby", "c1"), mesh.ErrClosed)
		require.ErrorIs(t, s1.Rooms().Clear(ctx, "lobby"), mesh.ErrClosed)
		for _, err := range s1.Presence().Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
			require.ErrorIs(t, err, mesh.ErrClosed)
		}
		ids, err := s2.Rooms().ConnectionIDs(ctx, "lobby")
		require.NoError(t, err)
		assert.Empty(t, ids)
		// The remaining keys belong to the other server or have a TTL.
		c := w.Client()
		names := w.Keys()
		for _, k := range w.InStore() {
			ttl, err := c.TTL(ctx, k).Result()
			require.NoError(t, err)
			fixed := k == names.Format() || k == names.Instances() || strings.Contains(k, s2.Stats().Incarnation) || strings.HasSuffix(k, watcher.ID)
			assert.True(t, fixed || ttl > 0, "%s has no TTL", k)
		}
		watcher.Call("mesh/noop", nil)
	})
}

func TestShutdownIsBounded(t *testing.T) {
	t.Parallel()
	release := func(t *testing.T) chan struct{} {
		c := make(chan struct{})
		t.Cleanup(func() { close(c) })
		return c
	}
	for name, hang := range map[string]func(t *testing.T, w *harness.World, s *harness.Server){
		"Redis is away": func(t *testing.T, w *harness.World, s *harness.Server) {
			w.Away()
			t.Cleanup(w.Back)
		},
		"a command hangs": func(t *testing.T, w *harness.World, s *harness.Server) {
			c := release(t)
			require.NoError(t, s.HandleCommand("hang", func(context.Context, *mesh.Connection, json.RawMessage) (any, error) { <-c; return nil, nil }))
			require.NoError(t, s.Dial().Send(map[string]any{"id": 1, "command": "hang"}))
			w.Sleep(10 * time.Millisecond)
		},
		"a guard hangs": func(t *testing.T, w *harness.World, s *harness.Server) {
			c := release(t)
			require.NoError(t, s.TrackPresence(mesh.Exact("hang"), mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) { <-c; return true, nil }}))
			require.NoError(t, s.Dial().Send(map[string]any{"id": 1, "command": "mesh/subscribe-presence", "payload": harness.InRoomPayload("hang")}))
			w.Sleep(10 * time.Millisecond)
		},
		"a guard hangs in a recheck": func(t *testing.T, w *harness.World, s *harness.Server) {
			c, asked := release(t), make(chan struct{})
			require.NoError(t, s.TrackPresence(mesh.Exact("hang"), mesh.PresenceOptions{Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
				if m.Metadata != nil {
					close(asked)
					<-c
				}
				return true, nil
			}}))
			require.NoError(t, s.Presence().Connect(t.Context(), "viewer", nil))
			go func() {
				for range s.Presence().Subscribe(context.Background(), "hang", mesh.SubscribeOptions{Viewer: "viewer"}) {
					continue
				}
			}()
			w.Sleep(10 * time.Millisecond)
			require.NoError(t, s.Connections().SetMetadata(t.Context(), "viewer", 1, mesh.MetadataOptions{}))
			<-asked
		},
		"a hook hangs": func(t *testing.T, w *harness.World, s *harness.Server) {
			c := release(t)
			s.OnDisconnection(func(context.Context, *mesh.Connection, error) { <-c })
			s.Dial()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				long := func(o *mesh.Options) { o.GuardTimeout, o.HookTimeout = time.Hour, time.Hour }
				s := w.Tracked(long)
				s.Dial().Join("lobby")
				hang(t, w, s)
				s.Stop.Do(func() { // the harness would require a Shutdown without error
					t.Cleanup(func() { _ = s.HTTP.Close(); <-s.Done })
				})
				ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
				defer cancel()
				begun := time.Now()
				require.Error(t, s.Shutdown(ctx))
				assert.LessOrEqual(t, time.Since(begun), 3300*time.Millisecond)
			})
		})
	}
}

// TestShutdownEndsHooks checks that Shutdown cancels hooks, and does not fail if they
// return then.
func TestShutdownEndsHooks(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.HookTimeout = time.Minute })
		var ended atomic.Int32
		s.OnConnection(func(ctx context.Context, _ *mesh.Connection) {
			<-ctx.Done()
			ended.Add(1)
		})
		s.OnDisconnection(func(context.Context, *mesh.Connection, error) { ended.Add(1) })
		s.Dial()
		s.Dial()
		begun := time.Now()
		require.NoError(t, s.Shutdown(t.Context()))
		assert.LessOrEqual(t, time.Since(begun), 7*time.Second)
		assert.EqualValues(t, 4, ended.Load())
	})
}

// TestDrainAfterAStall calls takeDue with a clock that jumps, as after a stall of the
// process. The overdue sockets must not be closed all at once, and the drain must still
// end in time.
func TestDrainAfterAStall(t *testing.T) {
	t.Parallel()
	for _, sockets := range []int{1, 2, 7, 1000, 20_000} {
		for _, stall := range []time.Duration{0, 3 * time.Second, 9900 * time.Millisecond, 11 * time.Second} {
			s := mesh.ServerWith(sockets)
			assert.Equal(t, sockets, s.RefuseMore())
			begun := time.Now()
			now, resumed, until := begun, begun, begun.Add(10*time.Second)
			closed, rounds := map[string]bool{}, 0
			for wait := time.Duration(0); wait >= 0; rounds++ {
				now = now.Add(wait)
				if rounds == 1 {
					now = now.Add(stall)
					resumed = now
				}
				var due []string
				due, wait = s.TakeDue(now, begun, until)
				for _, id := range due {
					require.False(t, closed[id])
					closed[id] = true
				}
				most := sockets
				if now.Before(until) {
					left := until.Sub(resumed)
					most = 1 + int(float64(sockets)*float64(mesh.DrainLate+mesh.DrainStep)/float64(left))
					if stall == 0 {
						most = 1 + int(float64(sockets)*float64(2*mesh.DrainStep)/float64(10*time.Second))
					}
				}
				require.LessOrEqual(t, len(due), most, "%d sockets, stall of %v, after %v", sockets, stall, now.Sub(begun))
			}
			require.Len(t, closed, sockets)
			if resumed.Before(until) {
				require.LessOrEqual(t, now, until)
			}
			require.LessOrEqual(t, rounds, 10_000/50+sockets)
		}
	}
}
