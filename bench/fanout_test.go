package bench

import (
	"fmt"
	"testing"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// BenchmarkFanout delivers states of one publisher, 16 in flight, to all subscribers of
// its room. Each iteration is one round of each server in turn.
func BenchmarkFanout(b *testing.B) {
	for _, bb := range []struct {
		subscribers, servers, events int
	}{{200, 1, 2000}, {1000, 1, 600}, {200, 2, 2000}, {1000, 2, 600}} {
		b.Run(fmt.Sprintf("subscribers=%d/servers=%d", bb.subscribers, bb.servers), func(b *testing.B) {
			rounds := figures{}
			for b.Loop() {
				for _, k := range []peer.Kind{peer.Gorilla, peer.Mesh, peer.Centrifuge} {
					servers := bb.servers
					if k == peer.Gorilla {
						servers = 1 // it shares nothing
					}
					r := fanout(b, k, servers, load.FanoutConfig{Subscribers: bb.subscribers, Events: bb.events, InFlight: 16})
					rounds[k] = append(rounds[k], float64(r.Delivered)/r.Seconds)
				}
			}
			b.ReportMetric(rounds.median(peer.Mesh), "mesh-frames/s")
			b.ReportMetric(rounds.median(peer.Gorilla), "gorilla-frames/s")
			b.ReportMetric(rounds.median(peer.Centrifuge), "centrifuge-frames/s")
			b.ReportMetric(rounds.ratio(peer.Mesh, peer.Gorilla), "×gorilla")
			b.ReportMetric(rounds.ratio(peer.Mesh, peer.Centrifuge), "×centrifuge")
		})
	}
}

// fanout runs one round with one kind of server.
func fanout(b *testing.B, k peer.Kind, servers int, cfg load.FanoutConfig) load.FanoutResult {
	b.Helper()
	redis := redisOf(b, k)
	for range servers {
		_, addr := serve(b, peer.Config{Kind: k, Redis: redis})
		cfg.Addrs = append(cfg.Addrs, addr)
	}
	cfg.Dialect, cfg.Room = dialect(k), "lobby"
	r := start(b, "load").do(order{Fanout: &cfg}).Fanout
	if r.Delivered != cfg.Subscribers*cfg.Events {
		b.Logf("%s: %d of %d delivered", k, r.Delivered, cfg.Subscribers*cfg.Events)
	}
	return r
}
