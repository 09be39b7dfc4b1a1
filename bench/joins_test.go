package bench

import (
	"fmt"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
)

// cpuTime returns the processor time of a process, in seconds.
var cpuTime = newJob("processor time", func(struct{}) (float64, error) { return peer.ProcessorTime(), nil })

// BenchmarkSocketJoins joins rooms of 50 through the socket, each answered with members
// and metadata, and leaves them again: 64 connections, one request at a time each.
// Besides the rate it measures the processor time of the server and of its Redis for each
// join and leave together, which does not depend on other load of the machine.
func BenchmarkSocketJoins(b *testing.B) {
	rounds, server, stored := figures{}, figures{}, figures{}
	for b.Loop() {
		for _, k := range []peer.Kind{peer.Gorilla, peer.Mesh, peer.Centrifuge} {
			addr := redisOf(b, k)
			p, ws := serve(b, peer.Config{Kind: k, Redis: addr})
			clients := start(b, "load")
			clients.do(order{Hold: &load.HoldConfig{Addr: ws, Dialect: dialect(k), Connections: 40 * 49, Rooms: 1, Names: 40, Drain: true}})
			used := func() float64 { return cpuTime.on(p, struct{}{}) }
			redisUsed := func() float64 { return 0 }
			if addr != "" {
				client := redis.NewClient(&redis.Options{Addr: addr})
				b.Cleanup(func() { _ = client.Close() })
				redisUsed = func() float64 { return usage(b, client).CPU }
			}
			before, redisBefore := used(), redisUsed()
			r := clients.do(order{Joins: &load.JoinsConfig{Addr: ws, Dialect: dialect(k), Rooms: 40, Workers: 64, Seconds: 4}}).Joins
			server[k] = append(server[k], (used()-before)*1e6/float64(r.Joins))
			stored[k] = append(stored[k], (redisUsed()-redisBefore)*1e6/float64(r.Joins))
			rounds[k] = append(rounds[k], float64(r.Joins)/r.Seconds)
			if *profiles != "" {
				p.do(order{Heap: fmt.Sprintf("%s/%s-%d.heap", *profiles, k, profiled)})
			}
			clients.do(order{Hold: &load.HoldConfig{}}) // closes the connections that stayed
		}
	}
	for _, k := range []peer.Kind{peer.Gorilla, peer.Mesh, peer.Centrifuge} {
		b.ReportMetric(rounds.median(k), string(k)+"-joins/s")
		b.ReportMetric(server.median(k), string(k)+"-server-µs")
	}
	b.ReportMetric(stored.median(peer.Mesh), "mesh-redis-µs")
	b.ReportMetric(stored.median(peer.Centrifuge), "centrifuge-redis-µs")
	b.ReportMetric(rounds.ratio(peer.Mesh, peer.Gorilla), "×gorilla")
	b.ReportMetric(rounds.ratio(peer.Mesh, peer.Centrifuge), "×centrifuge")
}
