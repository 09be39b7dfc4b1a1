package users

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

var causesRuns = flag.Int("causes.runs", 0, "runs of TestCauses with default options and a Grace of 30 s, more than two minutes each; 0: one run with short times")

// times are the options that decide when others see the end of a connection.
type times struct{ lease, ping, grace time.Duration }

var (
	defaultTimes = times{lease: 10 * time.Second, ping: 30 * time.Second, grace: 30 * time.Second}
	shortTimes   = times{lease: 3 * time.Second, ping: time.Second, grace: 3 * time.Second}
)

// cause ends the connections of users who are in two rooms, one of them without Grace.
type cause struct {
	name  string
	back  bool // the users join again, after backAfter
	cause func(s *scene) (since time.Time)
	// within limits the time until others see the disconnection, or the leave without
	// Grace.
	within func(t times) time.Duration
}

const (
	backAfter = 500 * time.Millisecond
	keptRoom  = "kept"
)

// scene has a server with users, another server, and a subscriber on a third one.
type scene struct {
	times
	*watch
	victim, other *harness.Child
	tunnel        *redistest.ProxyServer // proxy of the users' sockets
	peers         []*harness.Peer
	users         []string
	due           time.Time // when kept places end at the latest, if the cause knows
}

var causes = []cause{
	{"the page is reloaded, back after 0.5 s", true, closeTabs, within(time.Second)},
	{"the tab is closed", false, closeTabs, within(time.Second)},
	{"a deploy (`Drain`, `Shutdown`)", false, func(s *scene) time.Time {
		now := time.Now()
		require.NoError(s.w.T, s.victim.Stop())
		return now
	}, within(5 * time.Second)},
	{"the server is killed (`kill -9`)", false, func(s *scene) time.Time {
		now := time.Now()
		s.victim.Die()
		// The grace counts from the end of the lease.
		ends, err := s.w.Client().ZScore(s.w.T.Context(), s.w.Keys().Instances(), s.victim.Incarnation).Result()
		require.NoError(s.w.T, err)
		s.due = time.UnixMilli(int64(ends)).Add(max(s.grace, s.lease/3) + time.Second)
		return now
	}, func(t times) time.Duration { return t.lease + time.Second }},
	{"the laptop is closed (missed pongs)", false, func(s *scene) time.Time {
		s.tunnel.BlackHole(true)
		return time.Now()
	}, func(t times) time.Duration { return 4*t.ping + time.Second }},
}

func closeTabs(s *scene) time.Time {
	now := time.Now()
	for _, p := range s.peers {
		p.Close()
	}
	return now
}

func within(d time.Duration) func(times) time.Duration { return func(times) time.Duration { return d } }

// measured has the times from a cause to the events, without Grace and with it.
type measured struct {
	mu                     sync.Mutex // guards the fields below
	plain, disconnect, end []time.Duration
	wrong                  int // leaves too many
}

// TestCauses measures, for each cause, when others see that a connection has ended and
// that its user has left, without and with Grace. A user who does not come back is
// reported as left once, no earlier than Grace after the end of the connection, and
// within a second after that. Its cases run side by side, and no other test beside them.
func TestCauses(t *testing.T) {
	harness.Long(t, "takes real seconds")
	now, runs := shortTimes, 1
	if *causesRuns > 0 {
		now, runs = defaultTimes, *causesRuns
	}
	results := make([]measured, len(causes))
	for range runs {
		var all sync.WaitGroup
		for i, c := range causes {
			all.Go(func() {
				t.Run(c.name, func(t *testing.T) { c.run(harness.RealWorld(t), now, &results[i]) })
			})
			all.Go(func() {
				t.Run(c.name+", cluster", func(t *testing.T) { c.run(harness.ClusterWorld(t), now, &results[i]) })
			})
		}
		all.Wait()
	}
	t.Log(tableOf(results, now))
}

func (c cause) run(w *harness.World, now times, out *measured) {
	const users = 10
	t := w.T
	lease := func(o *mesh.Options) { o.LeaseTTL = now.lease }
	s := &scene{times: now, watch: watchRooms(w, []string{harness.RoomPlain, keptRoom}, now.grace, lease)}
	conf := harness.ChildConfig{Lease: now.lease, Ping: now.ping, Users: true, Grace: now.grace, Drain: 500 * time.Millisecond}
	s.victim, s.other = w.Child(conf), w.Child(conf)
	s.tunnel = redistest.Proxy(t, s.victim.Addr)
	direct := s.victim.Addr
	s.victim.Addr = s.tunnel.Addr()
	for i := range users {
		s.users = append(s.users, fmt.Sprintf("user-%d", i))
		s.peers = append(s.peers, s.joinBoth(s.victim, s.users[i]))
	}
	s.victim.Addr = direct
	s.awaitUntil(time.Now().Add(10*time.Second), "joins", func(user string) bool {
		return len(s.times2(mesh.EventJoin, user)[0]) == 1 && len(s.times2(mesh.EventJoin, user)[1]) == 1
	})
	w.Sleep(now.lease + rand.N(now.lease/3)) // from then on every server may end kept places
	since := c.cause(s)
	if c.back {
		w.Sleep(backAfter)
		for _, user := range s.users {
			s.joinBoth(s.other, user)
		}
	}
	seen := since.Add(c.within(now))
	s.awaitUntil(seen, "leaves without Grace", func(user string) bool { return len(s.times2(mesh.EventLeave, user)[0]) > 0 })
	s.awaitUntil(seen, "disconnections", func(user string) bool { return len(s.times2(mesh.EventDisconnect, user)[1]) > 0 })
	if !c.back {
		left := func(user string) bool { return len(s.times2(mesh.EventLeave, user)[1]) > 0 }
		if s.due.IsZero() {
			s.due = s.latest(mesh.EventDisconnect).Add(now.grace + time.Second)
		}
		s.awaitUntil(s.due, "leaves when Grace is over", left)
	}
	w.Sleep(now.grace + 2*time.Second) // time for unexpected events
	s.check()
	c.sumUp(s, since, out)
}

// joinBoth connects a user and joins both rooms.
func (s *scene) joinBoth(c *harness.Child, user string) *harness.Peer {
	s.w.T.Helper()
	p, err := c.TryDialAs(user)
	require.NoError(s.w.T, err)
	p.Join(harness.RoomPlain)
	p.Join(keptRoom)
	return p
}

// times2 returns when the events of a type about a user arrived, in the room without
// Grace and in the one with it.
func (s *scene) times2(kind mesh.EventType, user string) [2][]time.Time {
	return [2][]time.Time{s.watch.times(kind, harness.RoomPlain, user), s.watch.times(kind, keptRoom, user)}
}

// latest returns the arrival of the last event of a type in the room with Grace.
func (s *scene) latest(kind mesh.EventType) (last time.Time) {
	for _, user := range s.users {
		for _, at := range s.times2(kind, user)[1] {
			if at.After(last) {
				last = at
			}
		}
	}
	return last
}

// awaitUntil waits until ok holds for all users. As in the tests of faults, the bound is
// extended by one lease if the subscriber's server loses contact, and by the delays of
// this goroutine, because a busy machine delays the others, too.
func (s *scene) awaitUntil(bound time.Time, what string, ok func(user string) bool) {
	t := s.w.T
	t.Helper()
	contact := true
	for slices.ContainsFunc(s.users, func(user string) bool { return !ok(user) }) {
		if _, still := testhook.PartsOf(s.PresenceManager).Lease.ClockProof(); contact && !still {
			contact, bound = false, bound.Add(s.lease)
		}
		if late := time.Since(bound); late > 0 {
			require.FailNow(t, "the bound is over", "%s: %v late", what, late)
		}
		const nap, through = 5 * time.Millisecond, 4
		slept := time.Now()
		s.w.Sleep(nap)
		if over := time.Since(slept) - 2*nap; over > 0 {
			bound = bound.Add(through * over)
		}
	}
}

// sumUp checks each user's events, and adds their times to the results.
func (c cause) sumUp(s *scene, since time.Time, out *measured) {
	out.mu.Lock()
	defer out.mu.Unlock()
	t := s.w.T
	for _, user := range s.users {
		leaves, disconnects := s.times2(mesh.EventLeave, user), s.times2(mesh.EventDisconnect, user)
		out.plain = append(out.plain, leaves[0][0].Sub(since))
		out.disconnect = append(out.disconnect, disconnects[1][0].Sub(since))
		out.wrong += len(leaves[0]) + len(leaves[1]) - 2 // with Grace, the old connection of one who is back leaves, too
		if !c.back {
			end := leaves[1][0].Sub(since)
			assert.GreaterOrEqual(t, end, s.grace-5*time.Millisecond, "%s left before Grace was over", user) // Redis's clock has milliseconds
			out.end = append(out.end, end)
		}
	}
	require.Zero(t, out.wrong, "leaves too many")
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, user := range s.users {
		want := 2 // the room without Grace, and the one with it
		if c.back {
			want = 1
		}
		assert.Equal(t, want, s.left[user], "%s: reported as left", user)
	}
}

// tableOf formats the results as a table in Markdown.
func tableOf(results []measured, now times) string {
	var b strings.Builder
	fmt.Fprintf(&b, "LeaseTTL %v, PingInterval %v, Grace %v\n\n| cause | without Grace: leave | with Grace: disconnect | with Grace: leave | wrong leaves |\n|---|---|---|---|---|\n",
		now.lease, now.ping, now.grace)
	for i := range results {
		r := &results[i]
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %d of %d |\n",
			causes[i].name, spread(r.plain), spread(r.disconnect), spread(r.end), r.wrong, len(r.plain)+len(r.disconnect))
	}
	return b.String()
}

// spread formats the median and the worst time, in seconds.
func spread(took []time.Duration) string {
	if len(took) == 0 {
		return "none"
	}
	slices.Sort(took)
	return fmt.Sprintf("%.1f s (%.1f s)", took[len(took)/2].Seconds(), took[len(took)-1].Seconds())
}
