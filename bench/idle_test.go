package bench

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

var idleFor = flag.Duration("idle.for", 30*time.Second, "`duration` for which BenchmarkIdle measures a server without connections")

// unused is a Redis without a server, as a baseline.
const unused = peer.Kind("unused")

var idleServer = newJob("idle", func(cfg peer.MemberConfig) (string, error) {
	m, err := peer.NewMember(context.Background(), cfg) // ends with the process
	if err != nil {
		return "", err
	}
	return m.Addr, nil
})

// BenchmarkIdle measures the load on Redis of a server with default options and without
// connections: the commands that it sends, all commands that are executed (also those
// within scripts), and processor time. It compares them with an unused Redis and a node
// of Centrifuge.
func BenchmarkIdle(b *testing.B) {
	for name, opts := range map[string][]redistest.Option{
		"events":    nil,
		"forbidden": {redistest.Args("--rename-command", "CONFIG", "")},
	} {
		b.Run(name, func(b *testing.B) {
			sent, all, cpu := figures{}, figures{}, figures{}
			kinds := []peer.Kind{unused, peer.Mesh, peer.Centrifuge}
			for b.Loop() {
				redises := map[peer.Kind]*watchedRedis{}
				for _, k := range kinds {
					r := redistest.Start(b, opts...)
					addr := r.Addr()
					switch k {
					case peer.Mesh:
						idleServer.on(start(b, "server"), peer.MemberConfig{Redis: addr, Rules: []peer.Rule{{Expr: ".*"}}})
					case peer.Centrifuge:
						serve(b, peer.Config{Kind: k, Redis: addr})
					}
					redises[k] = watchRedis(b, r.Client(b))
				}
				time.Sleep(*idleFor) // all of them at once, each with a Redis of its own
				for _, k := range kinds {
					top, total, seconds := redises[k].stop(b, string(k))
					sent[k] = append(sent[k], top/idleFor.Seconds())
					all[k] = append(all[k], total/idleFor.Seconds())
					cpu[k] = append(cpu[k], seconds*1e6/idleFor.Seconds())
				}
			}
			for _, k := range kinds {
				if k != unused {
					b.ReportMetric(sent.median(k), string(k)+"-sent/s")
					b.ReportMetric(all.median(k), string(k)+"-commands/s")
				}
				b.ReportMetric(cpu.median(k), string(k)+"-redis-µs/s")
			}
		})
	}
}

// watchedRedis is a Redis whose commands are counted.
type watchedRedis struct {
	client  *redis.Client
	before  peer.Usage
	monitor *peer.Monitor
}

func watchRedis(b *testing.B, client *redis.Client) *watchedRedis {
	b.Helper()
	require.NoError(b, client.Ping(b.Context()).Err()) // connected: greetings do not count
	m, err := peer.StartMonitor(client.Options().Addr)
	require.NoError(b, err)
	return &watchedRedis{client: client, before: usage(b, client), monitor: m}
}

// stop returns the number of commands that clients sent, the number that were executed in
// all, and the processor time of Redis. It logs them by kind.
func (w *watchedRedis) stop(b *testing.B, name string) (sent, all, cpu float64) {
	b.Helper()
	used := usage(b, w.client).Since(w.before)
	lua, seen := w.monitor.Stop()
	var lines []string
	for _, command := range slices.Sorted(maps.Keys(used.Commands)) {
		n := used.Commands[command]
		own := max(n-lua[command], 0)
		sent += float64(own)
		lines = append(lines, fmt.Sprintf("%s %d (%d in scripts)", command, n, n-own))
	}
	b.Logf("%s, %v: %s", name, *idleFor, strings.Join(lines, ", "))
	if testing.Verbose() && name == string(peer.Mesh) {
		b.Logf("sent:\n%s", strings.Join(seen, "\n"))
	}
	return sent, float64(used.Total()), used.CPU
}

// usage returns the usage of a Redis so far.
func usage(b testing.TB, client *redis.Client) peer.Usage {
	b.Helper()
	u, err := peer.ReadUsage(b.Context(), client)
	require.NoError(b, err)
	return u
}
