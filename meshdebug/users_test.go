package meshdebug_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshdebug"
)

// The page of a room shows the users of its members, how many there are, and the places
// that are kept. A search finds the members of one user.
func TestUsersOfARoom(t *testing.T) {
	t.Parallel()
	inVirtualTime(t, func(r *rig) {
		r.start()
		p, err := mesh.NewPresenceManager(mesh.Options{Redis: r.client(), UserID: mesh.UserIDField("userId")})
		require.NoError(r.t, err)
		defer shutdown(p)
		require.NoError(r.t, p.Start(r.t.Context()))
		require.NoError(r.t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Grace: time.Minute}))
		for conn, user := range map[string]string{"tab-1": "ann", "tab-2": "ann", "phone": "<bob>"} {
			r.member(p, "lobby", conn, map[string]string{"userId": user}, nil)
		}
		require.NoError(r.t, p.Disconnect(r.t.Context(), "phone"))
		r.h = meshdebug.NewHandler(p, meshdebug.Options{})

		body := r.page("/?room=lobby")
		for _, want := range []string{"3 members of 2 users", "user <bdi>ann</bdi>", "user <bdi>&lt;bob&gt;</bdi>", "place kept for "} {
			assert.Contains(r.t, body, want)
		}
		body = r.page("/?room=lobby&user=ann")
		assert.Contains(r.t, body, "tab-1")
		assert.Contains(r.t, body, "2 of 3; shown: user “<bdi>ann</bdi>”")
		assert.NotContains(r.t, body, "phone")
		assert.Equal(r.t, http.StatusBadRequest, r.get("/?user=ann").Code)
	})
}
