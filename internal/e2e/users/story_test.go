package users

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

const lobby = "lobby"

// story is what a subscriber of the room sees of connections that have short names.
type story struct {
	t     *testing.T
	w     *harness.World
	tap   *harness.Tap
	names map[string]string // connection id -> name
	read  int               // events that were compared
}

// listen subscribes to the room. The events of the subscription begin after it.
func listen(t *testing.T, w *harness.World, s *harness.Server) *story {
	t.Helper()
	h := &story{t: t, w: w, tap: w.Tap(s.Presence(), lobby, mesh.SubscribeOptions{}), names: make(map[string]string)}
	h.tap.Wait(w, 1)
	h.read = 1
	return h
}

// call gives a connection a name.
func (h *story) call(name string, p *harness.Peer) *harness.Peer {
	h.names[p.ID] = name
	return p
}

// tells checks the events since the last call: type, connection, user with the number of
// its connections, connections/users of the room, reason, replaced connection.
func (h *story) tells(want ...string) {
	h.t.Helper()
	var got []string
	for _, e := range h.tap.Wait(h.w, h.read+len(want))[h.read:] {
		got = append(got, h.line(e))
	}
	h.read += len(got)
	assert.Equal(h.t, want, got)
}

// silence checks that no event comes for a time.
func (h *story) silence(d time.Duration) {
	h.t.Helper()
	h.w.Sleep(d)
	h.tells()
}

func (h *story) line(e mesh.Event) string {
	f := []string{string(e.Type), h.names[e.ConnectionID]}
	if e.UserID != "" {
		f = append(f, fmt.Sprintf("%s:%d", e.UserID, e.UserConnections))
	}
	f = append(f, fmt.Sprintf("%d/%d", e.Connections, e.Users))
	if e.Reason != "" {
		f = append(f, string(e.Reason))
	}
	if e.Replaces != "" {
		f = append(f, "replaces "+h.names[e.Replaces])
	}
	if e.Repair {
		f = append(f, "repair")
	}
	return strings.Join(f, " ")
}
