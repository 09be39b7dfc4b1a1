package mesh

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/wire"
	"github.com/meshpresence/mesh/meshtest"
)

// silentOutlet discards a subscription's events.
type silentOutlet struct{}

func (silentOutlet) snapshot(hub.View)   {}
func (silentOutlet) update(*wire.Update) {}
func (silentOutlet) ended(error)         {}

// BenchmarkTrackPresence is one rule more, with an exact name, on a server that has
// so many, and 1,000 subscriptions to other rooms with a guard.
func BenchmarkTrackPresence(b *testing.B) {
	for _, rules := range []int{1_000, 20_000} {
		b.Run(fmt.Sprintf("rules=%d", rules), func(b *testing.B) {
			r := meshtest.StartRedis(b)
			p, err := NewPresenceManager(Options{Redis: r.Client(), Limits: Limits{RoomsPerConnection: -1}})
			require.NoError(b, err)
			require.NoError(b, p.Start(b.Context()))
			b.Cleanup(func() { require.NoError(b, p.Shutdown(context.WithoutCancel(b.Context()))) })
			require.NoError(b, p.Connect(b.Context(), "viewer", nil))
			var asked counted
			for i := range rules {
				opts := PresenceOptions{}
				if i < 1000 {
					opts.Guard = asked.guard
				}
				require.NoError(b, p.TrackPresence(Exact(fmt.Sprint("room", i)), opts))
			}
			for i := range 1000 {
				room := fmt.Sprint("room", i)
				require.NoError(b, p.Join(b.Context(), room, "viewer"))
				s := &subscription{room: room, viewer: "viewer", out: silentOutlet{}, most: -1}
				require.NoError(b, p.n.watchers.watch(b.Context(), s))
			}
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				require.NoError(b, p.TrackPresence(Exact(fmt.Sprint("new", n)), PresenceOptions{Guard: asked.guard}))
				n++
			}
			b.StopTimer()
			for i := range 1000 {
				require.EqualValues(b, 1, asked.of(fmt.Sprint("room", i)), "no other guard is asked again")
			}
		})
	}
}
