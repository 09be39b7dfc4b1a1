package bench

import (
	"flag"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

var (
	soakMinutes     = flag.Float64("soak.minutes", 0, "`minutes` for which TestSoak runs; 0: it is skipped")
	soakServers     = flag.Int("soak.servers", 12, "servers of TestSoak")
	soakConnections = flag.Int("soak.connections", 20_000, "connections of TestSoak")
	soakLoad        = flag.Float64("soak.load", 1, "load of each connection, as a multiple of: another room every two minutes, a state as often, "+
		"another room to watch every five, a lost connection every ten, silence every hour and a half")
	soakSabotage = flag.Bool("soak.sabotage", false, "write a member without a client into Redis: TestSoak must fail")
)

const (
	// perClientProcess is the number of sockets of a process of clients, because the
	// system limits its files.
	perClientProcess = 5_000
	// quietBound is the time after the last change until everything must be correct: a
	// dead server's lease and a second, a comparison, and the delay of a busy machine.
	quietBound = 30 * time.Second
	// comeBack limits the time until the clients of a server that ended are served by the
	// others.
	comeBack    = 2 * time.Minute
	memberKeys  = "mesh:presence:members:"
	soakPerRoom = 20 // connections in a room
)

// TestSoak runs a group of servers with real sockets, for the time of -soak.minutes.
// Clients join, leave, publish, watch, lose their connection or become silent. Servers
// are drained and replaced, and some are killed. Each watcher's ledger must be correct at
// all times, and agree with Redis whenever the clients pause. The cost of a connection
// must not grow. When all clients have gone, Redis must hold only keys with a TTL.
func TestSoak(t *testing.T) {
	if *soakMinutes <= 0 {
		t.Skip("needs -soak.minutes")
	}
	s := newSoak(t)
	s.rampUp()
	duration := time.Duration(*soakMinutes * float64(time.Minute))
	cycle := min(2*time.Minute, duration/2)
	begun := time.Now()
	for n := 1; time.Since(begun)+cycle/2 < duration; n++ {
		end := begun.Add(time.Duration(n) * cycle)
		s.replace(n%2 == 0)
		for next := time.Now(); time.Now().Before(end); next = next.Add(time.Minute) {
			time.Sleep(min(time.Until(next), time.Until(end)))
			s.report()
		}
		if *soakSabotage && n == 1 {
			require.NoError(t, s.client.HSet(t.Context(), memberKeys+s.rooms[0], "ghost", "x").Err())
		}
		s.quiet()
	}
	s.report()
	s.flat()
	s.finish()
}

// soak is one run of TestSoak.
type soak struct {
	t       *testing.T
	began   time.Time
	client  *redis.Client
	cfg     peer.MemberConfig
	rooms   []string
	servers []*soakMember
	clients []*process
	made    int // servers so far
	turn    int // number of the next server to replace
	samples []sample

	lastCPU    map[string]float64
	lastLook   time.Time
	lastEvents int64
}

// soakMember is the process of one server.
type soakMember struct {
	*process
	name string
	addr string
	born time.Time
	base peer.Memory // before any client connected
}

// sample is the memory of a server at one moment.
type sample struct {
	at          time.Time
	server      string
	lasting     bool // it is one of those that are never replaced
	connections int
	heap        float64 // bytes for each connection
	goroutines  float64 // for each connection
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	r := redistest.Start(t)
	s := &soak{t: t, began: time.Now(), client: r.Client(t), lastCPU: map[string]float64{}, lastLook: time.Now()}
	s.cfg = peer.MemberConfig{
		Redis: r.Addr(), LatencyInterval: time.Minute, Warn: true,
		Rules: []peer.Rule{{Expr: "^room"}, {Expr: "^ttl", TTL: 15 * time.Second}},
	}
	for i := range max(*soakConnections/soakPerRoom, 10) {
		name := "room"
		if i%10 == 0 {
			name = "ttl"
		}
		s.rooms = append(s.rooms, fmt.Sprintf("%s%d", name, i))
	}
	for range *soakServers {
		s.servers = append(s.servers, s.launch())
	}
	return s
}

// launch starts one more server.
func (s *soak) launch() *soakMember {
	s.t.Helper()
	s.made++
	p := start(s.t, "server")
	m := &soakMember{process: p, name: fmt.Sprintf("s%d", s.made), addr: serveSoak.on(p, s.cfg), born: time.Now()}
	m.base = lookSoak.on(p, true).Memory
	return m
}

func (s *soak) addrs() (list []string) {
	for _, m := range s.servers {
		list = append(list, m.addr)
	}
	return list
}

// rampUp connects all clients.
func (s *soak) rampUp() {
	s.t.Helper()
	n := (*soakConnections + perClientProcess - 1) / perClientProcess
	share := *soakConnections / n
	rate := float64(share) * *soakLoad
	for range n {
		p := start(s.t, "load")
		startSoak.on(p, load.SoakConfig{
			Redis: s.cfg.Redis, Prefix: memberKeys, Addrs: s.addrs(), Connections: share, Rooms: s.rooms, Watchers: 0.25,
			DialsPerSecond: 600 / float64(n), Paused: true,
			Moves: rate / 120, States: rate / 120, Turns: rate / 300, Drops: rate / 600, Deaths: rate / 5400,
		})
		s.clients = append(s.clients, p)
	}
	s.settle(5 * time.Minute)
	each(s.clients, func(p *process) bool { return pauseSoak.on(p, false) })
	s.t.Logf("%d connections on %d servers after %v", share*n, len(s.servers), time.Since(s.began).Round(time.Second))
}

// each runs do for all processes of clients at once.
func each[R any](list []*process, do func(p *process) R) []R {
	out := make([]R, len(list))
	var wg sync.WaitGroup
	for i, p := range list {
		wg.Go(func() { out[i] = do(p) })
	}
	wg.Wait()
	return out
}

// settle waits until every client is served.
func (s *soak) settle(within time.Duration) {
	s.t.Helper()
	waiting := each(s.clients, func(p *process) int { return settleSoak.on(p, within) })
	for _, n := range waiting {
		if n > 0 {
			s.t.Errorf("%d clients still wait after %v", n, within)
		}
	}
}

// replace starts a new server and then drains an old one. If kill is true, it kills the
// old one first. A quarter of the servers last for the whole run.
func (s *soak) replace(kill bool) {
	s.t.Helper()
	lasting := max(len(s.servers)/4, 1)
	i := lasting + s.turn%(len(s.servers)-lasting)
	s.turn++
	old := s.servers[i]
	if kill {
		old.kill()
	}
	s.servers[i] = s.launch()
	addrs := s.addrs()
	each(s.clients, func(p *process) bool { return pointSoak.on(p, addrs) })
	if kill {
		s.t.Logf("%s was killed, %s takes its place", old.name, s.servers[i].name)
		return
	}
	drainSoak.on(old.process, min(20*time.Second, time.Duration(*soakMinutes*float64(5*time.Second))))
	s.t.Logf("%s was drained, %s took its place", old.name, s.servers[i].name)
}

// quiet pauses the clients, and compares their updates, their own state, and Redis.
func (s *soak) quiet() {
	s.t.Helper()
	each(s.clients, func(p *process) bool { return pauseSoak.on(p, true) })
	s.settle(comeBack)
	paused := time.Now()
	var wrong []string
	watching := 0
	for {
		wrong, watching = s.differences()
		if len(wrong) == 0 || time.Since(paused) > quietBound {
			break
		}
		time.Sleep(time.Second)
	}
	for _, text := range wrong {
		s.t.Errorf("%v after all was quiet: %s", time.Since(paused).Round(time.Second), text)
	}
	s.t.Logf("quiet: %d ledgers and all clients agree with Redis after %v", watching, time.Since(paused).Round(time.Millisecond))
	each(s.clients, func(p *process) bool { return pauseSoak.on(p, false) })
}

// differences lists the disagreements.
func (s *soak) differences() (wrong []string, watching int) {
	s.t.Helper()
	mine := map[string]struct{}{}
	for _, truth := range each(s.clients, func(p *process) load.SoakTruth { return truthSoak.on(p, true) }) {
		watching += truth.Watching
		if truth.Wrong > 0 {
			wrong = append(wrong, fmt.Sprintf("%d differences, such as %q", truth.Wrong, truth.Examples))
		}
		for _, id := range truth.Mine {
			mine[id] = struct{}{}
		}
	}
	held, err := load.Members(s.t.Context(), s.client, memberKeys, s.rooms)
	require.NoError(s.t, err)
	for room, members := range held {
		for id := range members {
			if _, ok := mine[id]; !ok {
				wrong = append(wrong, fmt.Sprintf("Redis holds %s in %s, which no client is", id, room))
			}
		}
	}
	return wrong, watching
}

// finish makes all clients leave, and looks for keys that they have left in Redis.
func (s *soak) finish() {
	s.t.Helper()
	each(s.clients, func(p *process) bool { return stopSoak.on(p, true) })
	var left []string
	for end := time.Now().Add(quietBound); ; time.Sleep(time.Second) {
		left = s.lasting()
		if len(left) == 0 || time.Now().After(end) {
			break
		}
	}
	if len(left) > 0 {
		s.t.Errorf("%d keys without TTL are left, such as %q", len(left), left[:min(len(left), 10)])
	}
	for _, m := range s.servers {
		drainSoak.on(m.process, 0)
	}
}

// lasting returns the keys without a TTL, except for those that exist without clients
// too.
func (s *soak) lasting() (list []string) {
	s.t.Helper()
	var keys []string
	for it := s.client.Scan(s.t.Context(), 0, "*", 1000).Iterator(); it.Next(s.t.Context()); {
		keys = append(keys, it.Val())
	}
	for part := range slices.Chunk(keys, 1000) {
		pipe := s.client.Pipeline()
		ttls := make([]*redis.DurationCmd, len(part))
		for i, key := range part {
			ttls[i] = pipe.PTTL(s.t.Context(), key)
		}
		_, err := pipe.Exec(s.t.Context())
		require.NoError(s.t, err)
		for i, key := range part {
			if ttls[i].Val() == -1 && key != "mesh:format" && key != "mesh:instances" {
				list = append(list, key)
			}
		}
	}
	return list
}
