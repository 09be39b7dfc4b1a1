package mesh

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// mob is connections of an app's own transport in a room with a TTL of one
// second, which show life five times a second, and subscribers on every server.
type mob struct {
	w        *world
	room     string
	servers  []*testServer // the last one has no connections: it writes nothing
	watchers []*peer
	lines    []*lifeline // of the servers that have one

	mu     sync.Mutex // guards the fields below
	ids    map[*testServer][]string
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
	return !c.w.virtual && gap > 350*time.Millisecond
}

// newMob starts servers, the first of which can be cut off, and makes all connections
// join. It returns when all servers may judge.
func newMob(w *world, room string, servers, each int, lease time.Duration, setup ...func(*Options)) *mob {
	w.t.Helper()
	c := &mob{w: w, room: room, ids: make(map[*testServer][]string), silent: make(map[string]bool)}
	setup = append(setup, leaseOf(lease))
	for i := range servers {
		s, line := w.mortal(setup...)
		s.track("^plain$", PresenceOptions{})
		s.track(".*", PresenceOptions{TTL: time.Second})
		c.servers, c.lines = append(c.servers, s), append(c.lines, line)
		p := s.dial()
		p.subscribe(room)
		c.watchers = append(c.watchers, p)
		for n := range each {
			if i == servers-1 {
				break
			}
			id := fmt.Sprintf("s%d-%d", i, n)
			require.NoError(w.t, s.Presence().Connect(w.t.Context(), id, nil))
			require.NoError(w.t, s.Presence().Join(w.t.Context(), room, id))
			c.ids[s] = append(c.ids[s], id)
		}
	}
	ctx, stop := context.WithCancel(w.t.Context())
	var work sync.WaitGroup
	work.Go(func() { c.live(ctx) })
	w.t.Cleanup(func() { stop(); work.Wait() })
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
	c.w.t.Helper()
	var since time.Time // when all of them might judge
	c.w.eventually(c.w.unhurried(time.Minute), func() bool {
		oldest := time.Duration(0)
		for _, s := range c.servers {
			if _, ok := s.n.lease.Judge(); !ok {
				since = time.Time{}
				return false
			}
			oldest = max(oldest, s.Stats().LeaseAge)
		}
		if since.IsZero() {
			since = time.Now()
		}
		return oldest < 400*time.Millisecond || time.Since(since) > c.servers[0].n.opts.LeaseTTL/2
	}, "all servers may judge")
}

// leaves returns how many leaves each watcher was told of.
func (c *mob) leaves() (n []int) {
	for _, p := range c.watchers {
		n = append(n, p.count("leave", ""))
	}
	return n
}

// stays checks that no subscriber has been told of a leave.
func (c *mob) stays(format string, args ...any) {
	c.w.t.Helper()
	require.Equal(c.w.t, make([]int, len(c.watchers)), c.leaves(), fmt.Sprintf(format, args...))
}

// bounds checks that a connection that falls silent leaves in time, and so do
// those of a server that dies.
func (c *mob) bounds(lease time.Duration) {
	c.w.t.Helper()
	quiet := c.ids[c.servers[0]][0]
	c.mu.Lock()
	c.silent[quiet] = true
	c.mu.Unlock()
	for _, p := range c.watchers {
		p.expect(c.w.unhurried(2*time.Second), "leave", quiet)
	}
	c.lines[0].cut()
	for _, p := range c.watchers[1:] {
		c.w.eventually(c.w.unhurried(lease+time.Second), func() bool {
			return p.count("leave", "") == len(c.ids[c.servers[0]])
		}, "the dead server's leave")
	}
	c.lines[0].mend()
	c.settle()
}

// settle waits until the client library has given up dials begun while a line was cut.
func (c *mob) settle() {
	if c.w.virtual {
		c.w.sleep(time.Minute)
	}
}

// outages are what makes writes fail on the embedded Redis.
var outages = map[string]struct{ begin, end func(*meshtest.Redis) }{
	"refused": {
		func(r *meshtest.Redis) { r.SetError("NOREPLICAS Not enough good replicas to write.") },
		func(r *meshtest.Redis) { r.SetError("") },
	},
	"read only": {
		func(r *meshtest.Redis) { r.SetError("READONLY You can't write against a read only replica.") },
		func(r *meshtest.Redis) { r.SetError("") },
	},
	"hang": {(*meshtest.Redis).Hang, (*meshtest.Redis).Resume},
	"cut":  {(*meshtest.Redis).Cut, (*meshtest.Redis).Heal},
}

// Redis fails for a while, shorter than the servers' patience but longer than a
// key lives: connections that show life stay.
func TestAShortOutageEndsNobody(t *testing.T) {
	t.Parallel()
	const lease = 10 * time.Second
	for name, outage := range outages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				c := newMob(w, "mob", 3, 4, lease)
				for away := 500 * time.Millisecond; away <= 3*time.Second; away += 170 * time.Millisecond {
					c.patient()
					outage.begin(w.mem)
					w.sleep(away)
					outage.end(w.mem)
					w.sleep(4 * time.Second)
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
	embedded(t, func(t *testing.T, w *world) {
		c := newMob(w, "mob", 3, 4, lease)
		for s, ids := range c.ids {
			for _, id := range ids {
				require.NoError(t, s.Presence().Join(t.Context(), "plain", id))
			}
		}
		for _, p := range c.watchers {
			p.subscribe("plain")
		}
		for away := 700 * time.Millisecond; away <= lease*3/2; away += 110 * time.Millisecond {
			w.sleep(2*lease + rand.N(lease))
			outages["refused"].begin(w.mem)
			w.sleep(away)
			outages["refused"].end(w.mem)
			w.sleep(4 * time.Second)
			c.stays("after %v", away)
		}
		for _, s := range c.servers {
			require.Zero(t, s.Stats().Reborn)
		}
	})
}

// Writes are refused again and again, with moments in between that an owner may
// miss.
func TestRefusalsInARowEndNobody(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		c := newMob(w, "mob", 3, 4, 10*time.Second)
		for range 20 {
			c.patient()
			for range 4 {
				outages["refused"].begin(w.mem)
				w.sleep(650 * time.Millisecond)
				outages["refused"].end(w.mem)
				w.sleep(60 * time.Millisecond)
			}
			w.sleep(3 * time.Second)
			c.stays("")
		}
	})
}

// Clean-up by hand, in an outage and right after it, ends only entries that their
// owner does not refresh once it can.
func TestCleanExpiredAfterAShortOutage(t *testing.T) {
	t.Parallel()
	const lease = 10 * time.Second
	for _, early := range []time.Duration{0, 100 * time.Millisecond, time.Second} {
		t.Run(fmt.Sprint(early), func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				ctx := t.Context()
				c := newMob(w, "mob", 3, 4, lease, expirationOff)
				idle := c.servers[2].Presence()
				for away := 1500 * time.Millisecond; away <= 3*time.Second; away += 170 * time.Millisecond {
					c.patient()
					outages["refused"].begin(w.mem)
					w.sleep(away - early)
					var work sync.WaitGroup
					work.Go(func() { w.sleep(early); outages["refused"].end(w.mem) })
					if early == 0 {
						work.Wait() // the call comes right after it
					}
					_, _ = idle.CleanExpired(ctx, c.room)
					work.Wait()
					for range 10 {
						n, err := idle.CleanExpired(ctx, c.room)
						require.NoError(t, err)
						require.Zero(t, n)
						w.sleep(50 * time.Millisecond)
					}
					w.sleep(time.Second)
					c.stays("after %v", away)
				}
				c.patient()
				began := time.Now()
				c.lines[0].cut()
				w.sleep(2500 * time.Millisecond)
				n, err := idle.CleanExpired(ctx, c.room)
				require.NoError(t, err)
				require.Equal(t, 4, n)
				require.Less(t, time.Since(began), 4*time.Second)
				outages["refused"].begin(w.mem)
				began = time.Now()
				_, err = idle.CleanExpired(ctx, c.room)
				require.ErrorIs(t, err, ErrUnavailable)
				require.Less(t, time.Since(began), 3*time.Second)
				outages["refused"].end(w.mem)
				c.lines[0].mend()
				c.settle()
			})
		})
	}
}

// A server tries no more writes than it needs, however many hints there are,
// and none if there are none.
func TestHintsTryFewWrites(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		var log commandLog
		s := w.server(log.logging)
		w.sleep(20 * time.Second)
		before := log.sent("srem")
		w.sleep(20 * time.Second)
		require.Equal(t, before, log.sent("srem"), "without hints")
		for i := range 1000 {
			s.n.hints.add(expiredConn, "room", fmt.Sprint(i))
		}
		w.sleep(2 * time.Second)
		require.LessOrEqual(t, log.sent("srem")-before, 5)
		require.NotEqual(t, before, log.sent("srem"))
		before = log.sent("srem")
		w.sleep(20 * time.Second)
		require.Equal(t, before, log.sent("srem"))

		w.mem.SetError("NOREPLICAS Not enough good replicas to write.")
		for i := range 1000 {
			s.n.hints.add(expiredConn, "room", fmt.Sprint(i))
		}
		w.sleep(time.Minute)
		w.mem.SetError("")
		// The client library tries each of them four times.
		require.LessOrEqual(t, log.sent("srem")-before, 4*70, "at a modest pace")
		w.sleep(time.Minute)
		s.n.hints.mu.Lock()
		defer s.n.hints.mu.Unlock()
		require.Empty(t, s.n.hints.waiting)
	})
}
