package mesh

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestClusterCalm: where nothing is amiss nothing is suspected. Each server has
// a watcher and a member, hears its own beats, and keeps its patience.
func TestClusterCalm(t *testing.T) {
	t.Parallel()
	const lease = 10 * time.Second
	w := clusterWorld(t)
	rooms := slices.Concat(w.spreadRooms("calm", 1)...)
	d := newDrill(w, 2, rooms, leaseOf(lease))
	begun := time.Now()
	d.members(1)
	w.sleep(6 * time.Second)
	for _, s := range d.servers {
		passed := time.Since(begun)
		stats := s.n.lease.Stats()
		require.Zero(t, stats.Deaf, "own beats were missed")
		require.Zero(t, stats.Failures)
		require.LessOrEqual(t, stats.PatientIn, lease-passed, "patience began anew")
	}
	d.over()
}
