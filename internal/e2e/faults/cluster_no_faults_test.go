package faults

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// TestClusterWithoutFaults checks that two idle servers stay in contact, miss no echo
// and see no failed heartbeat.
func TestClusterWithoutFaults(t *testing.T) {
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
		require.Zero(t, stats.ListenerResets, "an echo was missed")
		require.Zero(t, stats.Failures)
		require.LessOrEqual(t, stats.ContactIn, lease-passed, "contact was lost")
	}
	d.finish()
}
