package harness

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// WithUsers makes the connections of a server belong to users: the parameter user of the
// URL becomes the field userId of the metadata. Without the parameter there are no
// metadata.
func WithUsers(o *mesh.Options) {
	o.UserID = mesh.UserIDField("userId")
	o.Authenticate = func(_ context.Context, r *http.Request) (any, error) {
		if user := r.URL.Query().Get("user"); user != "" {
			return map[string]string{"userId": user}, nil
		}
		return nil, nil
	}
}

// Users starts a server whose connections belong to users, with one rule for every room.
func (w *World) Users(rule mesh.PresenceOptions, setup ...func(*mesh.Options)) *Server {
	w.T.Helper()
	s := w.Server(append(setup, WithUsers)...)
	s.Track(".*", rule)
	return s
}

// DialAs connects a peer of a user at level 2 of the protocol.
func (s *Server) DialAs(user string) *Peer {
	s.W.T.Helper()
	before := s.Query
	defer func() { s.Query = before }()
	s.Query = "?mesh-level=2&user=" + user
	p, _, err := s.TryDial()
	require.NoError(s.W.T, err)
	return p
}

// JoinReplacing joins a room in the place of another connection.
func (p *Peer) JoinReplacing(room, replaces string) View {
	p.T.Helper()
	v, err := p.TryJoinReplacing(room, replaces)
	require.NoError(p.T, err)
	return v
}

// TryJoinReplacing is JoinReplacing, for any goroutine. It returns an error if the
// connection ends.
func (p *Peer) TryJoinReplacing(room, replaces string) (v View, err error) {
	payload := map[string]any{"roomName": room}
	if replaces != "" {
		payload["replaces"] = replaces
	}
	answer, err := p.TryCall("mesh/join-room", payload)
	if err != nil {
		return v, err
	}
	return v, json.Unmarshal(answer, &v)
}
