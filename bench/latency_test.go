package bench

import (
	"testing"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// BenchmarkLatency publishes 30 states per second to 200 subscribers, and measures the
// time from the publisher to each subscriber.
func BenchmarkLatency(b *testing.B) {
	p50, p99 := figures{}, figures{}
	for b.Loop() {
		for _, k := range []peer.Kind{peer.Gorilla, peer.Mesh, peer.Centrifuge} {
			r := fanout(b, k, 1, load.FanoutConfig{Subscribers: 200, Events: 300, InFlight: 64, PerSecond: 30})
			p50[k], p99[k] = append(p50[k], r.P50*1e3), append(p99[k], r.P99*1e3)
		}
	}
	for _, k := range []peer.Kind{peer.Gorilla, peer.Mesh, peer.Centrifuge} {
		b.ReportMetric(p50.median(k), string(k)+"-p50-ms")
		b.ReportMetric(p99.median(k), string(k)+"-p99-ms")
	}
	b.ReportMetric(p99.ratio(peer.Mesh, peer.Gorilla), "p99-×gorilla")
}
