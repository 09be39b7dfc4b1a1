package bench

import (
	"flag"
	"fmt"
	"strings"
	"testing"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

var idle = flag.Int("idle", 10_000, "`connections` of BenchmarkMemory")

// perRoom is the number of connections in each room.
const perRoom = 50

// BenchmarkMemory measures the memory of an idle connection on a server: the resident set
// with many connections, less that with none, and its parts in heap and stacks.
func BenchmarkMemory(b *testing.B) {
	for _, rooms := range []int{1, 50} {
		b.Run(fmt.Sprintf("rooms=%d", rooms), func(b *testing.B) {
			rss, heap, stacks := figures{}, figures{}, figures{}
			kinds := []peer.Kind{peer.Gorilla, peer.Mesh, peer.MeshOwn, peer.MeshGo, peer.Centrifuge}
			for b.Loop() {
				for _, k := range kinds {
					m := hold(b, k, rooms)
					rss[k] = append(rss[k], float64(m.RSS)/1024)
					heap[k] = append(heap[k], float64(m.Heap)/1024)
					stacks[k] = append(stacks[k], float64(m.Stacks)/1024)
				}
			}
			for _, k := range kinds {
				b.ReportMetric(rss.median(k), unit(k)+"-KiB")
				b.ReportMetric(heap.median(k), unit(k)+"-heap-KiB")
				b.ReportMetric(stacks.median(k), unit(k)+"-stack-KiB")
			}
		})
	}
}

// hold returns the memory of each of many connections of one kind of server, in bytes.
func hold(b *testing.B, k peer.Kind, rooms int) peer.Memory {
	b.Helper()
	server, addr := serve(b, peer.Config{Kind: k, Redis: redisOf(b, k)})
	before := server.do(order{Memory: true}).Memory
	start(b, "load").do(order{Hold: &load.HoldConfig{
		Addr: addr, Dialect: dialect(k), Connections: *idle, Rooms: rooms, Names: max(*idle*rooms/perRoom, rooms), Drain: k == peer.Centrifuge,
	}})
	after := server.do(order{Memory: true}).Memory
	if *profiles != "" {
		server.do(order{Heap: fmt.Sprintf("%s/%s-%d.heap", *profiles, unit(k), rooms)})
	}
	each := peer.Memory{
		RSS: (after.RSS - before.RSS) / *idle, Heap: (after.Heap - before.Heap) / *idle, Stacks: (after.Stacks - before.Stacks) / *idle,
	}
	b.Logf("%s: per connection: RSS %d bytes, heap %d, stacks %d, goroutines %.2f", k,
		each.RSS, each.Heap, each.Stacks, float64(after.Goroutines-before.Goroutines)/float64(*idle))
	return each
}

// unit returns a kind's name without spaces, for a unit.
func unit(k peer.Kind) string { return strings.ReplaceAll(string(k), " ", "-") }
