package api

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestStockClient(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		c := s.Stock("")
		for _, a := range c.WaitAll(c.JoinRoom("lobby"), c.SubscribePresence("lobby")) {
			require.True(t, a.Ok(), "%s", a.Payload)
		}
		w.Sleep(time.Second)
		p := s.Dial()
		p.Join("lobby")
		w.Eventually(5*time.Second, func() bool { return len(c.Got("lobby")) > 0 }, "the join arrives")
		require.Empty(t, c.Lost("lobby"))

		joins, subscribes := c.Reconnect()
		for _, a := range c.WaitAll(slices.Concat(joins, subscribes)...) {
			require.True(t, a.Ok(), "%s", a.Payload)
		}
		require.True(t, c.Wait(c.Publish("lobby", map[string]any{"typing": true})).Ok())
		require.Equal(t, "EINVALID", c.Wait(c.Room("mesh/join-room", "")).Code())
	})
}
