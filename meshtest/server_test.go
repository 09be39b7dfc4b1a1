package meshtest_test

import (
	"regexp"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// inBoth runs a test in a bubble and outside.
func inBoth(t *testing.T, test func(t *testing.T)) {
	t.Run("bubble", func(t *testing.T) { inBubble(t, test) })
	t.Run("real time", func(t *testing.T) {
		t.Parallel()
		test(t)
	})
}

// newMesh returns a server that tracks all rooms.
func newMesh(t *testing.T, client *redis.Client, setup ...func(*mesh.Options)) *mesh.Server {
	t.Helper()
	opts := mesh.Options{Redis: client}
	for _, f := range setup {
		f(&opts)
	}
	srv, err := mesh.NewServer(opts)
	require.NoError(t, err)
	require.NoError(t, srv.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	return srv
}

func TestTwoServersOnOneRedis(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		one := meshtest.StartServer(t, newMesh(t, r.Client()))
		two := meshtest.StartServer(t, newMesh(t, r.Client()))
		ann, bob := one.Connect(t), two.Connect(t)
		require.True(t, bob.Subscribe("lobby").Success)
		require.Equal(t, []string{ann.ID()}, ann.Join("lobby").IDs())
		bob.ExpectUpdate("join", "lobby", ann.ID())
		ann.Kill()
		bob.ExpectUpdate("leave", "lobby", ann.ID())
	})
}

func TestKillServer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		client := r.Client()
		one := meshtest.StartServer(t, newMesh(t, client))
		two := meshtest.StartServer(t, newMesh(t, r.Client()))
		ann, bob := one.Connect(t), two.Connect(t)
		ann.Join("lobby")
		require.Equal(t, []string{ann.ID()}, bob.Subscribe("lobby").IDs())

		one.Kill(r, client)
		require.Equal(t, 1006, ann.AwaitClose().Code)
		_, err := one.Dial()
		require.Error(t, err)
		bob.NoUpdate(5 * time.Second)
		began := time.Now()
		bob.ExpectUpdate("leave", "lobby", ann.ID())
		require.LessOrEqual(t, time.Since(began), 6*time.Second)
		synctest.Wait()
	})
}
