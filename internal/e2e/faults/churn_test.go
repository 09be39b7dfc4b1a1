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
	churnSeconds = flag.Int("churn.seconds", 8, "how long TestChurn injects faults")
	churnConns   = flag.Int("churn.conns", 60, "number of connections of TestChurn")
	churnSeed    = flag.Uint64("churn.seed", 1, "seed of TestChurn's faults; 0: another one each time")
	churnLease   = flag.Duration("churn.lease", 2*time.Second, "LeaseTTL of TestChurn's servers")
	churnFaults  = flag.String("churn.faults", "", "names of the faults that TestChurn injects, separated by semicolons")
)

// TestChurn is TestFaults/churn with a duration of your choice. This run takes somewhat
// more than a minute:
//
//	go test -run TestChurn -v -churn.seconds=60 -churn.conns=200 -churn.seed=7 .
func TestChurn(t *testing.T) {
	t.Parallel()
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || strings.HasPrefix(f.Name, "churn.") })
	if !set {
		t.Skip("set a duration: go test -run TestChurn -v -churn.seconds=60 -churn.conns=200 -churn.seed=7 .")
	}
	churned(t)
}

func init() { faultCases = append([]faultCase{{"churn", churned}}, faultCases...) }

// churned runs clients on four servers, two of them in child processes, and injects one
// fault after the other. A seed decides the order. After each fault, the entries in
// Redis and the updates of every watcher are compared with the requests of the clients.
func churned(t *testing.T) {
	harness.UnhurriedOnly(t, "leases and TTLs of one or two seconds")
	ct := newChurnTest(t, *churnSeed)
	ct.run(time.Duration(*churnSeconds) * time.Second)
	ct.finish()
}

// churnTest is one run of TestChurn. The test's own goroutine calls its methods, unless
// their comments say otherwise.
type churnTest struct {
	*harness.World
	seed    uint64
	rng     *rand.Rand // source of the schedule
	lease   time.Duration
	ttl     time.Duration // TTL of harness.RoomTimed
	rooms   []string
	slots   []*serverSlot
	clients []*churnClient
	admin   *redis.Client // not through a proxy
	reads   *store.Store  // reads Redis without a server
	began   time.Time
	report  report

	stepLock sync.RWMutex // held for reading during a step of a client, for writing during a comparison
	quit     chan struct{}
	slow     atomic.Bool // this process stalled since the last check
	ended    sync.Once
	going    sync.WaitGroup

	mu            sync.Mutex // guards the fields below
	expected      map[string]harness.MemberStates
	allowedLeaves map[string]int      // allowed number of leaves, by connection
	histories     map[string][]string // lines about each connection
	afterSave     map[string]struct{} // connections that left after the state to which Redis will return; nil without a rollback
	violations    []string
}

func newChurnTest(t *testing.T, seed uint64) *churnTest {
	t.Helper()
	if seed == 0 {
		seed = rand.Uint64()
	}
	ct := &churnTest{
		seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), lease: *churnLease, ttl: *churnLease,
		rooms: []string{"a", "b", "c", harness.RoomTimed}, quit: make(chan struct{}), began: time.Now(),
		expected: make(map[string]harness.MemberStates), allowedLeaves: make(map[string]int), histories: make(map[string][]string),
	}
	// Acknowledged writes survive the end of the Redis process.
	ct.World = harness.RealWorld(t, redistest.WithRDB(), redistest.WithAOF(), redistest.Args("--appendfsync", "no",
		"--user", "app", "on", ">pw", "~*", "&*", "+@all", "-config"))
	ct.admin = ct.Real.Client(t)
	ct.reads = store.New(ct.admin, testhook.NewKeys(harness.RedisPrefix, 0, 1, false))
	for _, room := range ct.rooms {
		ct.expected[room] = harness.MemberStates{}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("-churn.seed=%d -churn.seconds=%d -churn.conns=%d -churn.lease=%v: %s", ct.seed, *churnSeconds,
				*churnConns, ct.lease, strings.Join(ct.report.schedule, "; "))
		}
	})
	for i := range 2 {
		ct.slots = append(ct.slots, newLocal(ct, i), newRemote(ct, i))
	}
	for i := range *churnConns {
		// Each server has connections in every room. A quarter of them are steady.
		room := i / len(ct.slots)
		s := &churnClient{
			ct: ct, slot: ct.slots[i%len(ct.slots)], room: ct.rooms[room%len(ct.rooms)],
			steady: room/len(ct.rooms)%4 == 0, rng: rand.New(rand.NewPCG(seed, uint64(2+i))),
		}
		ct.clients = append(ct.clients, s)
		ct.going.Go(s.run)
	}
	t.Cleanup(ct.stop)
	ct.recordEvents()
	ct.going.Go(ct.detectStalls)
	return ct
}

// stop stops the clients. It may be called several times.
func (ct *churnTest) stop() {
	ct.ended.Do(func() { close(ct.quit) })
	ct.going.Wait()
}

// detectStalls records when this process was delayed for so long that a connection with
// a TTL may have been silent for real: its signs of life pass through several
// goroutines.
func (ct *churnTest) detectStalls() {
	const every, late = 20 * time.Millisecond, 150 * time.Millisecond
	t := time.NewTicker(every)
	defer t.Stop()
	for last := time.Now(); ; {
		select {
		case <-t.C:
		case <-ct.quit:
			return
		}
		now := time.Now()
		if now.Sub(last) > every+late {
			ct.slow.Store(true)
			ct.report.slow.Add(1)
		}
		last = now
	}
}

// run injects faults for the given time.
func (ct *churnTest) run(d time.Duration) {
	ct.settle("", nil, time.Now())
	for until := time.Now().Add(d); time.Now().Before(until); {
		for _, f := range ct.shuffledFaults() {
			if time.Now().After(until) {
				break
			}
			ct.inject(f)
		}
	}
}

// shuffledFaults returns all faults in an order that the seed decides.
func (ct *churnTest) shuffledFaults() []churnFault {
	list := slices.Clone(churnFaultList)
	if *churnFaults != "" {
		only := strings.Split(*churnFaults, ";")
		list = slices.DeleteFunc(list, func(f churnFault) bool { return !slices.Contains(only, f.name) })
		require.NotEmpty(ct.T, list, "no faults of these names")
	}
	ct.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// inject runs one fault under load, and waits for the recovery.
func (ct *churnTest) inject(f churnFault) {
	ct.T.Helper()
	d := ct.between(f.least, f.most)
	on := ct.slots[ct.rng.IntN(len(ct.slots))]
	for f.child && on.local != nil {
		on = ct.slots[ct.rng.IntN(len(ct.slots))]
	}
	ct.Sleep(ct.between(0.1, 0.3)) // for load, not to synchronise
	what := f.name
	if f.isolates || f.child {
		what += " " + on.name
	}
	ct.report.schedule = append(ct.report.schedule,
		fmt.Sprintf("%.1fs %s %.1fs", time.Since(ct.began).Seconds(), what, d.Seconds()))
	f.inject(ct, on, d)
	var isolated *serverSlot
	if f.isolates {
		isolated = on
	}
	ct.report.recovered(f.name, ct.settle(what, isolated, time.Now()))
}

// between returns a random duration between two fractions of the lease.
func (ct *churnTest) between(least, most float64) time.Duration {
	return time.Duration((least + ct.rng.Float64()*(most-least)) * float64(ct.lease))
}

// settle stops all steps, waits for the recovery, and returns its time since the end of
// a fault. isolated is the server that the fault cut off from Redis, or nil.
func (ct *churnTest) settle(what string, isolated *serverSlot, since time.Time) time.Duration {
	ct.T.Helper()
	ct.stepLock.Lock()
	defer ct.stepLock.Unlock()
	for _, s := range ct.clients {
		s.checkEnded()
	}
	slow := ct.slow.Swap(false)
	for _, p := range ct.slots {
		p.allowLeaves(p == isolated, slow)
	}
	ct.endRollback()
	// A server may have died one lease after Redis was back. Then it has to be declared
	// dead, and unconfirmed members have to end. The limit is twice the promised time.
	within := ct.Unhurried(2*(ct.lease+time.Second) + ct.lease)
	var last string
	for last = ct.compare(); last != ""; last = ct.compare() {
		if time.Since(since) > within {
			require.FailNow(ct.T, fmt.Sprintf("no recovery within %v after %q", within, what), "%s\n%s", last, ct.historiesIn(last))
		}
		if ct.slow.Swap(false) {
			for _, p := range ct.slots {
				p.allowLeaves(false, true)
			}
		}
		ct.Sleep(5 * time.Millisecond)
	}
	took := time.Since(since)
	ct.checkLeaves(what)
	return took
}

// finish closes all connections and stops the servers. Then nothing may be left in
// Redis.
func (ct *churnTest) finish() {
	ct.T.Helper()
	ct.Sleep(ct.lease / 2)
	ct.settle("the last fault", nil, time.Now())
	ct.report.log(ct)
	ct.stop()
	for _, s := range ct.clients {
		s.disconnect()
	}
	ct.settle("all connections closed", nil, time.Now())
	d := &drill{World: ct.World}
	for _, p := range ct.slots {
		if p.local != nil {
			d.servers = append(d.servers, p.local)
		}
	}
	for i, p := range ct.slots {
		if p.local == nil && i%4 == 1 { // one of them shuts down
			require.NoError(ct.T, p.takeChild().Stop())
		} else if p.local == nil {
			p.takeChild().Die()
		}
	}
	d.finish()
}
