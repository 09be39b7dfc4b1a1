package bench

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
)

// 50,000 entries with a TTL: 10,000 connections in five of 10,000 rooms each.
const (
	timed      = 10_000
	timedRooms = 5
	timedTTL   = 8 * time.Second
)

func timedRoom(conn, n int) string { return fmt.Sprintf("room%05d", (conn+n*2003)%timed) }

// BenchmarkRefresh measures the cost in Redis of keeping 50,000 entries with a TTL. It
// compares it with a script that does only the same writes and checks that the records
// exist, in calls of 128.
func BenchmarkRefresh(b *testing.B) {
	const library, raw = peer.Mesh, peer.Kind("raw")
	cpu, trips := figures{}, figures{}
	for b.Loop() {
		for k, run := range map[peer.Kind]func(*testing.B, *redis.Client) (float64, float64){library: refreshed, raw: refreshedRaw} {
			perEntry, perCall := run(b, redistest.Start(b).Client(b))
			cpu[k], trips[k] = append(cpu[k], perEntry), append(trips[k], perCall)
		}
	}
	b.ReportMetric(cpu.median(library), "mesh-redis-µs/entry")
	b.ReportMetric(cpu.median(raw), "raw-redis-µs/entry")
	b.ReportMetric(trips.median(library), "mesh-entries/call")
	b.ReportMetric(cpu.ratio(library, raw), "×raw")
}

// perEntry measures the cost of each entry while run runs: the processor time of Redis in
// µs, and the number of entries per script call. look is the command that is called once
// for each entry.
func perEntry(b *testing.B, client *redis.Client, look string, run func()) (cpu, entries float64) {
	b.Helper()
	before := usage(b, client)
	run()
	did := usage(b, client).Since(before)
	looked := float64(did.Commands[look])
	return did.CPU * 1e6 / looked, looked / float64(did.Scripts())
}

func refreshed(b *testing.B, client *redis.Client) (float64, float64) {
	p, err := mesh.NewPresenceManager(mesh.Options{Redis: client})
	require.NoError(b, err)
	require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{TTL: timedTTL}))
	require.NoError(b, p.Start(b.Context()))
	defer func() { require.NoError(b, p.Shutdown(context.Background())) }()
	ctx, stop := context.WithCancel(b.Context())
	var touching sync.WaitGroup
	defer touching.Wait()
	defer stop()
	touching.Go(func() { // like a frame of each per second
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for ctx.Err() == nil {
			for i := range timed {
				_ = p.Touch(fmt.Sprintf("conn%05d", i)) // it may not be connected yet
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
	var joining sync.WaitGroup
	for w := range callers {
		joining.Go(func() {
			for i := w; i < timed; i += callers {
				conn := fmt.Sprintf("conn%05d", i)
				if err := p.Connect(ctx, conn, nil); err != nil {
					b.Error(err)
				}
				for n := range timedRooms {
					// A busy machine may need several attempts.
					err := p.Join(ctx, timedRoom(i, n), conn)
					for errors.Is(err, mesh.ErrUnavailable) {
						err = p.Join(ctx, timedRoom(i, n), conn)
					}
					if err != nil {
						b.Error(err)
					}
				}
			}
		})
	}
	joining.Wait()
	// Three rounds of refreshes: they come every third of the TTL and a second.
	return perEntry(b, client, "hget", func() { time.Sleep(timedTTL + time.Second) })
}

// refreshRaw extends the TTL of entries whose records exist.
var refreshRaw = redis.NewScript(`
local out = {}
for i = 1, #KEYS, 2 do
  local a = (i - 1) / 2 * 3
  if redis.call('HEXISTS', KEYS[i], ARGV[a + 1]) == 1 then
    redis.call('SET', KEYS[i + 1], ARGV[a + 2], 'PX', ARGV[a + 3])
    out[#out + 1] = 1
  else
    out[#out + 1] = 0
  end
end
return out`)

func refreshedRaw(b *testing.B, client *redis.Client) (float64, float64) {
	ctx := b.Context()
	require.NoError(b, refreshRaw.Load(ctx, client).Err())
	type entry struct{ room, conn string }
	var all []entry
	for i := range timed {
		pipe := client.Pipeline()
		for n := range timedRooms {
			e := entry{timedRoom(i, n), fmt.Sprintf("conn%05d", i)}
			all = append(all, e)
			record := fmt.Sprintf("E%015d INCARNATION-OF-WORKER-0001 5000 0 0 . 0 0 0 1700000000000 1\n", i)
			pipe.HSet(ctx, names{}.Members(e.room), e.conn, record)
			pipe.Set(ctx, names{}.Conn(e.room, e.conn), record[:16], time.Minute)
		}
		_, err := pipe.Exec(ctx)
		require.NoError(b, err)
	}
	const calls = 3 * ((timed*timedRooms + store.MaxOps - 1) / store.MaxOps)
	tick := time.NewTicker((timedTTL + time.Second) / calls) // as often as the library, because an idle Redis also has to wake up
	defer tick.Stop()
	return perEntry(b, client, "hexists", func() {
		for range 3 {
			for at := 0; at < len(all); at += store.MaxOps {
				<-tick.C
				var keys []string
				var args []any
				for i, e := range all[at:min(at+store.MaxOps, len(all))] {
					keys = append(keys, names{}.Members(e.room), names{}.Conn(e.room, e.conn))
					args = append(args, e.conn, fmt.Sprintf("E%015d", (at+i)/timedRooms), 60_000+i)
				}
				require.NoError(b, refreshRaw.EvalSha(ctx, client, keys, args...).Err())
			}
		}
	})
}
