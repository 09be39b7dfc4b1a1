package bench

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/redistest"
)

const (
	crowded     = 100_000 // connections of one server
	alive       = 120     // entries with a TTL of 1, 2 or 4 s whose connections are touched ten times a second
	probeEvery  = 20 * time.Millisecond
	backlogTime = 8 * time.Second
)

// backlogs are events that make a server write something about each of its 100,000
// connections at once.
var backlogs = []struct {
	name string
	make func(c *crowdedServer)
}{
	// The connection of the listener is lost, so everything is compared.
	{"compare", func(c *crowdedServer) { c.redis(c.admin.ClientKillByFilter(c.Context(), "TYPE", "pubsub")) }},
	{"emptied", func(c *crowdedServer) { c.redis(c.admin.FlushAll(c.Context())) }},
	{"join", func(c *crowdedServer) { c.all(func(conn string) { _ = c.p.Join(c.Context(), "yard", conn) }) }},
	{"metadata", func(c *crowdedServer) {
		c.all(func(conn string) {
			_ = c.p.Connections().SetMetadata(c.Context(), conn, profile+"x", mesh.MetadataOptions{})
		})
	}},
	{"disconnect", func(c *crowdedServer) { c.all(func(conn string) { _ = c.p.Disconnect(c.Context(), conn) }) }},
}

// profile is 0.9 KB of metadata.
var profile = strings.Repeat("profile ", 112)

// BenchmarkBacklog measures the time of joins and leaves of an unrelated connection,
// alone and beside each backlog, with a millisecond to Redis. It also counts the live
// members of rooms with a short TTL that are reported as left. The limits are 50 ms more
// than alone, and no such leave.
func BenchmarkBacklog(b *testing.B) {
	for _, backlog := range backlogs {
		b.Run(backlog.name, func(b *testing.B) {
			var alone, beside, most, left []float64
			for b.Loop() {
				c := newCrowdedServer(b)
				a := c.probe(3 * time.Second)
				backlog.make(c)
				with := c.probe(backlogTime)
				alone = append(alone, quantile(a, 99))
				beside = append(beside, quantile(with, 99))
				most = append(most, worst(with))
				left = append(left, float64(c.left.Load()))
				c.stop()
			}
			b.ReportMetric(median(alone), "alone-p99-ms")
			b.ReportMetric(median(beside), "beside-p99-ms")
			b.ReportMetric(median(most), "beside-worst-ms")
			b.ReportMetric(worst(left), "false-leaves")
		})
	}
}

// crowdedServer is a server with many connections, and another one that watches the rooms
// with a TTL.
type crowdedServer struct {
	*testing.B
	p     *mesh.PresenceManager
	admin *redis.Client
	left  atomic.Int64
	stop  func()
	work  sync.WaitGroup
}

func newCrowdedServer(b *testing.B) *crowdedServer {
	b.Helper()
	server := redistest.Start(b)
	proxy := redistest.Proxy(b, server.Addr())
	proxy.Delay(500 * time.Microsecond) // each way
	near := func() *mesh.PresenceManager {
		client := redis.NewClient(&redis.Options{Addr: proxy.Addr()})
		b.Cleanup(func() { _ = client.Close() })
		p, err := mesh.NewPresenceManager(mesh.Options{Redis: client})
		require.NoError(b, err)
		for _, ttl := range []int{1, 2, 4} {
			require.NoError(b, p.TrackPresence(mesh.Exact(fmt.Sprint("ttl", ttl)), mesh.PresenceOptions{TTL: time.Duration(ttl) * time.Second}))
		}
		require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		require.NoError(b, p.Start(b.Context()))
		return p
	}
	watcher := near()
	ctx, cancel := context.WithCancel(b.Context())
	c := &crowdedServer{B: b, p: near(), admin: server.Client(b)}
	c.stop = func() {
		cancel()
		c.work.Wait()
		require.NoError(b, c.p.Shutdown(context.Background()))
		require.NoError(b, watcher.Shutdown(context.Background()))
	}
	c.all(func(conn string) {
		_ = c.p.Connect(ctx, conn, profile)
		_ = c.p.Join(ctx, fmt.Sprint("hall", len(conn)), conn)
	})
	c.work.Wait()
	require.Eventually(b, func() bool { return c.p.Stats().Unwritten == 0 }, time.Minute, 10*time.Millisecond)
	c.live(ctx)
	for _, ttl := range []int{1, 2, 4} {
		c.work.Go(func() { c.watch(ctx, watcher, fmt.Sprint("ttl", ttl)) })
	}
	return c
}

// all runs do for each connection of the crowd, from many goroutines.
func (c *crowdedServer) all(do func(conn string)) {
	for w := range 2000 {
		c.work.Go(func() {
			for i := w; i < crowded; i += 2000 {
				do(fmt.Sprint("conn", i))
			}
		})
	}
}

// live makes the members of rooms with a TTL join, and touches them until ctx ends.
func (c *crowdedServer) live(ctx context.Context) {
	name := func(i int) string { return fmt.Sprint("alive", i) }
	for i := range alive {
		require.NoError(c, c.p.Connect(ctx, name(i), nil))
		require.NoError(c, c.p.Join(ctx, fmt.Sprint("ttl", 1<<(i%3)), name(i)))
	}
	c.work.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			for i := range alive {
				_ = c.p.Touch(name(i))
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
}

// watch counts the leaves of a room in which each member stays.
func (c *crowdedServer) watch(ctx context.Context, p *mesh.PresenceManager, room string) {
	for e, err := range p.Subscribe(ctx, room, mesh.SubscribeOptions{}) {
		if err != nil {
			return
		}
		if e.Type == mesh.EventLeave {
			c.left.Add(1)
		}
	}
}

// probe makes new connections join and leave a room one after the other, and returns the
// times of these in ms.
func (c *crowdedServer) probe(d time.Duration) []float64 {
	var took []float64
	begun := time.Now()
	for n := 0; time.Since(begun) < d; n++ {
		conn, room := fmt.Sprint("probe", begun.UnixNano(), "-", n), fmt.Sprint("aside", n)
		_ = c.p.Connect(c.Context(), conn, nil)
		at := time.Now()
		err := c.p.Join(c.Context(), room, conn)
		took = append(took, float64(time.Since(at).Microseconds())/1e3)
		if err != nil {
			c.Logf("join %d after %v: %v", n, time.Since(begun).Round(time.Millisecond), err)
		}
		at = time.Now()
		_, _ = c.p.Leave(c.Context(), room, conn)
		took = append(took, float64(time.Since(at).Microseconds())/1e3)
		c.work.Go(func() { _ = c.p.Disconnect(c.Context(), conn) })
		time.Sleep(max(0, probeEvery-time.Since(at)))
	}
	return took
}

func (c *crowdedServer) redis(cmd redis.Cmder) { require.NoError(c, cmd.Err()) }

// quantile returns the p-th percentile.
func quantile(list []float64, p int) float64 {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)*p/100]
}
