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

// mob is connections of an app's own transport in a room with a TTL of one
// second, which show life five times a second, and subscribers on every server.
type mob struct {
	w        *harness.World
	room     string
	servers  []*harness.Server // the last one has no connections: it writes nothing
	watchers []*harness.Peer
	lines    []*harness.Lifeline // of the servers that have one

	mu     sync.Mutex // guards the fields below
	ids    map[*harness.Server][]string
	silent map[string]bool
	gap    time.Duration // the longest between two signs of life since it was last asked for
}

// starved reports whether the machine kept all connections from showing life for
// so long, since it was last asked, that they may have passed for silent. In
// virtual time that does not happen.
func (c *mob) starved() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	gap := c.gap
	c.gap = 0
	return !c.w.Virtual && gap > 350*time.Millisecond
}

// newMob starts servers, the first of which can be cut off, and makes all connections
// join. It returns when all servers may judge.
func newMob(w *harness.World, room string, servers, each int, lease time.Duration, setup ...func(*mesh.Options)) *mob {
	w.T.Helper()
	c := &mob{w: w, room: room, ids: make(map[*harness.Server][]string), silent: make(map[string]bool)}
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
	work.Go(func() { c.live(ctx) })
	w.T.Cleanup(func() { stop(); work.Wait() })
	c.patient()
	return c
}

// live shows life until ctx ends.
func (c *mob) live(ctx context.Context) {
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

// patient waits until all servers may judge and have just renewed. A short
// outage that begins then is over before a renewal is due. Servers that were
// slow to start may renew at other times: then it does not wait for that.
func (c *mob) patient() {
	c.w.T.Helper()
	var since time.Time // when all of them might judge
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
	}, "all servers may judge")
}

// leaves returns how many leaves each watcher was told of.
func (c *mob) leaves() (n []int) {
	for _, p := range c.watchers {
		n = append(n, p.Count("leave", ""))
	}
	return n
}

// stays checks that no subscriber has been told of a leave.
func (c *mob) stays(format string, args ...any) {
	c.w.T.Helper()
	require.Equal(c.w.T, make([]int, len(c.watchers)), c.leaves(), fmt.Sprintf(format, args...))
}

// bounds checks that a connection that falls silent leaves in time, and so do
// those of a server that dies.
func (c *mob) bounds(lease time.Duration) {
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
		}, "the dead server's leave")
	}
	c.lines[0].Mend()
	c.settle()
}

// settle waits until the client library has given up dials begun while a line was cut.
func (c *mob) settle() {
	if c.w.Virtual {
		c.w.Sleep(time.Minute)
	}
}

// Redis fails for a while, shorter than the servers' patience but longer than a
// key lives: connections that show life stay.
func TestAShortOutageEndsNobody(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "outages of many lengths")
	const lease = 10 * time.Second
	for name, outage := range harness.Outages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				c := newMob(w, "mob", 3, 4, lease)
				for away := 500 * time.Millisecond; away <= 3*time.Second; away += harness.Thin(170*time.Millisecond, 2500*time.Millisecond) {
					c.patient()
					outage.Begin(w.Mem)
					w.Sleep(away)
					outage.End(w.Mem)
					w.Sleep(4 * time.Second)
					c.stays("after %v", away)
				}
				c.settle()
				c.patient()
				c.bounds(lease)
			})
		})
	}
}

// Redis takes no writes for about as long as a lease, less or more, so that
// renewals fail, too: no server is declared dead, and no key's end is acted on.
func TestRefusalsAroundTheLeaseEndNobody(t *testing.T) {
	t.Parallel()
	const lease = 3 * time.Second
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		c := newMob(w, "mob", 3, 4, lease)
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
			c.stays("after %v", away)
		}
		for _, s := range c.servers {
			require.Zero(t, s.Stats().Reregistered)
		}
	})
}

// Writes are refused again and again, with moments in between that an owner may
// miss.
func TestRefusalsInARowEndNobody(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "eighty outages")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		c := newMob(w, "mob", 3, 4, 10*time.Second)
		for range 20 {
			c.patient()
			for range 4 {
				harness.Outages["refused"].Begin(w.Mem)
				w.Sleep(650 * time.Millisecond)
				harness.Outages["refused"].End(w.Mem)
				w.Sleep(60 * time.Millisecond)
			}
			w.Sleep(3 * time.Second)
			c.stays("")
		}
	})
}

// Clean-up by hand, in an outage and right after it, ends only entries that their
// owner does not refresh once it can.
func TestCleanExpiredAfterAShortOutage(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "outages of many lengths")
	const lease = 10 * time.Second
	for _, early := range []time.Duration{0, 100 * time.Millisecond, time.Second} {
		t.Run(fmt.Sprint(early), func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				ctx := t.Context()
				c := newMob(w, "mob", 3, 4, lease, harness.ExpirationOff)
				idle := c.servers[2].Presence()
				for away := 1500 * time.Millisecond; away <= 3*time.Second; away += harness.Thin(170*time.Millisecond, 1500*time.Millisecond) {
					c.patient()
					harness.Outages["refused"].Begin(w.Mem)
					w.Sleep(away - early)
					var work sync.WaitGroup
					work.Go(func() { w.Sleep(early); harness.Outages["refused"].End(w.Mem) })
					if early == 0 {
						work.Wait() // the call comes right after it
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
					c.stays("after %v", away)
				}
				c.patient()
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

// A server tries no more writes than it needs, however many hints there are,
// and none if there are none.
func TestHintsTryFewWrites(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var log harness.CommandLog
		s := w.Server(log.Logging)
		w.Sleep(20 * time.Second)
		before := log.Sent("srem")
		w.Sleep(20 * time.Second)
		require.Equal(t, before, log.Sent("srem"), "without hints")
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
		// The client library tries each of them four times.
		require.LessOrEqual(t, log.Sent("srem")-before, 4*70, "at a modest pace")
		w.Sleep(time.Minute)
		require.Zero(t, testhook.ExpiredWaiting(s.Server))
	})
}

// attempts counts the batches that a server begins to write.
type attempts struct {
	local.Store
	n atomic.Int32
}

func (a *attempts) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	a.n.Add(1)
	return a.Store.Commit(ctx, bucket, inc, number, known, ops)
}

// While Redis answers nothing, a server makes short attempts, so that one begins
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
		w.Sleep(10 * time.Second) // well past the last answer to a write

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
