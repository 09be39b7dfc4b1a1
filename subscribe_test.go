package mesh

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/watch"
)

func TestStatsOfASlowSubscription(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		o := newQueueOutlet(s.n, "lobby")
		for range maxIteratorEvents + 5 {
			o.put(Event{}, nil)
		}
		_, err := o.take()
		require.ErrorIs(t, err, ErrSlowConsumer)
		assert.EqualValues(t, 1, s.Stats().SlowSubscriptions)
	})
}

// A failed second subscription puts the first one back while that one is being
// ended: neither waits for the other.
func TestPutBackWhileEnding(t *testing.T) {
	t.Parallel()
	wheel := clock.NewWheel(0)
	for i := range 20000 {
		c := &Connection{subs: map[string]*watch.Subscription{}, sock: socket.NewGroup(socket.Config{Wheel: wheel}).New(nil, nil)}
		subscribed := func() *watch.Subscription {
			out := &socketOutlet{c: c, room: "r", answered: true}
			return &watch.Subscription{Room: "r", Viewer: "v", Out: out, MaxBytes: -1}
		}
		old, next := subscribed(), subscribed()
		c.subs["r"] = next
		var both sync.WaitGroup
		both.Go(func() { old.Finish(ErrRefused) })
		both.Go(func() {
			for range i % 400 {
				_ = c.ID()
			}
			c.unsubscribe(next, old)
		})
		both.Wait()
		require.Empty(t, c.subs, "ended is ended, whoever was first")
	}
}
