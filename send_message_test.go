package mesh

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// speaking serves connections whose own protocol is f.
func speaking(w *world, srv *Server, f func(c *Connection, messageType int, data []byte)) *testServer {
	return upgrading(w, srv, ConnOptions{Foreign: f}, w.t.Context(), make(chan error, 10))
}

func TestSendMessage(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		conns := make(chan *Connection, 1)
		s := speaking(w, w.server().Server, func(c *Connection, messageType int, data []byte) {
			assert.NoError(t, c.SendMessage(messageType, data))
			clear(data) // the caller's again
			assert.NoError(t, c.Send("app/done", nil))
			select {
			case conns <- c:
			default:
			}
		})
		p := s.raw()
		p.send("not Mesh's")
		require.Equal(t, "not Mesh's", p.next())
		require.Equal(t, `{"command":"app/done","payload":null}`, p.next(), "in the order in which it was sent")
		require.NoError(t, p.ws.WriteMessage(websocket.BinaryMessage, []byte{0, 0xff}))
		kind, data, err := p.ws.ReadMessage()
		require.NoError(t, err)
		require.Equal(t, websocket.BinaryMessage, kind)
		require.Equal(t, []byte{0, 0xff}, data)
		p.next()
		p.send(`{"id":7,"command":"mesh/noop"}`)
		require.JSONEq(t, `{"id":7,"command":"mesh/noop","payload":true}`, p.next(), "Mesh goes on beside it")

		c := <-conns
		for _, kind := range []int{0, websocket.CloseMessage, websocket.PingMessage, websocket.PongMessage, -1} {
			require.ErrorIs(t, c.SendMessage(kind, nil), ErrInvalidMessage, kind)
		}
		require.ErrorIs(t, c.SendMessage(websocket.TextMessage, []byte("\xff")), ErrInvalidMessage)
		require.NoError(t, c.SendMessage(websocket.TextMessage, nil), "text of no bytes is text")
		require.Empty(t, p.next())

		c.Close(4000, "bye")
		require.ErrorIs(t, c.SendMessage(websocket.TextMessage, []byte("late")), ErrClosed)
		_, _, err = p.ws.ReadMessage()
		require.Equal(t, 4000, closeCodeOf(err))
	})
}

// Who asks and does not read is closed when a queue's worth waits, and holds up
// neither the app's function nor anybody else.
func TestSendMessageToSlowReader(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ended := make(chan error, 1)
		srv := w.server(func(o *Options) { o.Limits.QueueBytes = 64 << 10 }).Server
		srv.OnDisconnection(func(_ context.Context, _ *Connection, reason error) { ended <- reason })
		s := speaking(w, srv, func(c *Connection, messageType int, data []byte) {
			_ = c.SendMessage(messageType, data) // fails in the end
		})
		slow, quick := s.raw(), s.raw()
		for range 200 {
			if slow.ws.WriteMessage(websocket.TextMessage, []byte(strings.Repeat("x", 1000))) != nil {
				break
			}
		}
		select {
		case reason := <-ended:
			require.ErrorContains(t, reason, "1013")
		case <-time.After(10 * time.Second):
			require.Fail(t, "it may wait for ever")
		}
		require.EqualValues(t, 1, srv.Stats().Closed["slow"])
		quick.send("still here")
		require.Equal(t, "still here", quick.next())
	})
}
