package meshtest_test

import (
	"context"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// These tests show how an app may test that a reload of a page is not seen as a departure.

const graceOfDoc = 30 * time.Second

// startDoc starts a server whose room "doc" keeps the places of its users.
func startDoc(t *testing.T, client *redis.Client) *meshtest.Server {
	t.Helper()
	srv, err := mesh.NewServer(mesh.Options{
		Redis:  client,
		UserID: mesh.UserIDField("userId"),
		Authenticate: func(_ context.Context, r *http.Request) (any, error) {
			return map[string]string{"userId": r.Header.Get("User")}, nil
		},
	})
	require.NoError(t, err)
	require.NoError(t, srv.TrackPresence(mesh.Exact("doc"), mesh.PresenceOptions{Grace: graceOfDoc, MaxUsers: 1}))
	return meshtest.StartServer(t, srv)
}

func withUser(name string) meshtest.ConnectOption { return meshtest.WithHeader("User", name) }

// settle lets every server be in contact with Redis for a LeaseTTL, so that places end
// within a second after their time.
func settle() { time.Sleep(15 * time.Second) }

// A user who reloads the page within Grace neither leaves nor arrives, also if the new
// connection is on another server and the room is full.
func TestReloadWithinGrace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		one, two := startDoc(t, r.Client()), startDoc(t, r.Client())
		viewer := two.Connect(t, withUser("eve"), meshtest.WithLevel(2))
		page := one.Connect(t, withUser("ann"))
		page.Join("doc")
		page.PublishState("doc", map[string]bool{"typing": true}, meshtest.StateOptions{})
		require.Equal(t, 1, viewer.Subscribe("doc").Users)
		settle()

		page.Close()
		assert.Nil(t, viewer.ExpectUpdate("state", "doc", page.ID()).State)
		assert.Equal(t, "closed", viewer.ExpectUpdate("disconnect", "doc", page.ID()).Reason)
		full := viewer.Join("doc")
		assert.Equal(t, []any{false, "EFULL", "users", 1}, []any{full.Success, full.Code, full.Of, full.Max}, "the kept place counts")
		time.Sleep(graceOfDoc - time.Second)

		again := two.Connect(t, withUser("ann"))
		require.True(t, again.Join("doc").Success)
		joined := viewer.ExpectUpdate("join", "doc", again.ID())
		assert.Equal(t, page.ID(), joined.Replaces)
		assert.Equal(t, []any{"ann", 2, 1}, []any{joined.UserID, joined.UserConnections, joined.Users}, "not 1: the user has not arrived")
		left := viewer.ExpectUpdate("leave", "doc", page.ID())
		assert.Equal(t, []any{"replaced", 1, 1}, []any{left.Reason, left.UserConnections, left.Users}, "not 0: the user has not left")
		viewer.NoUpdate(2 * graceOfDoc)
	})
}

// A user who does not come back leaves when Grace is over, and no earlier. To clients at
// level 1 this is the first update.
func TestGraceIsOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		one, two := startDoc(t, r.Client()), startDoc(t, r.Client())
		viewer := two.Connect(t, withUser("eve"), meshtest.WithTimeout(2*graceOfDoc))
		page := one.Connect(t, withUser("ann"))
		page.Join("doc")
		viewer.Subscribe("doc")
		settle()

		page.Kill()
		began := time.Now()
		left := viewer.ExpectUpdate("leave", "doc", page.ID())
		took := time.Since(began)
		assert.GreaterOrEqual(t, took, graceOfDoc)
		assert.LessOrEqual(t, took, graceOfDoc+time.Second)
		assert.Equal(t, []any{"ann", "lost", 0, 0}, []any{left.UserID, left.Reason, left.UserConnections, left.Connections})
		require.True(t, viewer.Join("doc").Success, "the place is free")
	})
}

// A client that changed networks takes the place of its last connection, which the server
// believes to be open, and which is closed.
func TestWithReplaces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		one, two := startDoc(t, r.Client()), startDoc(t, r.Client())
		viewer := two.Connect(t, withUser("eve"))
		old := one.Connect(t, withUser("ann"))
		old.Join("doc")
		viewer.Subscribe("doc")

		now := two.Connect(t, withUser("ann"), meshtest.WithReplaces(old.ID()))
		require.True(t, now.Join("doc").Success)
		assert.Equal(t, old.ID(), viewer.ExpectUpdate("join", "doc", now.ID()).Replaces)
		assert.Equal(t, "replaced", viewer.ExpectUpdate("leave", "doc", old.ID()).Reason)
		assert.Equal(t, meshtest.CloseError{Code: 1001, Reason: "another connection took its place"}, old.AwaitClose())
		viewer.NoUpdate(2 * graceOfDoc)

		_, err := two.Dial(meshtest.WithReplaces(""))
		require.ErrorIs(t, err, meshtest.ErrOption)
	})
}

// A server that drains keeps the places of its users, and a user who comes back to
// another server has not left.
func TestDrain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		one, two := startDoc(t, r.Client()), startDoc(t, r.Client())
		viewer := two.Connect(t, withUser("eve"))
		page := one.Connect(t, withUser("ann"))
		page.Join("doc")
		viewer.Subscribe("doc")

		require.NoError(t, one.Drain(t.Context(), time.Second))
		assert.Equal(t, 1012, page.AwaitClose().Code)
		require.NoError(t, one.Close())
		again := two.Connect(t, withUser("ann"))
		require.True(t, again.Join("doc").Success)
		assert.Equal(t, page.ID(), viewer.ExpectUpdate("join", "doc", again.ID()).Replaces)
		assert.Equal(t, "replaced", viewer.ExpectUpdate("leave", "doc", page.ID()).Reason)

		require.ErrorIs(t, meshtest.StartServer(t, http.NotFoundHandler()).Drain(t.Context(), 0), meshtest.ErrOption)
	})
}
