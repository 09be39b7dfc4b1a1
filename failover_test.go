package mesh

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestSuspectedFailovers: a connection to one node of a cluster that does not
// last raises the suspicion of a failover again and again. Hints rest; the dead
// are buried all the same.
func TestSuspectedFailovers(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		const lease = 4 * time.Second
		a, b := w.tracked(leaseOf(lease)), w.tracked(leaseOf(lease))
		w.sleep(2 * lease)
		compared := 0
		flap := func(d time.Duration) {
			for range d / (100 * time.Millisecond) {
				a.n.redis.FailoverSuspected()
				w.sleep(100 * time.Millisecond)
				if a.n.redis.TakeMissed() {
					compared++
				}
				require.True(t, a.n.redis.expired.Paused())
				_, ok := a.n.lease.ClockProof()
				require.True(t, ok, "may not judge any more")
			}
		}
		flap(3 * lease)
		require.LessOrEqual(t, compared, int(3*lease/(3*time.Second))+1)
		require.Positive(t, compared)
		require.NoError(t, b.n.lease.Stop(t.Context()), "it renews no more")
		flap(lease + time.Second)
		require.EqualValues(t, 1, a.n.lease.Stats().DeclaredDead)
		w.sleep(lease)
		require.False(t, a.n.redis.expired.Paused())
	})
}

// TestFailoverOfAMaster: another process answers, and nobody is judged for one
// lease. That leaves alone what waits for the connection that events come over.
func TestFailoverOfAMaster(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		const lease = 4 * time.Second
		s := w.tracked(leaseOf(lease))
		w.sleep(2 * lease)
		judging := func() bool { _, ok := s.n.lease.ClockProof(); return ok }
		require.True(t, judging())
		s.n.redis.NoteGeneration("another one")
		s.n.redis.FailoverSuspected()
		w.sleep(lease - 100*time.Millisecond)
		require.False(t, judging())
		w.sleep(time.Second)
		require.True(t, judging())

		s.n.Disconnected()
		s.n.redis.NoteGeneration("another one")
		s.n.redis.FailoverSuspected()
		w.sleep(2 * lease)
		require.False(t, judging(), "the connection has not come back")
		s.n.redis.Connected()
		w.sleep(time.Millisecond)
		require.True(t, judging())
	})
}
