package api

import (
	"context"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// While Foreign hangs, its connection is not read. The connection must still leave its
// rooms when it ends, whatever the reason.
func TestAHungForeignDoesNotKeepItsConnectionPresent(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(t *testing.T, w *harness.World, s *harness.Server, p *harness.Peer){
		"the client closes":    func(_ *testing.T, _ *harness.World, _ *harness.Server, p *harness.Peer) { p.Close() },
		"the client is silent": func(_ *testing.T, w *harness.World, _ *harness.Server, p *harness.Peer) { w.Sleep(90 * time.Second) },
		"the app closes it": func(t *testing.T, _ *harness.World, s *harness.Server, p *harness.Peer) {
			require.NoError(t, s.Connections().Close(t.Context(), p.ID))
		},
		"the server drains": func(t *testing.T, _ *harness.World, s *harness.Server, _ *harness.Peer) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			require.NoError(t, s.Drain(ctx, 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s, other := w.Tracked(), w.Tracked()
				watcher := other.Dial()
				watcher.Subscribe("lobby")
				hang := make(chan struct{})
				defer close(hang)
				ended := make(chan error, 1)
				app := harness.Upgrading(w, s.Server, mesh.ConnOptions{Foreign: func(*mesh.Connection, int, []byte) { <-hang }}, context.Background(), ended)
				p := app.Dial()
				p.Join("lobby")
				watcher.Expect(time.Second, "join", p.ID)
				p.Mute() // the server reads no pong while Foreign hangs
				require.NoError(t, p.Client.Write(websocket.BinaryMessage, []byte("hang")))
				w.Sleep(time.Second)
				end(t, w, s, p)
				watcher.Expect(61*time.Second, "leave", p.ID)
				w.Eventually(3*time.Second, func() bool { return len(ended) == 1 }, "ServeConn returns")
				assert.Equal(t, 1, watcher.Count("leave", ""))
			})
		})
	}
}
