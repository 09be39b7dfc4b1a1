// Package bench compares the library with the limit of what can be done and
// with its peers: see README.md.
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

// dialect returns how a kind of server is spoken to.
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

// figures are what was measured of each kind, once per round.
type figures map[peer.Kind][]float64

// median returns the median of a kind.
func (f figures) median(k peer.Kind) float64 {
	return median(f[k])
}

// ratio returns the median of how a compares with b, round by round: what the
// machine was busy with besides is in both.
func (f figures) ratio(a, b peer.Kind) float64 {
	var list []float64
	for i := range min(len(f[a]), len(f[b])) {
		list = append(list, f[a][i]/f[b][i])
	}
	return median(list)
}
