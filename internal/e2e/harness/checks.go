package harness

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// Ask is Call with a payload that is sent unchanged. Send would escape it again.
func (p *Peer) Ask(command, payload string) json.RawMessage {
	p.T.Helper()
	answer, err := p.request(func(id int64) error {
		return p.Client.Write(websocket.TextMessage, fmt.Appendf(nil, `{"id":%d,"command":"%s","payload":%s}`, id, command, payload))
	})
	require.NoError(p.T, err, "%s %.80s", command, payload)
	return answer
}

// Say writes a text frame as it is.
func (p *Peer) Say(text string) {
	p.T.Helper()
	require.NoError(p.T, p.Client.Write(websocket.TextMessage, []byte(text)))
}

// RoomKeys returns the number of keys of rooms in Redis.
func (w *World) RoomKeys() int {
	w.T.Helper()
	keys, err := w.Client().Keys(w.T.Context(), "mesh:presence:*").Result()
	require.NoError(w.T, err)
	n := 0
	for _, key := range keys {
		if !strings.HasPrefix(key, "mesh:presence:owned:") {
			n++
		}
	}
	return n
}

func (p *Peer) CountIn(room, kind, conn string) int {
	n := 0
	for _, u := range p.Got() {
		if u.RoomName == room && u.Type == kind && u.ConnectionID == conn {
			n++
		}
	}
	return n
}

// Upgrading starts a server with an app's own upgrade handler, which calls ServeConn.
func Upgrading(w *World, srv *mesh.Server, opts mesh.ConnOptions, ctx context.Context, ended chan<- error) *Server {
	u := websocket.Upgrader{}
	s := &Server{Server: srv, W: w, Listener: NewPipeListener(), Done: make(chan struct{})}
	s.HTTP = &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if ws, err := u.Upgrade(rw, r, nil); err == nil {
			ended <- srv.ServeConn(ctx, ws, opts)
		}
	})}
	go func() {
		defer close(s.Done)
		_ = s.HTTP.Serve(s.Listener)
	}()
	w.T.Cleanup(s.End)
	return s
}

// StatesOf returns the states of a connection that a peer received.
func (p *Peer) StatesOf(conn string) []string {
	var list []string
	for _, u := range p.Got() {
		if u.Type == "state" && u.ConnectionID == conn {
			list = append(list, string(u.State))
		}
	}
	return list
}

// ExpectStates waits until a peer has received exactly these states of a connection, in
// order.
func (p *Peer) ExpectStates(within time.Duration, conn string, want ...string) {
	p.T.Helper()
	p.W.Eventually(within, func() bool { return len(p.StatesOf(conn)) >= len(want) }, "states %v, got %v", want, p.StatesOf(conn))
	require.Equal(p.T, want, p.StatesOf(conn))
}

// Reads returns how often rooms were read from Redis for mirrors.
func Reads(s mesh.Stats) uint64 {
	n := s.FirstReads
	for _, again := range s.Repairs {
		n += again
	}
	return n
}
