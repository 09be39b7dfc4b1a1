package bench

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

var watching = flag.Int("watching", 20, "`members` of BenchmarkCursors that watch")

var cursors = newJob("cursors", load.Cursors)

// BenchmarkCursors moves the cursors of 500 members of one room, with 30 states a second
// each. It measures the rate of updates per watcher without an interval and with an
// interval of 200 ms between the states of a member, and reports it beside the limit
// members/interval.
func BenchmarkCursors(b *testing.B) {
	const members, perSecond, seconds = 500, 30, 5
	for _, interval := range []time.Duration{0, 200 * time.Millisecond} {
		b.Run(fmt.Sprintf("interval=%v", interval), func(b *testing.B) {
			var rate, late, lost, busy, heap, cpu []float64
			for b.Loop() {
				server, addr := serve(b, peer.Config{Kind: peer.Mesh, Redis: redisOf(b, peer.Mesh), StateInterval: interval})
				before := server.do(order{Memory: true}).Memory
				r := cursors.on(start(b, "load"), load.CursorsConfig{
					Addr: addr, Publishers: members, Watchers: *watching, PerSecond: perSecond, Seconds: seconds,
				})
				after := server.do(order{Memory: true}).Memory
				rate = append(rate, float64(r.Frames)/float64(*watching)/r.Seconds)
				late, lost = append(late, r.Slowest*1e3), append(lost, float64(r.Missing))
				busy = append(busy, float64(r.Busy))
				heap = append(heap, float64(after.Heap-before.Heap)/1024)
				cpu = append(cpu, (after.CPU-before.CPU)/r.Seconds)
			}
			b.ReportMetric(median(rate), "frames/s/watcher")
			if interval > 0 {
				b.ReportMetric(members/interval.Seconds(), "bound")
			} else {
				b.ReportMetric(members*perSecond, "bound")
			}
			b.ReportMetric(median(late), "last-ms")
			b.ReportMetric(median(lost), "last-missing")
			b.ReportMetric(median(busy), "busy")
			b.ReportMetric(median(heap), "heap-KiB")
			b.ReportMetric(median(cpu), "server-cores")
		})
	}
}
