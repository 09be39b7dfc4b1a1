// Package bench compares the library with the theoretical limit and with its peers: see
// README.md.
package bench

import (
	"flag"
	"testing"

	"github.com/meshpresence/mesh/bench/internal/load"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

var (
	profiles = flag.String("profiles", "", "`directory` for CPU profiles of the servers")
	profiled int
)

// dialect returns the dialect of a kind of server.
func dialect(k peer.Kind) load.Dialect {
	if k == peer.Centrifuge {
		return load.Centrifuge
	}
	return load.Mesh
}

// redisOf starts a Redis for a server that uses one.
func redisOf(b *testing.B, k peer.Kind) string {
	b.Helper()
	if k == peer.Gorilla {
		return ""
	}
	return redistest.Start(b).Addr()
}

// figures holds the measurements of each kind, one per round.
type figures map[peer.Kind][]float64

// median returns the median of a kind.
func (f figures) median(k peer.Kind) float64 {
	return median(f[k])
}

// ratio returns the median of the ratios of a and b, round by round, because other load
// of the machine affects both.
func (f figures) ratio(a, b peer.Kind) float64 {
	var list []float64
	for i := range min(len(f[a]), len(f[b])) {
		list = append(list, f[a][i]/f[b][i])
	}
	return median(list)
}
