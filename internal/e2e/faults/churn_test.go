//go:build unix

package faults

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

var (
	churnSeconds = flag.Int("churn.seconds", 8, "how long TestChurn goes on drawing faults")
	churnConns   = flag.Int("churn.conns", 60, "connections of TestChurn")
	churnSeed    = flag.Uint64("churn.seed", 1, "what TestChurn draws its faults from; 0: something else every time")
	churnLease   = flag.Duration("churn.lease", 2*time.Second, "LeaseTTL of TestChurn's servers")
	churnFaults  = flag.String("churn.faults", "", "the only faults for TestChurn to draw, by name, with semicolons between")
)

// TestChurn is the whole of what TestFaults/churn is the short form of. It
// takes somewhat more than a minute:
//
//	go test -run TestChurn -v -churn.seconds=60 -churn.conns=200 -churn.seed=7 .
func TestChurn(t *testing.T) {
	t.Parallel()
	told := false
	flag.Visit(func(f *flag.Flag) { told = told || strings.HasPrefix(f.Name, "churn.") })
	if !told {
		t.Skip("say for how long: go test -run TestChurn -v -churn.seconds=60 -churn.conns=200 -churn.seed=7 .")
	}
	churned(t)
}

func init() { faultCases = append([]faultCase{{"churn", churned}}, faultCases...) }

// churned lets connections come and go on four servers, two of them processes
// of their own, while one fault after the other is drawn from a seed. After
// each everything is compared with what the connections asked for: what Redis
// holds, and what every watcher has been told, none of it twice.
func churned(t *testing.T) {
	harness.UnhurriedOnly(t, "leases and TTLs of one or two seconds")
	st := newStorm(t, *churnSeed)
	st.run(time.Duration(*churnSeconds) * time.Second)
	st.finish()
}

// storm is one run of TestChurn. Its methods are called from the test's own
// goroutine, where nothing else is said.
type storm struct {
	*harness.World
	seed   uint64
	rng    *rand.Rand // decides the schedule
	lease  time.Duration
	ttl    time.Duration // of roomTimed
	rooms  []string
	posts  []*post
	souls  []*soul
	admin  *redis.Client // past all proxies
	reads  *store.Store  // past all proxies and servers
	began  time.Time
	report report

	held  sync.RWMutex // held for reading during a step of a soul, for writing while everything is compared
	quit  chan struct{}
	slow  atomic.Bool // this process was held up for long, since somebody looked last
	ended sync.Once
	going sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	truth   map[string]harness.Sight
	departs map[string]int      // how often each connection may have been told to have left
	events  map[string][]string // what happened to each connection
	since   map[string]struct{} // who departed after what Redis goes back to; nil: it does not go back
	faulty  []string            // what must not be
}

func newStorm(t *testing.T, seed uint64) *storm {
	t.Helper()
	if seed == 0 {
		seed = rand.Uint64()
	}
	st := &storm{
		seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), lease: *churnLease, ttl: *churnLease,
		rooms: []string{"a", "b", "c", harness.RoomTimed}, quit: make(chan struct{}), began: time.Now(),
		truth: make(map[string]harness.Sight), departs: make(map[string]int), events: make(map[string][]string),
	}
	// What is acknowledged survives the process, if not the machine.
	st.World = harness.RealWorld(t, redistest.WithRDB(), redistest.WithAOF(), redistest.Args("--appendfsync", "no",
		"--user", "app", "on", ">pw", "~*", "&*", "+@all", "-config"))
	st.admin = st.Real.Client(t)
	st.reads = store.New(st.admin, testhook.NewKeys(harness.RedisPrefix, 0, 1, false))
	for _, room := range st.rooms {
		st.truth[room] = harness.Sight{}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("-churn.seed=%d -churn.seconds=%d -churn.conns=%d -churn.lease=%v: %s", st.seed, *churnSeconds,
				*churnConns, st.lease, strings.Join(st.report.schedule, "; "))
		}
	})
	for i := range 2 {
		st.posts = append(st.posts, newLocal(st, i), newRemote(st, i))
	}
	for i := range *churnConns {
		// A post's connections are in every room, and a quarter of those in each
		// come only once.
		room := i / len(st.posts)
		s := &soul{
			st: st, post: st.posts[i%len(st.posts)], room: st.rooms[room%len(st.rooms)],
			steady: room/len(st.rooms)%4 == 0, rng: rand.New(rand.NewPCG(seed, uint64(2+i))),
		}
		st.souls = append(st.souls, s)
		st.going.Go(s.live)
	}
	t.Cleanup(st.calm)
	st.overhear()
	st.going.Go(st.gauge)
	return st
}

// calm ends the souls' doings. It may be called again.
func (st *storm) calm() {
	st.ended.Do(func() { close(st.quit) })
	st.going.Wait()
}

// gauge notes when this process is held up for so long that a connection with a
// TTL may fall silent in earnest: what it has to show for itself goes from one
// goroutine to the next some times.
func (st *storm) gauge() {
	const every, late = 20 * time.Millisecond, 150 * time.Millisecond
	t := time.NewTicker(every)
	defer t.Stop()
	for last := time.Now(); ; {
		select {
		case <-t.C:
		case <-st.quit:
			return
		}
		now := time.Now()
		if now.Sub(last) > every+late {
			st.slow.Store(true)
			st.report.slow.Add(1)
		}
		last = now
	}
}

// run draws faults for that long.
func (st *storm) run(d time.Duration) {
	st.settle("", nil, time.Now())
	for until := time.Now().Add(d); time.Now().Before(until); {
		for _, f := range st.deck() {
			if time.Now().After(until) {
				break
			}
			st.strike(f)
		}
	}
}

// deck returns all faults, in an order that the seed decides.
func (st *storm) deck() []churnFault {
	list := slices.Clone(churnFaultList)
	if *churnFaults != "" {
		only := strings.Split(*churnFaults, ";")
		list = slices.DeleteFunc(list, func(f churnFault) bool { return !slices.Contains(only, f.name) })
		require.NotEmpty(st.T, list, "faults of those names")
	}
	st.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// strike lets one fault begin and end under load, and waits until everything is
// as it should be.
func (st *storm) strike(f churnFault) {
	st.T.Helper()
	d := st.between(f.least, f.most)
	on := st.posts[st.rng.IntN(len(st.posts))]
	for f.child && on.local != nil {
		on = st.posts[st.rng.IntN(len(st.posts))]
	}
	st.Sleep(st.between(0.1, 0.3)) // load, not synchronisation
	what := f.name
	if f.isolates || f.child {
		what += " " + on.name
	}
	st.report.schedule = append(st.report.schedule,
		fmt.Sprintf("%.1fs %s %.1fs", time.Since(st.began).Seconds(), what, d.Seconds()))
	f.strike(st, on, d)
	var hit *post
	if f.isolates {
		hit = on
	}
	st.report.recovered(f.name, st.settle(what, hit, time.Now()))
}

// between draws a part of the lease.
func (st *storm) between(least, most float64) time.Duration {
	return time.Duration((least + st.rng.Float64()*(most-least)) * float64(st.lease))
}

// settle keeps everybody still, waits until everything is as it should be, and
// returns how long that took since the end of a fault. hit is the post that it
// took away from Redis, nil for none.
func (st *storm) settle(what string, hit *post, since time.Time) time.Duration {
	st.T.Helper()
	st.held.Lock()
	defer st.held.Unlock()
	for _, s := range st.souls {
		s.sync()
	}
	slow := st.slow.Swap(false)
	for _, p := range st.posts {
		p.excuse(p == hit, slow)
	}
	st.rollback()
	// Servers that died one lease after Redis was back to be judged, and those
	// in doubt since then; twice what promise 1 and patience come to.
	within := st.Unhurried(2*(st.lease+time.Second) + st.lease)
	var last string
	for last = st.compare(); last != ""; last = st.compare() {
		if time.Since(since) > within {
			require.FailNow(st.T, fmt.Sprintf("not as it should be %v after %q", within, what), "%s\n%s", last, st.stories(last))
		}
		if st.slow.Swap(false) {
			for _, p := range st.posts {
				p.excuse(false, true)
			}
		}
		st.Sleep(5 * time.Millisecond)
	}
	took := time.Since(since)
	st.once(what)
	return took
}

// finish lets everybody leave and the servers stop: nothing may be left.
func (st *storm) finish() {
	st.T.Helper()
	st.Sleep(st.lease / 2)
	st.settle("the last fault", nil, time.Now())
	st.report.log(st)
	st.calm()
	for _, s := range st.souls {
		s.end()
	}
	st.settle("everybody left", nil, time.Now())
	d := &drill{World: st.World}
	for _, p := range st.posts {
		if p.local != nil {
			d.servers = append(d.servers, p.local)
		}
	}
	for i, p := range st.posts {
		if p.local == nil && i%4 == 1 { // one of them says good-bye
			require.NoError(st.T, p.take().Stop())
		} else if p.local == nil {
			p.take().Die()
		}
	}
	d.over()
}
