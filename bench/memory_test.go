package bench

import (
	"flag"
	"fmt"
	"testing"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

var idle = flag.Int("idle", 10_000, "`connections` of BenchmarkMemory")

// BenchmarkMemory is what an idle connection costs a server: its resident set
// with many connections, less that with none.
func BenchmarkMemory(b *testing.B) {
	for _, rooms := range []int{1, 50} {
		b.Run(fmt.Sprintf("rooms=%d", rooms), func(b *testing.B) {
			rss := figures{}
			kinds := []peer.Kind{peer.Gorilla, peer.Mesh, peer.MeshOwn, peer.Centrifuge}
			for b.Loop() {
				for _, k := range kinds {
					server, addr := serve(b, peer.Config{Kind: k, Redis: redisOf(b, k)})
					before := server.do(order{Memory: true}).Memory
					start(b, "load").do(order{Hold: &load.HoldConfig{
						Addr: addr, Dialect: dialect(k), Connections: *idle, Rooms: rooms, Names: max(*idle/20, 100), Drain: k == peer.Centrifuge,
					}})
					after := server.do(order{Memory: true}).Memory
					n := float64(*idle) * 1024
					if *profiles != "" {
						server.do(order{Heap: fmt.Sprintf("%s/%s-%d.heap", *profiles, replaced(k), rooms)})
					}
					rss[k] = append(rss[k], float64(after.RSS-before.RSS)/n)
					b.Logf("%s: per connection: RSS %.1f KiB, heap %.1f, stacks %.1f, goroutines %.2f", k,
						float64(after.RSS-before.RSS)/n, float64(after.Heap-before.Heap)/n, float64(after.Stacks-before.Stacks)/n,
						float64(after.Goroutines-before.Goroutines)/float64(*idle))
				}
			}
			for _, k := range kinds {
				b.ReportMetric(rss.median(k), fmt.Sprintf("%s-KiB", replaced(k)))
			}
		})
	}
}

// replaced is a kind's name in a unit, which holds no space.
func replaced(k peer.Kind) string {
	if k == peer.MeshOwn {
		return "own-upgrade"
	}
	return string(k)
}
