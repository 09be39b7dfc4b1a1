package redistest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A client follows the master through a planned failover and through the death of the
// next master. The former masters become replicas.
func TestSentinel(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	s := StartSentinel(t)
	c := s.Client(t)
	require.Len(t, s.Addrs(), sentinels)
	first := s.Master()
	require.NotNil(t, first)
	require.NoError(t, c.Set(t.Context(), "k", "1", 0).Err())
	require.NoError(t, c.Wait(t.Context(), replicas, 10*time.Second).Err())

	planned := s.Failover()
	require.Equal(t, first, planned.From)
	require.Equal(t, s.Master(), planned.To)
	require.NotEqual(t, first, planned.To)
	require.Equal(t, "1", planned.To.Client(t).Get(t.Context(), "k").Val())
	require.False(t, planned.Writable.Before(planned.Began))
	require.False(t, planned.Announced.Before(planned.Writable))
	s.AwaitWhole()
	require.Equal(t, "slave", role(t.Context(), first))
	require.NoError(t, c.Set(t.Context(), "k", "2", 0).Err())
	require.NoError(t, c.Wait(t.Context(), replicas, 10*time.Second).Err())

	killed := s.KillMaster()
	require.Equal(t, planned.To, killed.From)
	require.Empty(t, role(t.Context(), killed.From))
	require.Equal(t, "2", killed.To.Client(t).Get(t.Context(), "k").Val())
	s.AwaitWhole() // without the dead one
	s.Revive()
	require.Equal(t, "slave", role(t.Context(), killed.From))
	comes(t, killed.From.Client(t), "k", "2")
	t.Logf("planned: writable after %v, announced after %v; killed: %v, %v",
		planned.Writable.Sub(planned.Began), planned.Announced.Sub(planned.Began),
		killed.Writable.Sub(killed.Began), killed.Announced.Sub(killed.Began))
}
