package bench

import (
	"testing"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// BenchmarkSocketJoins is joins through the socket into rooms of 50, each
// answered with members and metadata, and the leaving again: 64 connections,
// one request at a time each.
func BenchmarkSocketJoins(b *testing.B) {
	rounds := figures{}
	for b.Loop() {
		for _, k := range []peer.Kind{peer.Gorilla, peer.Mesh, peer.Centrifuge} {
			_, addr := serve(b, peer.Config{Kind: k, Redis: redisOf(b, k)})
			r := start(b, "load").do(order{Joins: &load.JoinsConfig{
				Addr: addr, Dialect: dialect(k), Rooms: 40, PerRoom: 49, Workers: 64, Seconds: 4,
			}}).Joins
			rounds[k] = append(rounds[k], float64(r.Joins)/r.Seconds)
		}
	}
	b.ReportMetric(rounds.median(peer.Mesh), "mesh-joins/s")
	b.ReportMetric(rounds.median(peer.Gorilla), "gorilla-joins/s")
	b.ReportMetric(rounds.median(peer.Centrifuge), "centrifuge-joins/s")
	b.ReportMetric(rounds.ratio(peer.Mesh, peer.Gorilla), "×gorilla")
	b.ReportMetric(rounds.ratio(peer.Mesh, peer.Centrifuge), "×centrifuge")
}
