package harness

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

// RealWorld returns a world on a real Redis of its own.
func RealWorld(t *testing.T, opts ...redistest.Option) *World {
	t.Helper()
	return &World{T: t, Real: redistest.Start(t, opts...)}
}

// Everywhere runs a test three times: in virtual time on the embedded Redis, and, if
// there is a redis-server, in real time on a real Redis and on a Redis Cluster. The
// latter two wait most of the time, so they run at the same time.
func Everywhere(t *testing.T, f func(t *testing.T, w *World)) {
	t.Helper()
	EverywhereOn(t, ClusterWorld, f)
}

// EverywhereOn is Everywhere with another cluster than the shared one, or without a
// cluster if it is nil.
func EverywhereOn(t *testing.T, cluster func(*testing.T) *World, f func(t *testing.T, w *World)) {
	t.Helper()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		Embedded(t, f)
	})
	t.Run("real", func(t *testing.T) {
		t.Parallel()
		var both sync.WaitGroup
		defer both.Wait()
		both.Go(func() {
			t.Run("redis", func(t *testing.T) { f(t, &World{T: t, Real: redistest.Start(t)}) })
		})
		if cluster != nil {
			both.Go(func() {
				t.Run("cluster", func(t *testing.T) { f(t, cluster(t)) })
			})
		}
	})
}

// Embedded runs a test in virtual time on the embedded Redis.
func Embedded(t *testing.T, f func(t *testing.T, w *World), opts ...meshtest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r, err := meshtest.NewRedis(opts...)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, r.Close()) })
		f(t, &World{T: t, Virtual: true, Mem: r})
	})
}

// Long skips a test if -short is set. why is the reason for its duration.
func Long(t testing.TB, why string) {
	t.Helper()
	if testing.Short() {
		t.Skip("left out by -short: " + why)
	}
}

// Calm skips a test in virtual time that needs much processor time, with -short and
// with the race detector. With the race detector it would slow down tests on a real
// Redis, whose servers would lose their leases.
func Calm(t testing.TB, why string) {
	t.Helper()
	Long(t, why)
	if raceEnabled {
		t.Skip("left out with the race detector: " + why)
	}
}

// UnhurriedOnly skips a test on a real Redis with the race detector, which makes the
// servers several times slower. why names the part of the test that fails then. CI also
// runs the test without the detector (make real).
func UnhurriedOnly(t testing.TB, why string) {
	t.Helper()
	if raceEnabled {
		t.Skip("left out with the race detector: " + why)
	}
}

// Light reports whether tests should do less: with -short and with the race detector.
func Light() bool { return testing.Short() || raceEnabled }

// Thin returns the step of a loop over durations up to whole. If Light, the step is so
// large that the loop has three rounds.
func Thin(step, whole time.Duration) time.Duration {
	if Light() {
		return max(step, whole/2)
	}
	return step
}
