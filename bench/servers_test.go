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

// orphans is the number of entries with a TTL of the server that dies. Redis publishes
// the expired events of so few keys within seconds.
const orphans = 200

// watchShare watches some of a crowd's rooms, so that each room is watched by one server,
// for any number of servers.
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

// BenchmarkServers measures the cost in Redis of each kind of operation while the same
// load is spread over more and more servers: the commands, including those within
// scripts, the script calls, and the processor time. The base load of the servers
// (heartbeats, comparisons) is measured without load, and subtracted. The number of
// changes in one script call depends on the load, because callers that wait at the same
// time share a call.
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

// cost is the load on Redis per second, or per operation.
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

// less subtracts a multiple of the base load.
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

// group is several servers that share one load.
type group struct {
	b       *testing.B
	client  *redis.Client
	cfg     peer.MemberConfig
	members []*process
	rate    float64
	idle    cost // per second, without load
}

func newGroup(b *testing.B, n int, rate float64) *group {
	b.Helper()
	r := redistest.Start(b)
	g := &group{b: b, client: r.Client(b), rate: rate, cfg: peer.MemberConfig{
		Redis: r.Addr(),
		// So long that entries that run out before their server's lease does have left
		// when it ends.
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

// share makes every server do its share of a job.
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
	time.Sleep(11 * time.Second) // the first heartbeat checks all keys
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

// compared is the interval at which a server compares its watched rooms with Redis.
const compared = 10 * time.Second

// during returns the cost of each of n operations, less the base load. It measures for a
// multiple of the comparison interval, so that the number of comparisons is that of the
// base load.
func (g *group) during(n int, do func()) cost {
	begun, before := time.Now(), usage(g.b, g.client)
	do()
	time.Sleep(compared - time.Since(begun)%compared)
	used := usage(g.b, g.client).Since(before)
	return per(used, float64(n)).less(g.idle, time.Since(begun).Seconds()/float64(n))
}

// orphaned returns the cost of each entry with a TTL whose server dies. Redis's expired
// event goes to all servers.
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
