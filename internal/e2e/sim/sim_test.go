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
	simSeed   = flag.Int64("sim.seed", -1, "run TestSimulation with this seed only, up to eight times, until it fails")
	simSeeds  = flag.Int64("sim.seeds", simDefault, "number of seeds for TestSimulation")
	simFrom   = flag.Int64("sim.from", 0, "first seed for -sim.seeds")
	simFirst  = flag.Bool("sim.first", false, "skip the remaining seeds after the first failure")
	simLog    = flag.Bool("sim.log", false, "print the logs of the servers if a seed fails")
	simFaults = flag.String("sim.faults", "", "comma-separated names of faults, instead of those that the seed chooses")
)

// simShort is the largest number of seeds with -short.
const simShort = 3

// simStop is true after the first failure.
var simStop atomic.Bool

// TestSimulation runs servers, connections and faults in virtual time, by a schedule
// that follows from a number, the seed. It compares the updates of all subscribers with
// a model of the truth. The seed decides neither how goroutines interleave nor the
// library's own jitter, so a seed that failed once may pass the next time. It is
// therefore run several times.
//
// The test is not parallel: it uses all processors, and tests in real time run after
// it.
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

// sim is one run. Only the goroutine of the schedule uses rng, later and faults.
type sim struct {
	seed       int64
	rng        *rand.Rand
	mem        *meshtest.Redis
	admin      *redis.Client // not through a link
	lease      time.Duration
	ttl        time.Duration
	touch      time.Duration // interval between signs of life
	fragile    bool          // see makeFragile
	rooms      []string
	faults     []simFault
	later      []simLater
	start      time.Time
	ctx        context.Context
	over       chan struct{}  // closed at the end
	pumps      sync.WaitGroup // goroutines of links
	calls      sync.WaitGroup // goroutines of servers, streams and clients
	born       int            // number of clients and servers so far
	maxClients int            // limit of open clients
	initial    int            // number of servers at the start

	log       *simLogs
	injected  map[string]int
	phase     []string                   // kinds of faults since the last settle
	recovered map[string][]time.Duration // see simTally

	mu         sync.Mutex // guards the fields below, and all of the model
	servers    []*simServer
	clients    map[string]*simClient
	entries    map[simKey]*simEntry
	streams    []*simStream
	leavesDue  []simDue
	joinsDue   []simDue
	trace      []string
	failure    string
	active     int       // number of current disturbances
	disturbed  time.Time // until then, time limits do not hold
	lastOutage time.Time // when all servers were last cut off from Redis
	restored   time.Time // until then, Redis may have entries that have ended
	killed     time.Time // when a server was last killed or stopped
	noKills    time.Time // until then, no server is killed
	restoring  time.Time // until then, servers write deleted keys again
	allCut     bool
	allHang    bool
	refuseFrom time.Time      // from then on, writes may be refused again
	refusal    string         // error for all writes; "" if Redis accepts them
	stepped    time.Time      // when the clock of Redis last stepped
	ahead      time.Duration  // difference of the clock of Redis to that of the servers
	counts     map[string]int // checked events, by type
	users      *simUsers
}

// simDue is an update that subscribers have to receive in time.
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
		opts = nil // expired events arrive at once
	}
	mem, err := meshtest.NewRedis(opts...)
	if err != nil {
		t.Fatal(err)
	}
	direct := mem.Options()
	direct.MaxRetries = -1 // the schedule must not wait
	s := &sim{
		seed: seed, rng: rng, mem: mem, admin: redis.NewClient(direct), lease: time.Duration(3+rng.IntN(3)) * time.Second,
		ttl: time.Duration(1+rng.IntN(6)) * time.Second, touch: 400 * time.Millisecond, start: time.Now(), ctx: context.Background(), over: make(chan struct{}),
		clients: make(map[string]*simClient), entries: make(map[simKey]*simEntry),
		log: newSimLogs(), injected: make(map[string]int), counts: make(map[string]int), recovered: make(map[string][]time.Duration),
	}
	// The clock of Redis differs from that of the servers.
	s.moveClock(time.Duration(rng.IntN(600)-300) * time.Second)
	rooms := 1 + rng.IntN(4)
	s.initial, s.maxClients = 2+rng.IntN(3), 8+rng.IntN(30)
	if rng.IntN(12) == 0 { // a large group
		s.initial, s.maxClients, rooms = 5+rng.IntN(4), 60, 5+rng.IntN(10)
	}
	for i := range rooms {
		s.rooms = append(s.rooms, fmt.Sprintf("plain%d", i), fmt.Sprintf("ttl%d", i))
	}
	s.users = newSimUsers(s)
	s.faults = s.pickFaults()
	s.fragile = s.makeFragile()
	return s
}

func (s *sim) at() time.Duration { return time.Since(s.start).Round(time.Millisecond) }

// note adds a line to the trace.
func (s *sim) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noted(format, args...)
}

func (s *sim) noted(format string, args ...any) {
	s.trace = append(s.trace, fmt.Sprintf("[%v] ", s.at())+fmt.Sprintf(format, args...))
}

// fail records a violation. The first one ends the run. s.mu is held.
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

// run follows the schedule.
func (s *sim) run() {
	s.disturb(s.lease+2*time.Second, nil)
	for range s.initial {
		s.startServer()
	}
	s.calls.Wait()
	for range 4 + s.rng.IntN(s.maxClients/2) {
		s.connect()
	}
	for round := range 2 {
		end := time.Now().Add(time.Duration(10+s.rng.IntN(15)) * time.Second)
		if s.fragile { // long enough for the servers to be in contact for most of the time
			end = end.Add(2 * s.lease)
		}
		fault := time.Now().Add(s.between(1, 4))
		for time.Now().Before(end) && !s.failed() {
			s.step(time.Duration(5+s.rng.IntN(120)) * time.Millisecond)
			s.act()
			s.users.act()
			if s.fragile {
				s.injectFragile()
			}
			if time.Now().After(fault) && len(s.faults) > 0 {
				fault = time.Now().Add(s.between(0, 5))
				f := s.faults[s.rng.IntN(len(s.faults))]
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
	s.leaveAll()
}

// between returns a random duration. The limits are in seconds.
func (s *sim) between(low, high float64) time.Duration {
	return time.Duration((low + s.rng.Float64()*(high-low)) * float64(time.Second))
}

// step lets time pass, and checks what is due.
func (s *sim) step(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.showLife(now)
	s.watchHealth(now)
	s.checkDue(now)
	s.users.check(now)
	for _, l := range slices.Clone(s.later) {
		if !now.Before(l.at) {
			s.undo(l)
		}
	}
}

// showLife gives the signs of life that are due. s.mu is held.
func (s *sim) showLife(now time.Time) {
	for _, c := range s.list() {
		if !c.silent && !c.server.still() && now.Sub(c.seen) >= s.touch {
			c.seen = now
			if err := c.server.p.Touch(c.id); err != nil && !c.server.dead {
				s.fail("touch %s: %v", c.id, err)
			}
		}
	}
}

// undo ends a fault, at its time or before. s.mu is held.
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

// close stops all servers and subscribers.
func (s *sim) close(t *testing.T) {
	s.mu.Lock()
	servers := s.servers
	for _, st := range s.streams {
		st.over = true
		st.cancel()
	}
	s.mu.Unlock()
	for _, n := range servers {
		n.link.set(true, false, "")
		if n.resume != nil {
			n.resume()
		}
	}
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	for _, n := range servers {
		_ = n.p.Shutdown(ctx)
	}
	s.calls.Wait()
	for _, n := range servers {
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
	time.Sleep(time.Minute) // the Redis client may still be waiting to dial again
}
