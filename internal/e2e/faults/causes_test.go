package faults

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

var causesRuns = flag.Int("causes.runs", 0, "runs of TestCauses with default options, about two minutes each; 0: one run with short times")

// times are the options that decide how soon a leave is reported.
type times struct {
	lease, ping, ttl time.Duration
	down, away       time.Duration // duration of a restart of Redis, and of an outage
}

var (
	defaultTimes = times{lease: 10 * time.Second, ping: 30 * time.Second, ttl: 10 * time.Second, down: 2 * time.Second, away: time.Minute}
	shortTimes   = times{lease: 2 * time.Second, ping: time.Second, ttl: 2 * time.Second, down: 500 * time.Millisecond, away: 4 * time.Second}
)

// cause is a reason why the members of two rooms leave. One of the rooms has a TTL.
type cause struct {
	name string
	aof  bool
	// trigger causes the leaves and returns the earliest time at which they could be
	// reported.
	trigger func(s *scene) time.Time
	// within returns the promised limits, for the rooms without and with a TTL.
	within func(t times) [2]time.Duration
}

// scene has one server with a subscriber, and a child process with the members.
type scene struct {
	*drill
	times
	victim *harness.Child
	tunnel *redistest.ProxyServer // proxy of the members' sockets
	gone   []*harness.Peer
}

var causes = []cause{
	{"tab closed", false, func(s *scene) time.Time {
		now := time.Now()
		s.leave()
		return now
	}, both(func(t times) time.Duration { return time.Second })},
	{"in a tunnel (silence, nothing closed)", false, func(s *scene) time.Time {
		s.tunnel.BlackHole(true)
		return time.Now()
	}, func(t times) [2]time.Duration {
		// One more interval if a server's clock stood still.
		return [2]time.Duration{4*t.ping + time.Second, t.ttl + time.Second}
	}},
	{"server killed (`kill -9`)", false, func(s *scene) time.Time {
		now := time.Now()
		s.victim.Die()
		return now
	}, byLease},
	{"machine gone (nothing closed)", false, func(s *scene) time.Time {
		require.NoError(s.T, s.victim.Cmd.Process.Signal(syscall.SIGSTOP))
		return time.Now()
	}, byLease},
	{"deploy (`Shutdown`)", false, func(s *scene) time.Time {
		now := time.Now()
		require.NoError(s.T, s.victim.Stop())
		return now
	}, both(func(t times) time.Duration { return 4 * time.Second })},
	{"tab closed while Redis restarts empty", false, restarted, afterOutage},
	{"tab closed while Redis restarts with its AOF", true, restarted, afterOutage},
	{"tab closed while Redis does not answer for a minute", false, func(s *scene) time.Time {
		s.Real.Pause()
		s.leave()
		s.Sleep(s.away)
		s.Real.Resume()
		return time.Now()
	}, afterOutage},
}

func both(f func(times) time.Duration) func(times) [2]time.Duration {
	return func(t times) [2]time.Duration { return [2]time.Duration{f(t), f(t)} }
}

// byLease returns the limits after the end of a server.
func byLease(t times) [2]time.Duration {
	return [2]time.Duration{t.lease + time.Second, t.lease + time.Second}
}

// afterOutage returns the limits after Redis is back: one lease until the servers are
// in contact again, and one for unconfirmed members.
func afterOutage(t times) [2]time.Duration {
	return [2]time.Duration{2*t.lease + time.Second, 2*t.lease + time.Second}
}

func restarted(s *scene) time.Time {
	s.Real.Kill()
	s.leave()
	s.Sleep(s.down)
	s.Real.Restart(false)
	return time.Now()
}

// leave closes the members' sockets, as browsers do.
func (s *scene) leave() {
	for _, p := range s.gone {
		p.Close()
	}
}

// TestCauses measures, for each cause, the time until subscribers on another server
// receive the leaves. It also checks that no other leave is reported.
func TestCauses(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	times, runs := shortTimes, 1
	if *causesRuns > 0 {
		times, runs = defaultTimes, *causesRuns
	}
	results := make([]measured, len(causes))
	for range runs {
		var all sync.WaitGroup
		for i, c := range causes {
			all.Go(func() {
				t.Run(c.name, func(t *testing.T) { c.run(t, times, &results[i]) })
			})
		}
		all.Wait()
	}
	t.Log(tableOf(results, times))
}

// measured contains the results for one cause.
type measured struct {
	took  [2][]time.Duration // times until a leave was reported, in the rooms without and with a TTL
	wrong int                // leaves of members that stayed, and repeated leaves
}

func (c cause) run(t *testing.T, times times, out *measured) {
	const members = 10
	var opts []redistest.Option
	if c.aof {
		opts = append(opts, redistest.WithAOF())
	}
	w := harness.RealWorld(t, opts...)
	rooms := []string{"lobby", harness.RoomTimed}
	s := &scene{times: times, drill: newDrill(w, 1, rooms, func(o *mesh.Options) { o.LeaseTTL, o.PingInterval = times.lease, times.ping })}
	require.NoError(t, harness.TrackTimed(s.servers[0].Server, times.ttl))
	s.victim = w.Child(harness.ChildConfig{Lease: times.lease, Ping: times.ping, Timed: times.ttl, Events: true})
	s.tunnel = redistest.Proxy(t, s.victim.Addr)
	stay := s.members(3)
	dial := s.victim.Dial
	if strings.Contains(c.name, "tunnel") {
		dial = s.dialTunnel
	}
	for range members {
		p := dial()
		s.gone = append(s.gone, p)
		for _, room := range rooms {
			s.note(room, p.ID, p.In(room))
		}
	}
	s.settles(time.Now(), 10*time.Second)
	s.awaitContact()
	s.Sleep(rand.N(times.lease / 3)) // at a random moment between heartbeats and pings
	for _, p := range s.gone {
		p.Call("mesh/noop", map[string]any{}) // ends the silence of each member
	}
	since := c.trigger(s)
	for i, room := range rooms {
		stream := s.streams[i]
		s.reportedBy(since.Add(c.within(times)[i]), times.lease, func() bool {
			leaves := stream.leaves()
			return !slices.ContainsFunc(s.gone, func(p *harness.Peer) bool { return len(leaves[p.ID]) == 0 })
		}, "%s: leaves in %s", c.name, room)
	}
	s.Sleep(times.lease + 2*time.Second) // time for unexpected updates
	for i := range rooms {
		leaves := s.streams[i].leaves()
		for _, p := range s.gone {
			out.took[i] = append(out.took[i], leaves[p.ID][0].Sub(since))
			out.wrong += len(leaves[p.ID]) - 1
		}
		for _, p := range stay {
			for _, at := range leaves[p.ID] {
				t.Logf("%s stayed, but was reported as left from %s after %v", p.ID, rooms[i], at.Sub(since))
			}
			out.wrong += len(leaves[p.ID])
		}
	}
	s.checkStreams()
	require.Zero(t, out.wrong, "wrong leaves")
}

// dialTunnel dials through the tunnel.
func (s *scene) dialTunnel() *harness.Peer {
	s.T.Helper()
	direct := s.victim.Addr
	s.victim.Addr = s.tunnel.Addr()
	defer func() { s.victim.Addr = direct }()
	return s.victim.Dial()
}

// tableOf formats the results as a table in Markdown.
func tableOf(results []measured, times times) string {
	var b strings.Builder
	fmt.Fprintf(&b, "LeaseTTL %v, PingInterval %v\n\n| cause of the leave | room without TTL | room with TTL %v | wrong leaves |\n|---|---|---|---|\n", times.lease, times.ping, times.ttl)
	for i, r := range results {
		fmt.Fprintf(&b, "| %s | %s | %s | %d of %d |\n", causes[i].name, spread(r.took[0]), spread(r.took[1]), r.wrong, len(r.took[0])+len(r.took[1]))
	}
	return b.String()
}

// spread formats the median and the worst time, in seconds.
func spread(took []time.Duration) string {
	if len(took) == 0 {
		return "–"
	}
	slices.Sort(took)
	return fmt.Sprintf("%.1f s (%.1f s)", took[len(took)/2].Seconds(), took[len(took)-1].Seconds())
}
