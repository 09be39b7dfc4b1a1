package bench

import (
	"context"
	"fmt"
	"regexp"
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
	"github.com/meshpresence/mesh/internal/store"
)

const (
	callers = 512
	rooms   = 1000
	during  = 3 * time.Second
)

// BenchmarkManager measures joins and leaves per second of 512 callers in 1,000 rooms:
// through the library's manager; with its script, one op per call, in raw pipelines of
// 200 (pipelines); with the simplest possible script, in the same pipelines (simple); and
// with Centrifuge's presence manager and its publishing of join and leave. Processor time
// is that of Redis, and that of this process, which includes the load.
func BenchmarkManager(b *testing.B) {
	const library, raw, simple, other = peer.Mesh, peer.Kind("pipelines"), peer.Kind("simple"), peer.Centrifuge
	kinds := []peer.Kind{library, raw, simple, other}
	rounds, cpu, own := figures{}, figures{}, figures{}
	for b.Loop() {
		for k, run := range map[peer.Kind]func(*testing.B, *redis.Client) float64{
			library: libraryManager, raw: rawPipelines, simple: simplePipelines, other: centrifugeManager,
		} {
			client := redistest.Start(b).Client(b)
			before := peer.ProcessorTime()
			perSecond := run(b, client)
			ops := perSecond * during.Seconds()
			rounds[k] = append(rounds[k], perSecond)
			cpu[k] = append(cpu[k], usage(b, client).CPU*1e6/ops)
			own[k] = append(own[k], (peer.ProcessorTime()-before)*1e6/ops)
		}
	}
	for _, k := range kinds {
		b.ReportMetric(rounds.median(k), string(k)+"-ops/s")
		b.ReportMetric(cpu.median(k), string(k)+"-redis-µs/op")
		b.ReportMetric(own.median(k), string(k)+"-go-µs/op")
	}
	b.ReportMetric(rounds.ratio(library, raw), "×pipelines")
	b.ReportMetric(rounds.ratio(library, simple), "×simple")
	b.ReportMetric(rounds.ratio(library, other), "×centrifuge")
}

// throng makes all callers join and leave for a while, and returns the operations per
// second.
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

// single changes one entry with a script as one would write it by hand: the record, the
// index by server, and the event.
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

// pipelined measures the limit of single calls: one goroutine per connection of the pool,
// each with pipelines of 200 calls, and no caller that waits for its own answer. op adds
// the n-th operation of a worker to its pipeline: a join, and then the leave after it.
func pipelined(b *testing.B, client *redis.Client, op func(pipe redis.Pipeliner, worker, n int, room, conn string)) float64 {
	ctx := b.Context()
	var done atomic.Int64
	var working sync.WaitGroup
	begun := time.Now()
	for w := range 4 {
		working.Go(func() {
			for n := 0; time.Since(begun) < during; {
				pipe := client.Pipeline()
				for range 200 {
					at := w + n/2*7
					op(pipe, w, n, fmt.Sprintf("room%d", at%rooms), fmt.Sprintf("conn%d", at%callers))
					n++
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

func simplePipelines(b *testing.B, client *redis.Client) float64 {
	ctx := b.Context()
	require.NoError(b, single.Load(ctx, client).Err())
	return pipelined(b, client, func(pipe redis.Pipeliner, _, n int, room, conn string) {
		keys := []string{"m:" + room, "owned", "s:" + room}
		if n%2 == 0 {
			single.EvalSha(ctx, pipe, keys, "join", conn, `{"id":1}`, room+" "+conn, "e:"+room)
			return
		}
		single.EvalSha(ctx, pipe, keys, "leave", conn, "", room+" "+conn, "e:"+room)
	})
}

// rawPipelines makes the library's script do one operation per call. It shows the gain of
// group commit, and the cost of waiting for single answers.
func rawPipelines(b *testing.B, client *redis.Client) float64 {
	ctx := b.Context()
	call := func(worker, n int, room, conn string) (*redis.Script, []string, []any) {
		op := store.Op{
			Kind: store.OpJoin, Room: room, Conn: fmt.Sprintf("%s-%d", conn, worker),
			Entry: fmt.Sprintf("E%015d", n/2), Cause: store.CauseLeft,
		}
		if n%2 == 1 {
			op.Kind = store.OpLeave
		}
		inc := fmt.Sprintf("INCARNATION-OF-WORKER-%04d", worker)
		return store.CommitCall(names{}, 0, inc, uint64(n+1), 0, []store.Op{op})
	}
	script, _, _ := call(0, 0, "", "")
	require.NoError(b, script.Load(ctx, client).Err())
	return pipelined(b, client, func(pipe redis.Pipeliner, worker, n int, room, conn string) {
		script, keys, args := call(worker, n, room, conn)
		script.EvalSha(ctx, pipe, keys, args...)
	})
}

// names are the library's keys for entries without a cluster.
type names struct{ store.Keys }

func (names) Members(room string) string     { return "mesh:presence:members:" + room }
func (names) Conn(room, conn string) string  { return "mesh:presence:conn:" + room + ":" + conn }
func (names) State(room, conn string) string { return "mesh:presence:state:" + room + ":" + conn }
func (names) Seq(room string) string         { return "mesh:presence:seq:" + room }
func (names) Owned(_ int, inc string) string { return "mesh:presence:owned:" + inc }
func (names) Fence(_ int, inc string) string { return "mesh:fence:" + inc }
func (names) Rooms(int) string               { return "mesh:presence:rooms" }
func (names) EventsPrefix() string           { return "mesh:@0:presence:events:" }

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
