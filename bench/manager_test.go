package bench

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/centrifugal/centrifuge"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

const (
	callers = 512
	rooms   = 1000
	during  = 3 * time.Second
)

// BenchmarkManager is joins and leaves per second of 512 callers in 1,000
// rooms: through the library's manager, as a script call per operation in raw
// pipelines of 200, and with Centrifuge's presence manager and its publishing
// of join and leave.
func BenchmarkManager(b *testing.B) {
	const library, raw, other = peer.Mesh, peer.Kind("pipelines"), peer.Centrifuge
	rounds, cpu := figures{}, figures{}
	for b.Loop() {
		for k, run := range map[peer.Kind]func(*testing.B, *redis.Client) float64{
			library: libraryManager, raw: rawPipelines, other: centrifugeManager,
		} {
			client := redistest.Start(b).Client(b)
			perSecond := run(b, client)
			rounds[k] = append(rounds[k], perSecond)
			cpu[k] = append(cpu[k], usedCPU(b, client)*1e6/(perSecond*during.Seconds()))
		}
	}
	for _, k := range []peer.Kind{library, raw, other} {
		b.ReportMetric(cpu.median(k), string(k)+"-redis-µs/op")
	}
	b.ReportMetric(rounds.median(library), "mesh-ops/s")
	b.ReportMetric(rounds.median(raw), "pipelines-ops/s")
	b.ReportMetric(rounds.median(other), "centrifuge-ops/s")
	b.ReportMetric(rounds.ratio(library, raw), "×pipelines")
	b.ReportMetric(rounds.ratio(library, other), "×centrifuge")
}

// throng has all callers join and leave for a while, and returns the
// operations per second.
func throng(b *testing.B, join, leave func(room, conn string) error) float64 {
	b.Helper()
	var done atomic.Int64
	var working sync.WaitGroup
	begun := time.Now()
	for i := range callers {
		working.Go(func() {
			conn := fmt.Sprintf("conn%d", i)
			for n := i; time.Since(begun) < during; n += 7 {
				room := fmt.Sprintf("room%d", n%rooms)
				for _, op := range []func(room, conn string) error{join, leave} {
					if err := op(room, conn); err != nil {
						b.Error(err)
						return
					}
					done.Add(1)
				}
			}
		})
	}
	working.Wait()
	return float64(done.Load()) / time.Since(begun).Seconds()
}

// usedCPU is the processor time that a Redis has used so far, in seconds.
func usedCPU(b *testing.B, client *redis.Client) (total float64) {
	b.Helper()
	info, err := client.Info(b.Context(), "cpu").Result()
	require.NoError(b, err)
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if name == "used_cpu_user" || name == "used_cpu_sys" {
			seconds, err := strconv.ParseFloat(value, 64)
			require.NoError(b, err)
			total += seconds
		}
	}
	return total
}

func libraryManager(b *testing.B, client *redis.Client) float64 {
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: client})
	require.NoError(b, err)
	require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	require.NoError(b, p.Start(b.Context()))
	defer func() { require.NoError(b, p.Shutdown(context.Background())) }()
	for i := range callers {
		require.NoError(b, p.Connect(b.Context(), fmt.Sprintf("conn%d", i), nil))
	}
	ctx := b.Context()
	return throng(b,
		func(room, conn string) error { return p.Join(ctx, room, conn) },
		func(room, conn string) error { _, err := p.Leave(ctx, room, conn); return err })
}

// single is one entry's change as one would write it by hand: the record, the
// index by server, and the event, in one script.
var single = redis.NewScript(`
if ARGV[1] == 'join' then
  if redis.call('HSETNX', KEYS[1], ARGV[2], ARGV[3]) == 0 then return 0 end
  redis.call('SADD', KEYS[2], ARGV[4])
else
  if redis.call('HDEL', KEYS[1], ARGV[2]) == 0 then return 0 end
  redis.call('SREM', KEYS[2], ARGV[4])
end
redis.call('PUBLISH', ARGV[5], ARGV[1] .. ARGV[2] .. redis.call('HINCRBY', KEYS[3], 'seq', 1))
return 1`)

// rawPipelines is the limit: one goroutine per connection of the pool, each
// with pipelines of 200 calls, and nobody who waits for an answer of his own.
func rawPipelines(b *testing.B, client *redis.Client) float64 {
	ctx := b.Context()
	require.NoError(b, single.Load(ctx, client).Err())
	var done atomic.Int64
	var working sync.WaitGroup
	begun := time.Now()
	for w := range 4 {
		working.Go(func() {
			for n := w; time.Since(begun) < during; {
				pipe := client.Pipeline()
				for range 100 {
					room, conn := fmt.Sprintf("room%d", n%rooms), fmt.Sprintf("conn%d", n%callers)
					keys := []string{"m:" + room, "owned", "s:" + room}
					single.EvalSha(ctx, pipe, keys, "join", conn, `{"id":1}`, room+" "+conn, "e:"+room)
					single.EvalSha(ctx, pipe, keys, "leave", conn, "", room+" "+conn, "e:"+room)
					n += 7
				}
				if _, err := pipe.Exec(ctx); err != nil {
					b.Error(err)
					return
				}
				done.Add(200)
			}
		})
	}
	working.Wait()
	return float64(done.Load()) / time.Since(begun).Seconds()
}

func centrifugeManager(b *testing.B, client *redis.Client) float64 {
	node, presence, broker, err := peer.NewPresence(client.Options().Addr)
	require.NoError(b, err)
	require.NoError(b, node.Run())
	defer func() { require.NoError(b, node.Shutdown(context.Background())) }()
	info := func(conn string) *centrifuge.ClientInfo { return &centrifuge.ClientInfo{ClientID: conn, UserID: "u"} }
	return throng(b,
		func(room, conn string) error {
			if err := presence.AddPresence(room, conn, info(conn)); err != nil {
				return err
			}
			return broker.PublishJoin(room, info(conn))
		},
		func(room, conn string) error {
			if err := presence.RemovePresence(room, conn, "u"); err != nil {
				return err
			}
			return broker.PublishLeave(room, info(conn))
		})
}
