package mesh

import (
	"context"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// While Foreign blocks nothing is read. That must not keep the connection in
// its rooms when it has ended, for whatever reason.
func TestAHungForeignDoesNotKeepItsConnectionPresent(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(t *testing.T, w *world, s *testServer, p *peer){
		"the client goes": func(_ *testing.T, _ *world, _ *testServer, p *peer) { p.close() },
		"it is silent":    func(_ *testing.T, w *world, _ *testServer, p *peer) { w.sleep(90 * time.Second) },
		"it is closed": func(t *testing.T, _ *world, s *testServer, p *peer) {
			require.NoError(t, s.Connections().Close(t.Context(), p.id))
		},
		"the server drains": func(t *testing.T, _ *world, s *testServer, _ *peer) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			require.NoError(t, s.Drain(ctx, 0))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				s, other := w.tracked(), w.tracked()
				watcher := other.dial()
				watcher.subscribe("lobby")
				hang := make(chan struct{})
				defer close(hang)
				ended := make(chan error, 1)
				app := upgrading(w, s.Server, ConnOptions{Foreign: func(*Connection, int, []byte) { <-hang }}, context.Background(), ended)
				p := app.dial()
				p.join("lobby")
				watcher.expect(time.Second, "join", p.id)
				p.mute() // a pong would wait for somebody to read it
				p.writing.Lock()
				require.NoError(t, p.ws.WriteMessage(websocket.BinaryMessage, []byte("hang")))
				p.writing.Unlock()
				w.sleep(time.Second)
				end(t, w, s, p)
				watcher.expect(61*time.Second, "leave", p.id)
				w.eventually(3*time.Second, func() bool { return len(ended) == 1 }, "ServeConn returns")
				assert.Equal(t, 1, watcher.count("leave", ""))
			})
		})
	}
}
