package sim

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/meshtest"
)

var (
	simSeed   = flag.Int64("sim.seed", -1, "run only that seed of TestSimulation, several times until it fails")
	simSeeds  = flag.Int64("sim.seeds", simDefault, "run that many seeds of TestSimulation; 0: none")
	simFrom   = flag.Int64("sim.from", 0, "first seed for -sim.seeds")
	simFirst  = flag.Bool("sim.first", false, "skip what is left after the first failure")
	simLog    = flag.Bool("sim.log", false, "say of a failed seed what the servers logged, too")
	simFaults = flag.String("sim.faults", "", "comma-separated names of the only faults to use, instead of the seed's")
)

// simShort is how many seeds run with -short at most.
const simShort = 3

// simStop says that a seed has failed.
var simStop atomic.Bool

// TestSimulation lets servers, connections and faults follow a schedule that a
// number stands for, in virtual time, and compares what everybody is told with
// a model of what is true. The number decides the schedule, not how goroutines
// interleave or the library's own jitter: a seed that fails once is likely, but
// not certain, to fail again, and is therefore run several times.
//
// It is not parallel: it takes every processor there is, and tests in real time
// run after it.
func TestSimulation(t *testing.T) {
	if *simSeed >= 0 {
		for try := range 8 {
			if !t.Run(fmt.Sprintf("seed %d try %d", *simSeed, try), func(t *testing.T) { simulate(t, *simSeed) }) {
				return
			}
		}
		return
	}
	seeds := *simSeeds
	if testing.Short() {
		seeds = min(seeds, simShort)
	}
	t.Cleanup(func() { t.Log(&simTotal) })
	for seed := *simFrom; seed < *simFrom+seeds; seed++ {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			if *simFirst && simStop.Load() {
				t.Skip("another seed has failed")
			}
			simulate(t, seed)
		})
	}
}

// sim is one run. Only the goroutine of the schedule uses rng, later and menu.
type sim struct {
	seed    int64
	rng     *rand.Rand
	mem     *meshtest.Redis
	admin   *redis.Client // goes past all links
	lease   time.Duration
	ttl     time.Duration
	touch   time.Duration // how often connections show life
	fragile bool          // see frail
	rooms   []string
	menu    []simFault
	later   []simLater
	start   time.Time
	ctx     context.Context
	over    chan struct{}
	pumps   sync.WaitGroup // of links
	calls   sync.WaitGroup // of nodes, streams and clients
	born    int            // clients and nodes so far
	most    int            // clients at a time
	servers int            // at the start

	log       *simLogs
	injected  map[string]int
	phase     []string                   // kinds of faults since the last calm
	recovered map[string][]time.Duration // see simTally

	mu        sync.Mutex // guards the fields below, and all of the model
	nodes     []*simNode
	clients   map[string]*simClient
	entries   map[simKey]*simEntry
	streams   []*simStream
	leavesDue []simDue
	joinsDue  []simDue
	trace     []string
	failure   string
	active    int       // disturbances under way
	disturbed time.Time // until then bounds do not hold
	sick      time.Time // when all servers were last without Redis
	ghosts    time.Time // until then Redis may hold what has ended
	killed    time.Time // when a server last was, or was stopped
	noKills   time.Time // until then none is killed
	restoring time.Time // until then servers write back what an operator deleted
	allCut    bool
	allHang   bool
	takes     time.Time     // from then on it may refuse writes again
	refusal   string        // with which Redis refuses writes; "": it takes them
	stepped   time.Time     // when Redis's clock last did
	ahead     time.Duration // of Redis's clock
	told      map[string]int
}

// simDue is something that subscribers have to be told in time.
type simDue struct {
	k    simKey
	from time.Time
}

type simLater struct {
	at time.Time
	do func()
}

func simulate(t *testing.T, seed int64) {
	synctest.Test(t, func(t *testing.T) {
		s := newSim(t, seed)
		s.run()
		s.close(t)
		simTotal.add(s)
		if s.failure != "" {
			simStop.Store(true)
			t.Errorf("seed %d: %s\nreplay: go test ./internal/e2e/sim -run TestSimulation -sim.seed=%d\n%s", seed, s.failure, seed, strings.Join(s.trace, "\n")+s.log.String())
		}
	})
}

func newSim(t *testing.T, seed int64) *sim {
	rng := rand.New(rand.NewPCG(uint64(seed), 20))
	var opts []meshtest.Option
	switch rng.IntN(5) {
	case 0:
		opts = append(opts, meshtest.WithoutExpiredEvents())
	case 1:
		opts = append(opts, meshtest.WithConfigForbidden())
	}
	if _, fragile := fragileSeed(seed); fragile {
		opts = nil // with expired events, at once
	}
	mem, err := meshtest.NewRedis(opts...)
	if err != nil {
		t.Fatal(err)
	}
	past := mem.Options()
	past.MaxRetries = -1 // whoever follows the schedule must not wait
	s := &sim{
		seed: seed, rng: rng, mem: mem, admin: redis.NewClient(past), lease: time.Duration(3+rng.IntN(3)) * time.Second,
		ttl: time.Duration(1+rng.IntN(6)) * time.Second, touch: 400 * time.Millisecond, start: time.Now(), ctx: context.Background(), over: make(chan struct{}),
		clients: make(map[string]*simClient), entries: make(map[simKey]*simEntry),
		log: newSimLogs(), injected: make(map[string]int), told: make(map[string]int), recovered: make(map[string][]time.Duration),
	}
	// Servers do not share Redis's clock, or each other's.
	s.moveClock(time.Duration(rng.IntN(600)-300) * time.Second)
	rooms := 1 + rng.IntN(4)
	s.servers, s.most = 2+rng.IntN(3), 8+rng.IntN(30)
	if rng.IntN(12) == 0 { // a large one
		s.servers, s.most, rooms = 5+rng.IntN(4), 60, 5+rng.IntN(10)
	}
	for i := range rooms {
		s.rooms = append(s.rooms, fmt.Sprintf("plain%d", i), fmt.Sprintf("ttl%d", i))
	}
	s.menu = s.pickFaults()
	s.fragile = s.frail()
	return s
}

func (s *sim) at() time.Duration { return time.Since(s.start).Round(time.Millisecond) }

// note adds to the trace.
func (s *sim) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noted(format, args...)
}

func (s *sim) noted(format string, args ...any) {
	s.trace = append(s.trace, fmt.Sprintf("[%v] ", s.at())+fmt.Sprintf(format, args...))
}

// fail notes what is wrong; the first failure ends the run. s.mu is held.
func (s *sim) fail(format string, args ...any) {
	if s.failure == "" {
		s.failure = fmt.Sprintf("[%v] ", s.at()) + fmt.Sprintf(format, args...)
		s.noted("FAILED %s", s.failure)
	}
}

func (s *sim) ended() bool {
	select {
	case <-s.over:
		return true
	default:
		return false
	}
}

func (s *sim) failed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure != ""
}

// run is the schedule.
func (s *sim) run() {
	s.disturb(s.lease+2*time.Second, nil)
	for range s.servers {
		s.startNode()
	}
	s.calls.Wait()
	for range 4 + s.rng.IntN(s.most/2) {
		s.connect()
	}
	for round := range 2 {
		end := time.Now().Add(time.Duration(10+s.rng.IntN(15)) * time.Second)
		if s.fragile { // for the servers to become patient, and be it still
			end = end.Add(2 * s.lease)
		}
		fault := time.Now().Add(s.between(1, 4))
		for time.Now().Before(end) && !s.failed() {
			s.step(time.Duration(5+s.rng.IntN(120)) * time.Millisecond)
			s.act()
			if s.fragile {
				s.fray()
			}
			if time.Now().After(fault) && len(s.menu) > 0 {
				fault = time.Now().Add(s.between(0, 5))
				f := s.menu[s.rng.IntN(len(s.menu))]
				if f.begin(s) {
					s.inject(f.name)
				}
			}
		}
		s.settle(round == 1)
		if s.failed() {
			return
		}
	}
	s.farewell()
}

// between draws a duration.
func (s *sim) between(low, high float64) time.Duration {
	return time.Duration((low + s.rng.Float64()*(high-low)) * float64(time.Second))
}

// step lets time pass.
func (s *sim) step(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.showLife(now)
	s.watchHealth(now)
	s.checkDue(now)
	for _, l := range slices.Clone(s.later) {
		if !now.Before(l.at) {
			s.undo(l)
		}
	}
}

// showLife has the clients give a sign of life for which it is time. s.mu is held.
func (s *sim) showLife(now time.Time) {
	for _, c := range s.list() {
		if !c.silent && !c.node.still() && now.Sub(c.seen) >= s.touch {
			c.seen = now
			if err := c.node.p.Touch(c.id); err != nil && !c.node.dead {
				s.fail("touch %s: %v", c.id, err)
			}
		}
	}
}

// undo ends a fault before its time, or at it. s.mu is held.
func (s *sim) undo(l simLater) {
	i := slices.IndexFunc(s.later, func(o simLater) bool { return o.at.Equal(l.at) })
	s.later = slices.Delete(s.later, i, i+1)
	s.mu.Unlock()
	l.do()
	s.mu.Lock()
}

// list returns the open clients of living servers in a fixed order. s.mu is held.
func (s *sim) list() []*simClient {
	var list []*simClient
	for _, id := range slices.Sorted(maps.Keys(s.clients)) {
		if c := s.clients[id]; !c.gone {
			list = append(list, c)
		}
	}
	return list
}

// close ends everything.
func (s *sim) close(t *testing.T) {
	s.mu.Lock()
	nodes := s.nodes
	for _, st := range s.streams {
		st.over = true
		st.cancel()
	}
	s.mu.Unlock()
	for _, n := range nodes {
		n.link.set(true, false, "")
		if n.resume != nil {
			n.resume()
		}
	}
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	for _, n := range nodes {
		_ = n.p.Shutdown(ctx)
	}
	s.calls.Wait()
	for _, n := range nodes {
		long, cancel := context.WithTimeout(s.ctx, time.Minute)
		if err := n.p.Shutdown(long); errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s does not shut down", n.name)
		}
		cancel()
		_ = testhook.PartsOf(n.p).Redis.Close()
	}
	close(s.over)
	_ = s.admin.Close()
	if err := s.mem.Close(); err != nil {
		t.Error(err)
	}
	s.pumps.Wait()
	time.Sleep(time.Minute) // the client library may still be waiting to dial again
}
