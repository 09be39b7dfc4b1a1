package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
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

// appConns are connections of an app's own transport in a room with a TTL of one
// second. They are touched five times a second. Each server has a subscriber.
type appConns struct {
	w        *harness.World
	room     string
	servers  []*harness.Server // the last one has no connections, so it writes nothing
	watchers []*harness.Peer
	lines    []*harness.Lifeline // network of each server's Redis client

	mu     sync.Mutex // guards the fields below
	ids    map[*harness.Server][]string
	silent map[string]bool
	gap    time.Duration // longest time between two touches since the last call of starved
}

// starved reports whether the machine delayed the touches since the last call so much
// that the connections may have counted as silent. That cannot happen in virtual time.
func (c *appConns) starved() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	gap := c.gap
	c.gap = 0
	return !c.w.Virtual && gap > 350*time.Millisecond
}

// newAppConns starts servers and makes all connections join. It returns when all
// servers are in contact.
func newAppConns(w *harness.World, room string, servers, each int, lease time.Duration, setup ...func(*mesh.Options)) *appConns {
	w.T.Helper()
	c := &appConns{w: w, room: room, ids: make(map[*harness.Server][]string), silent: make(map[string]bool)}
	setup = append(setup, harness.LeaseOf(lease))
	for i := range servers {
		s, line := w.Mortal(setup...)
		s.Track("^plain$", mesh.PresenceOptions{})
		s.Track(".*", mesh.PresenceOptions{TTL: time.Second})
		c.servers, c.lines = append(c.servers, s), append(c.lines, line)
		p := s.Dial()
		p.Subscribe(room)
		c.watchers = append(c.watchers, p)
		for n := range each {
			if i == servers-1 {
				break
			}
			id := fmt.Sprintf("s%d-%d", i, n)
			require.NoError(w.T, s.Presence().Connect(w.T.Context(), id, nil))
			require.NoError(w.T, s.Presence().Join(w.T.Context(), room, id))
			c.ids[s] = append(c.ids[s], id)
		}
	}
	ctx, stop := context.WithCancel(w.T.Context())
	var work sync.WaitGroup
	work.Go(func() { c.touch(ctx) })
	w.T.Cleanup(func() { stop(); work.Wait() })
	c.awaitContact()
	return c
}

// touch touches all connections that are not silent until ctx ends.
func (c *appConns) touch(ctx context.Context) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		c.mu.Lock()
		c.gap = max(c.gap, time.Since(last))
		last = time.Now()
		for s, ids := range c.ids {
			for _, id := range ids {
				if !c.silent[id] {
					_ = s.Presence().Touch(id)
				}
			}
		}
		c.mu.Unlock()
	}
}

// awaitContact waits until all servers are in contact and have just renewed their
// leases. A short outage that begins then is over before the next heartbeat. Servers
// that were slow to start may never renew at the same time. Then it returns after half
// a lease of contact.
func (c *appConns) awaitContact() {
	c.w.T.Helper()
	var since time.Time // when all of them were in contact
	c.w.Eventually(time.Minute, func() bool {
		oldest := time.Duration(0)
		for _, s := range c.servers {
			if _, ok := testhook.PartsOf(s.Server).Lease.ClockProof(); !ok {
				since = time.Time{}
				return false
			}
			oldest = max(oldest, s.Stats().LeaseAge)
		}
		if since.IsZero() {
			since = time.Now()
		}
		return oldest < 400*time.Millisecond || time.Since(since) > testhook.PartsOf(c.servers[0].Server).LeaseTTL/2
	}, "all servers are in contact")
}

// leaves returns the number of leaves that each watcher received.
func (c *appConns) leaves() (n []int) {
	for _, p := range c.watchers {
		n = append(n, p.Count("leave", ""))
	}
	return n
}

// noLeaves checks that no subscriber has received a leave.
func (c *appConns) noLeaves(format string, args ...any) {
	c.w.T.Helper()
	require.Equal(c.w.T, make([]int, len(c.watchers)), c.leaves(), fmt.Sprintf(format, args...))
}

// checkBounds checks that a silent connection and the connections of a dead server
// leave in time.
func (c *appConns) checkBounds(lease time.Duration) {
	c.w.T.Helper()
	quiet := c.ids[c.servers[0]][0]
	c.mu.Lock()
	c.silent[quiet] = true
	c.mu.Unlock()
	for _, p := range c.watchers {
		p.Expect(2*time.Second, "leave", quiet)
	}
	c.lines[0].Cut()
	for _, p := range c.watchers[1:] {
		c.w.Eventually(lease+time.Second, func() bool {
			return p.Count("leave", "") >= len(c.ids[c.servers[0]])
		}, "the leaves of the dead server")
	}
	c.lines[0].Mend()
	c.settle()
}

// settle waits until the Redis client has given up the dials that began while a line
// was cut.
func (c *appConns) settle() {
	if c.w.Virtual {
		c.w.Sleep(time.Minute)
	}
}

// Redis fails for a while that is longer than a key lives, but too short to end
// contact. Connections with signs of life stay.
func TestAShortOutageEndsNoEntry(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "outages of many lengths")
	const lease = 10 * time.Second
	for name, outage := range harness.Outages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				c := newAppConns(w, "app", 3, 4, lease)
				for away := 500 * time.Millisecond; away <= 3*time.Second; away += harness.Thin(170*time.Millisecond, 2500*time.Millisecond) {
					c.awaitContact()
					outage.Begin(w.Mem)
					w.Sleep(away)
					outage.End(w.Mem)
					w.Sleep(4 * time.Second)
					c.noLeaves("after %v", away)
				}
				c.settle()
				c.awaitContact()
				c.checkBounds(lease)
			})
		})
	}
}

// Redis refuses writes for about as long as a lease, so that heartbeats fail, too. No
// server is declared dead, and no server acts on expired keys.
func TestRefusalsAroundTheLeaseEndNoEntry(t *testing.T) {
	t.Parallel()
	const lease = 3 * time.Second
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		c := newAppConns(w, "app", 3, 4, lease)
		for s, ids := range c.ids {
			for _, id := range ids {
				require.NoError(t, s.Presence().Join(t.Context(), "plain", id))
			}
		}
		for _, p := range c.watchers {
			p.Subscribe("plain")
		}
		for away := 700 * time.Millisecond; away <= lease*3/2; away += harness.Thin(110*time.Millisecond, lease) {
			w.Sleep(2*lease + rand.N(lease))
			harness.Outages["refused"].Begin(w.Mem)
			w.Sleep(away)
			harness.Outages["refused"].End(w.Mem)
			w.Sleep(4 * time.Second)
			c.noLeaves("after %v", away)
		}
		for _, s := range c.servers {
			require.Zero(t, s.Stats().Reregistered)
		}
	})
}

// Redis refuses writes repeatedly. In the short times between, an owner may miss its
// chance to write.
func TestRefusalsInARowEndNoEntry(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "eighty outages")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		c := newAppConns(w, "app", 3, 4, 10*time.Second)
		for range 20 {
			c.awaitContact()
			for range 4 {
				harness.Outages["refused"].Begin(w.Mem)
				w.Sleep(650 * time.Millisecond)
				harness.Outages["refused"].End(w.Mem)
				w.Sleep(60 * time.Millisecond)
			}
			w.Sleep(3 * time.Second)
			c.noLeaves("")
		}
	})
}

// CleanExpired, during an outage and right after it, only ends entries that their owner
// does not refresh when it can.
func TestCleanExpiredAfterAShortOutage(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "outages of many lengths")
	const lease = 10 * time.Second
	for _, early := range []time.Duration{0, 100 * time.Millisecond, time.Second} {
		t.Run(fmt.Sprint(early), func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				ctx := t.Context()
				c := newAppConns(w, "app", 3, 4, lease, harness.ExpirationOff)
				idle := c.servers[2].Presence()
				for away := 1500 * time.Millisecond; away <= 3*time.Second; away += harness.Thin(170*time.Millisecond, 1500*time.Millisecond) {
					c.awaitContact()
					harness.Outages["refused"].Begin(w.Mem)
					w.Sleep(away - early)
					var work sync.WaitGroup
					work.Go(func() { w.Sleep(early); harness.Outages["refused"].End(w.Mem) })
					if early == 0 {
						work.Wait() // CleanExpired runs right after the outage
					}
					_, _ = idle.CleanExpired(ctx, c.room)
					work.Wait()
					for range 10 {
						n, err := idle.CleanExpired(ctx, c.room)
						require.NoError(t, err)
						require.Zero(t, n)
						w.Sleep(50 * time.Millisecond)
					}
					w.Sleep(time.Second)
					c.noLeaves("after %v", away)
				}
				c.awaitContact()
				began := time.Now()
				c.lines[0].Cut()
				w.Sleep(2500 * time.Millisecond)
				n, err := idle.CleanExpired(ctx, c.room)
				require.NoError(t, err)
				require.Equal(t, 4, n)
				require.Less(t, time.Since(began), 4*time.Second)
				harness.Outages["refused"].Begin(w.Mem)
				began = time.Now()
				_, err = idle.CleanExpired(ctx, c.room)
				require.ErrorIs(t, err, mesh.ErrUnavailable)
				require.Less(t, time.Since(began), 3*time.Second)
				harness.Outages["refused"].End(w.Mem)
				c.lines[0].Mend()
				c.settle()
			})
		})
	}
}

// A server attempts few writes, however many expired hints there are, and none without
// a hint.
func TestHintsTryFewWrites(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log harness.CommandLog
		s := w.Server(log.Logging)
		w.Sleep(20 * time.Second)
		before := log.Sent("srem")
		w.Sleep(20 * time.Second)
		require.Equal(t, before, log.Sent("srem"), "no writes without hints")
		for i := range 1000 {
			testhook.AddExpired(s.Server, "room", fmt.Sprint(i))
		}
		w.Sleep(2 * time.Second)
		require.LessOrEqual(t, log.Sent("srem")-before, 5)
		require.NotEqual(t, before, log.Sent("srem"))
		before = log.Sent("srem")
		w.Sleep(20 * time.Second)
		require.Equal(t, before, log.Sent("srem"))

		w.Mem.SetError("NOREPLICAS Not enough good replicas to write.")
		for i := range 1000 {
			testhook.AddExpired(s.Server, "room", fmt.Sprint(i))
		}
		w.Sleep(time.Minute)
		w.Mem.SetError("")
		// The Redis client tries each of them four times.
		require.LessOrEqual(t, log.Sent("srem")-before, 4*70, "the rate of attempts is limited")
		w.Sleep(time.Minute)
		require.Zero(t, testhook.ExpiredWaiting(s.Server))
	})
}

// attempts counts the batches that a server starts to write.
type attempts struct {
	local.Store
	n atomic.Int32
}

func (a *attempts) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	a.n.Add(1)
	return a.Store.Commit(ctx, bucket, inc, number, known, ops)
}

// While Redis answers nothing, each attempt of a server is short, so that one begins
// soon after Redis answers again.
func TestAttemptsAreShortWhileRedisIsSilent(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		count := &attempts{}
		s := w.Tracked(func(o *mesh.Options) {
			testhook.SetSeams(o, func(st *store.Store) testhook.Seams {
				count.Store = st
				return testhook.Seams{Local: count, Lease: st, Hub: st}
			})
		})
		p := s.Dial()
		p.Join("lobby")
		w.Sleep(10 * time.Second) // long after the last answer to a write

		w.Mem.Hang()
		require.NoError(t, p.Send(map[string]any{"id": 1, "command": "mesh/publish-presence-state",
			"payload": map[string]any{"roomName": "lobby", "state": map[string]any{"a": 1}}}))
		before := count.n.Load()
		w.Sleep(4 * time.Second)
		require.GreaterOrEqual(t, count.n.Load()-before, int32(6), "attempts in four seconds")
		w.Mem.Resume()
		w.Sleep(5 * time.Second)
	})
}
