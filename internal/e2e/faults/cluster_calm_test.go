package faults

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// TestClusterCalm: where nothing is amiss nothing is suspected. Each server has
// a watcher and a member, hears its own beats, and keeps its patience.
func TestClusterCalm(t *testing.T) {
	t.Parallel()
	const lease = 10 * time.Second
	w := harness.ClusterWorld(t)
	rooms := slices.Concat(w.SpreadRooms("calm", 1)...)
	d := newDrill(w, 2, rooms, harness.LeaseOf(lease))
	begun := time.Now()
	d.members(1)
	w.Sleep(6 * time.Second)
	for _, s := range d.servers {
		passed := time.Since(begun)
		stats := testhook.PartsOf(s.Server).Lease.Stats()
		require.Zero(t, stats.ListenerResets, "own beats were missed")
		require.Zero(t, stats.Failures)
		require.LessOrEqual(t, stats.ContactIn, lease-passed, "patience began anew")
	}
	d.over()
}
