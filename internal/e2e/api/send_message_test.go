package api

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// foreignServer serves connections whose foreign messages are passed to f.
func foreignServer(w *harness.World, srv *mesh.Server, f func(c *mesh.Connection, messageType int, data []byte)) *harness.Server {
	return harness.Upgrading(w, srv, mesh.ConnOptions{Foreign: f}, w.T.Context(), make(chan error, 10))
}

func TestSendMessage(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		conns := make(chan *mesh.Connection, 1)
		s := foreignServer(w, w.Server().Server, func(c *mesh.Connection, messageType int, data []byte) {
			assert.NoError(t, c.SendMessage(messageType, data))
			clear(data) // SendMessage does not keep data
			assert.NoError(t, c.Send("app/done", nil))
			select {
			case conns <- c:
			default:
			}
		})
		p := s.Raw()
		p.Send("not Mesh's")
		require.Equal(t, "not Mesh's", p.Next())
		require.Equal(t, `{"command":"app/done","payload":null}`, p.Next(), "messages are in order")
		require.NoError(t, p.WS.WriteMessage(websocket.BinaryMessage, []byte{0, 0xff}))
		kind, data, err := p.WS.ReadMessage()
		require.NoError(t, err)
		require.Equal(t, websocket.BinaryMessage, kind)
		require.Equal(t, []byte{0, 0xff}, data)
		p.Next()
		p.Send(`{"id":7,"command":"mesh/noop"}`)
		require.JSONEq(t, `{"id":7,"command":"mesh/noop","payload":true}`, p.Next(), "commands still work")

		c := <-conns
		for _, kind := range []int{0, websocket.CloseMessage, websocket.PingMessage, websocket.PongMessage, -1} {
			require.ErrorIs(t, c.SendMessage(kind, nil), mesh.ErrInvalidMessage, kind)
		}
		require.ErrorIs(t, c.SendMessage(websocket.TextMessage, []byte("\xff")), mesh.ErrInvalidMessage)
		require.NoError(t, c.SendMessage(websocket.TextMessage, nil), "an empty text is valid")
		require.Empty(t, p.Next())

		c.Close(4000, "bye")
		require.ErrorIs(t, c.SendMessage(websocket.TextMessage, []byte("late")), mesh.ErrClosed)
		_, _, err = p.WS.ReadMessage()
		require.Equal(t, 4000, harness.CloseCodeOf(err))
	})
}

// A client that does not read the answers to its foreign messages is closed when its
// queue is full. It delays neither the app's function nor other clients.
func TestSendMessageToSlowReader(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ended := make(chan error, 1)
		srv := w.Server(func(o *mesh.Options) { o.Limits.QueueBytes = 64 << 10 }).Server
		srv.OnDisconnection(func(_ context.Context, _ *mesh.Connection, reason error) { ended <- reason })
		s := foreignServer(w, srv, func(c *mesh.Connection, messageType int, data []byte) {
			_ = c.SendMessage(messageType, data) // fails once the connection has ended
		})
		slow, quick := s.Raw(), s.Raw()
		for range 200 {
			if slow.WS.WriteMessage(websocket.TextMessage, []byte(strings.Repeat("x", 1000))) != nil {
				break
			}
		}
		select {
		case reason := <-ended:
			require.ErrorContains(t, reason, "1013")
		case <-time.After(w.Unhurried(10 * time.Second)):
			require.Fail(t, "the connection is not closed")
		}
		require.EqualValues(t, 1, srv.Stats().Closed["slow"])
		quick.Send("still here")
		require.Equal(t, "still here", quick.Next())
	})
}
