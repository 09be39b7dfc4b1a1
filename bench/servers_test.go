package bench

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

var (
	serversEntries = flag.Int("servers.entries", 4000, "entries of all servers of BenchmarkServers together")
	serversRooms   = flag.Int("servers.rooms", 400, "rooms that they are in")
)

// orphans are the entries with a TTL of the server that dies. Redis tells of
// so few keys within seconds.
const orphans = 200

// watchShare watches some of a crowd's rooms, so that each is watched by one
// server, however many there are.
var watchShare = newJob("watch share", func(c crowd) (bool, error) {
	seen := make(chan error)
	watched := 0
	for r := c.Server; r < c.Rooms; r += c.Servers {
		watched++
		go func() { // ends with the process
			first := true
			for e, err := range member.Presence.Subscribe(context.Background(), c.room(r), mesh.SubscribeOptions{}) {
				if first && (err != nil || e.Type == mesh.EventSnapshot) {
					first = false
					seen <- err
				}
			}
		}()
	}
	for range watched {
		if err := <-seen; err != nil {
			return false, err
		}
	}
	return true, nil
})

// BenchmarkServers is what each kind of operation costs Redis while the same
// load is spread over more and more servers: the commands, those within scripts
// included, the script calls, and the processor time. What the servers ask for
// anyway (heartbeats, comparisons) is measured while nothing happens, and taken
// off. How many changes go in one script call depends on the load: callers
// that wait together go together.
func BenchmarkServers(b *testing.B) {
	for name, rate := range map[string]float64{"paced": 1000, "rush": 0} {
		b.Run(name, func(b *testing.B) {
			list := map[string][]float64{}
			for b.Loop() {
				for _, n := range []int{1, 2, 4, 8} {
					g := newGroup(b, n, rate)
					g.measure(list)
					g.stop()
				}
			}
			for _, kind := range []string{"join", "state", "leave", "expiry", "orphan"} {
				for _, n := range []int{1, 8} {
					b.ReportMetric(median(list[fmt.Sprint(kind, n, "commands")]), fmt.Sprintf("%s-commands-of-%d", kind, n))
					b.ReportMetric(median(list[fmt.Sprint(kind, n, "µs")]), fmt.Sprintf("%s-µs-of-%d", kind, n))
				}
			}
		})
	}
}

// cost is what Redis was asked for per second, or per operation.
type cost struct {
	commands map[string]float64
	cpu      float64 // seconds
}

// per divides a usage.
func per(u peer.Usage, n float64) cost {
	c := cost{commands: map[string]float64{}, cpu: u.CPU / n}
	for name, calls := range u.Commands {
		c.commands[name] = float64(calls) / n
	}
	return c
}

func (c cost) total() (sum float64) {
	for n := range maps.Values(c.commands) {
		sum += n
	}
	return sum
}

// less takes off what is there anyway, so many times.
func (c cost) less(idle cost, times float64) cost {
	out := cost{commands: maps.Clone(c.commands), cpu: c.cpu - idle.cpu*times}
	for name, n := range idle.commands {
		out.commands[name] -= n * times
	}
	return out
}

// String lists the commands, the most frequent first.
func (c cost) String() string {
	names := slices.SortedFunc(maps.Keys(c.commands), func(x, y string) int { return cmp.Compare(c.commands[y], c.commands[x]) })
	var out []string
	for _, name := range names {
		if n := c.commands[name]; n >= 0.01 {
			out = append(out, fmt.Sprintf("%s %.2f", name, n))
		}
	}
	return fmt.Sprintf("%.2f commands, %.1f µs: %s", c.total(), c.cpu*1e6, strings.Join(out, ", "))
}

// group is some servers that carry one load together.
type group struct {
	b       *testing.B
	client  *redis.Client
	cfg     peer.MemberConfig
	members []*process
	rate    float64
	idle    cost // per second, while nothing happens
}

func newGroup(b *testing.B, n int, rate float64) *group {
	b.Helper()
	r := redistest.Start(b)
	g := &group{b: b, client: r.Client(b), rate: rate, cfg: peer.MemberConfig{
		Redis: r.Addr(),
		// Long enough that what runs out before its server's lease does is over
		// when that ends.
		LeaseTTL: 30 * time.Second,
		Rules:    []peer.Rule{{Expr: "^room"}, {Expr: "^ttl", TTL: 5 * time.Second}, {Expr: "^orphan", TTL: time.Second}},
	}}
	for range n {
		p := start(b, "server")
		startMember.on(p, g.cfg)
		g.members = append(g.members, p)
	}
	return g
}

func (g *group) stop() {
	for _, p := range g.members {
		stopMember.on(p, true)
	}
}

// share has every server do its share of a job.
func (g *group) share(j job[crowd, bool], c crowd) {
	g.b.Helper()
	c.Begin = time.Now().UnixNano()
	var wg sync.WaitGroup
	for i, p := range g.members {
		wg.Go(func() { j.on(p, c.share(i, len(g.members))) })
	}
	wg.Wait()
}

// measure adds the cost of each kind of operation to a list.
func (g *group) measure(list map[string][]float64) {
	n := len(g.members)
	add := func(kind string, c cost) {
		list[fmt.Sprint(kind, n, "commands")] = append(list[fmt.Sprint(kind, n, "commands")], c.total())
		list[fmt.Sprint(kind, n, "µs")] = append(list[fmt.Sprint(kind, n, "µs")], c.cpu*1e6)
		g.b.Logf("%d servers, per %s: %v", n, kind, c)
	}
	c := crowd{Name: "c", Entries: *serversEntries, Rooms: *serversRooms, RoomPrefix: "room", PerSecond: g.rate}
	silent := c
	silent.RoomPrefix, silent.PerSecond = "ttl", 0
	g.share(connectCrowd, c)
	g.share(watchShare, c)
	g.share(watchShare, silent)
	time.Sleep(11 * time.Second) // the first heartbeat looks through all that there is
	before := usage(g.b, g.client)
	time.Sleep(2 * compared) // two renewals
	g.idle = per(usage(g.b, g.client).Since(before), 2*compared.Seconds())
	g.b.Logf("%d servers, per second while nothing happens: %v", n, g.idle)

	add("join", g.during(c.Entries, func() { g.share(joinCrowd, c) }))
	add("state", g.during(c.Entries, func() { g.share(stateCrowd, c) }))
	add("leave", g.during(c.Entries, func() { g.share(leaveCrowd, c) }))
	g.share(joinCrowd, silent)
	add("expiry", g.during(c.Entries, func() {
		for entries := 1; entries > 0; time.Sleep(100 * time.Millisecond) {
			entries = 0
			for _, p := range g.members {
				s := statsOf.on(p, true)
				entries += s.Entries + s.Unwritten
			}
		}
	}))
	add("orphan", g.orphaned())
}

// compared is how often a server compares what it watches with Redis.
const compared = 10 * time.Second

// during returns what each of n operations has cost, less what is there anyway.
// It counts for a multiple of the time in which comparisons come round, so that
// there are as many of them as were taken off.
func (g *group) during(n int, do func()) cost {
	begun, before := time.Now(), usage(g.b, g.client)
	do()
	time.Sleep(compared - time.Since(begun)%compared)
	used := usage(g.b, g.client).Since(before)
	return per(used, float64(n)).less(g.idle, time.Since(begun).Seconds()/float64(n))
}

// orphaned is the cost of each entry with a TTL whose server dies: Redis's
// expired event goes to all servers.
func (g *group) orphaned() cost {
	doomed := start(g.b, "server")
	startMember.on(doomed, g.cfg)
	c := crowd{Name: "o", Entries: orphans, Rooms: orphans / 10, RoomPrefix: "orphan"}
	connectCrowd.on(doomed, c)
	joinCrowd.on(doomed, c)
	watchCrowd.on(g.members[0], c)
	return g.during(c.Entries, func() {
		doomed.kill()
		d := departed.on(g.members[0], 30*time.Second)
		require.Equal(g.b, c.Entries, d.Once, "%d leaves", d.Leaves)
		require.Equal(g.b, c.Entries, d.Leaves)
	})
}
