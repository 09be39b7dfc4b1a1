package harness

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// rawPeer is a WebSocket whose frames only the test reads. It is no client of meshtest,
// because tests look at the exact text of frames, send malformed ones, or read nothing.
type rawPeer struct {
	t  *testing.T
	w  *World
	WS *websocket.Conn
	ID string
}

// Raw connects a rawPeer.
func (s *Server) Raw(headers ...http.Header) *rawPeer {
	s.W.T.Helper()
	var h http.Header
	if len(headers) > 0 {
		h = headers[0]
	}
	d := websocket.Dialer{NetDialContext: s.Listener.Dial}
	ws, _, err := d.DialContext(s.W.T.Context(), "ws://127.0.0.1/ws", h)
	require.NoError(s.W.T, err)
	s.W.T.Cleanup(func() { _ = ws.Close() })
	r := &rawPeer{t: s.W.T, w: s.W, WS: ws}
	var first Frame
	require.NoError(s.W.T, json.Unmarshal([]byte(r.Next()), &first))
	require.Equal(s.W.T, "mesh/assign-id", first.Command)
	require.NoError(s.W.T, json.Unmarshal(first.Payload, &r.ID))
	return r
}

// Send writes a frame with this text.
func (r *rawPeer) Send(text string) {
	r.t.Helper()
	require.NoError(r.t, r.WS.WriteMessage(websocket.TextMessage, []byte(text)))
}

// Next reads one frame.
func (r *rawPeer) Next() string {
	r.t.Helper()
	require.NoError(r.t, r.WS.SetReadDeadline(time.Now().Add(r.w.Unhurried(10*time.Second))))
	kind, data, err := r.WS.ReadMessage()
	require.NoError(r.t, err)
	require.Equal(r.t, websocket.TextMessage, kind)
	return string(data)
}
