package mesh_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/meshtest"
)

// BenchmarkTrackPresence is one rule more, with an exact name, on a server that has
// so many, and 1,000 subscriptions to other rooms with a guard.
func BenchmarkTrackPresence(b *testing.B) {
	for _, rules := range []int{1_000, 20_000} {
		b.Run(fmt.Sprintf("rules=%d", rules), func(b *testing.B) {
			r := meshtest.StartRedis(b)
			p, err := mesh.NewPresenceManager(mesh.Options{Redis: r.Client(), Limits: mesh.Limits{RoomsPerConnection: -1}})
			require.NoError(b, err)
			require.NoError(b, p.Start(b.Context()))
			b.Cleanup(func() { require.NoError(b, p.Shutdown(context.WithoutCancel(b.Context()))) })
			require.NoError(b, p.Connect(b.Context(), "viewer", nil))
			var asked harness.Counted
			for i := range rules {
				opts := mesh.PresenceOptions{}
				if i < 1000 {
					opts.Guard = asked.Guard
				}
				require.NoError(b, p.TrackPresence(mesh.Exact(fmt.Sprint("room", i)), opts))
			}
			for i := range 1000 {
				room := fmt.Sprint("room", i)
				require.NoError(b, p.Join(b.Context(), room, "viewer"))
				require.NoError(b, p.WatchSilently(b.Context(), room, "viewer"))
			}
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				require.NoError(b, p.TrackPresence(mesh.Exact(fmt.Sprint("new", n)), mesh.PresenceOptions{Guard: asked.Guard}))
				n++
			}
			b.StopTimer()
			for i := range 1000 {
				require.EqualValues(b, 1, asked.Of(fmt.Sprint("room", i)), "no other guard is asked again")
			}
		})
	}
}
