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

var causesRuns = flag.Int("causes.runs", 0, "how often TestCauses goes through every cause with default options, some two minutes each; 0: once, with short ones")

// times are the options that decide how long a leave takes to be told.
type times struct {
	lease, ping, ttl time.Duration
	down, away       time.Duration // how long Redis is gone where it restarts, and where it is only away
}

var (
	defaultTimes = times{lease: 10 * time.Second, ping: 30 * time.Second, ttl: 10 * time.Second, down: 2 * time.Second, away: time.Minute}
	shortTimes   = times{lease: 2 * time.Second, ping: time.Second, ttl: 2 * time.Second, down: 500 * time.Millisecond, away: 4 * time.Second}
)

// cause is a reason why members of two rooms, one of them with a TTL, have left.
type cause struct {
	name string
	aof  bool
	// strike makes it happen and returns from when on somebody could be told.
	strike func(s *scene) time.Time
	// within is what is promised, for the rooms without and with a TTL.
	within func(t times) [2]time.Duration
}

// scene is one server with a subscriber, and another process, where the members are.
type scene struct {
	*drill
	times
	victim *harness.Child
	tunnel *redistest.ProxyServer // that the members' sockets go through
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
		// One more interval where a server's clock stood still meanwhile.
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

// byLease is what is promised after the end of a server.
func byLease(t times) [2]time.Duration {
	return [2]time.Duration{t.lease + time.Second, t.lease + time.Second}
}

// afterOutage is what is promised once Redis is back: one lease of patience,
// and for members whom it has lost the doubt about them.
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

// TestCauses measures how long it takes for each reason to leave until the
// subscribers on another server are told, and whether they are told wrongly.
func TestCauses(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	times, runs := shortTimes, 1
	if *causesRuns > 0 {
		times, runs = defaultTimes, *causesRuns
	}
	results := make([]telling, len(causes))
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

// telling is when subscribers were told of members that left.
type telling struct {
	took  [2][]time.Duration // in the rooms without and with a TTL
	wrong int                // leaves of who stayed, or told twice
}

func (c cause) run(t *testing.T, times times, out *telling) {
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
	s.patient()
	s.Sleep(rand.N(times.lease / 3)) // heartbeats and pings keep no step with it
	for _, p := range s.gone {
		p.Call("mesh/noop", map[string]any{}) // nobody has been silent before
	}
	since := c.strike(s)
	for i, room := range rooms {
		stream := s.streams[i]
		s.toldBy(since.Add(c.within(times)[i]), times.lease, func() bool {
			leaves := stream.leaves()
			return !slices.ContainsFunc(s.gone, func(p *harness.Peer) bool { return len(leaves[p.ID]) == 0 })
		}, "%s: leaves in %s", c.name, room)
	}
	s.Sleep(times.lease + 2*time.Second) // for what must not be told
	for i := range rooms {
		leaves := s.streams[i].leaves()
		for _, p := range s.gone {
			out.took[i] = append(out.took[i], leaves[p.ID][0].Sub(since))
			out.wrong += len(leaves[p.ID]) - 1
		}
		for _, p := range stay {
			for _, at := range leaves[p.ID] {
				t.Logf("%s, who stayed, was told to have left %s %v after", p.ID, rooms[i], at.Sub(since))
			}
			out.wrong += len(leaves[p.ID])
		}
	}
	s.legal()
	require.Zero(t, out.wrong, "told of leaves that were none")
}

// dialTunnel is dial for the members' sockets.
func (s *scene) dialTunnel() *harness.Peer {
	s.T.Helper()
	direct := s.victim.Addr
	s.victim.Addr = s.tunnel.Addr()
	defer func() { s.victim.Addr = direct }()
	return s.victim.Dial()
}

// tableOf returns what was measured as a table in Markdown.
func tableOf(results []telling, times times) string {
	var b strings.Builder
	fmt.Fprintf(&b, "LeaseTTL %v, PingInterval %v\n\n| somebody has left because | room without TTL | room with TTL %v | told wrongly |\n|---|---|---|---|\n", times.lease, times.ping, times.ttl)
	for i, r := range results {
		fmt.Fprintf(&b, "| %s | %s | %s | %d of %d |\n", causes[i].name, spread(r.took[0]), spread(r.took[1]), r.wrong, len(r.took[0])+len(r.took[1]))
	}
	return b.String()
}

// spread is the median and the worst, in seconds.
func spread(took []time.Duration) string {
	if len(took) == 0 {
		return "–"
	}
	slices.Sort(took)
	return fmt.Sprintf("%.1f s (%.1f s)", took[len(took)/2].Seconds(), took[len(took)-1].Seconds())
}
