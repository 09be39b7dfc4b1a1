package meshtest_test

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// The effects of OnConnection functions are there when Connect returns, also behind the
// app's own routes.
func TestConnectWaitsForOnConnection(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) { o.Limits.CommandsPerSecond = 1 })
		var greeted atomic.Int32
		srv.OnConnection(func(ctx context.Context, c *mesh.Connection) {
			time.Sleep(20 * time.Millisecond)
			_ = srv.Presence().Join(ctx, "lobby", c.ID())
			_ = c.Send("app/hello", 1)
			greeted.Add(1)
		})
		mux := http.NewServeMux()
		mux.Handle("/socket", srv)
		server := meshtest.StartServer(t, mux, srv)
		for i := range 3 {
			c := server.Connect(t, meshtest.WithPath("/socket"))
			require.EqualValues(t, i+1, greeted.Load())
			in, err := srv.Rooms().Contains(t.Context(), "lobby", c.ID())
			require.NoError(t, err)
			require.True(t, in)
			c.NextPush("app/hello")
		}
		c, err := server.Dial(meshtest.WithPath("/socket"))
		require.NoError(t, err)
		require.EqualValues(t, 4, greeted.Load())
		c.Close()
	})
}

// If a function fails, Connect fails the test and says how the connection ended.
func TestConnectFailsWithOnConnection(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		srv.OnConnection(func(context.Context, *mesh.Connection) { panic("no") })
		server := meshtest.StartServer(t, srv)
		_, err := server.Dial()
		end, ok := errors.AsType[*meshtest.CloseError](err)
		require.True(t, ok, "%v", err)
		require.Equal(t, 1011, end.Code)
		require.Equal(t, `meshtest: connect: connection closed: 1011 "the connection could not be set up"`,
			failing(t, func(tb meshtest.TB) { server.Connect(tb) }))
		early := server.Connect(t, meshtest.WithEarlyReturn())
		require.NotEmpty(t, early.ID())
		require.Equal(t, 1011, early.AwaitClose().Code)
	})
}

// A function may close the connection on purpose. The test can then see how it ended.
func TestConnectWhileOnConnectionCloses(t *testing.T) {
	inBoth(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		srv.OnConnection(func(_ context.Context, c *mesh.Connection) {
			_ = c.Close(4003, "banned")
			time.Sleep(20 * time.Millisecond)
		})
		server := meshtest.StartServer(t, srv)
		want := meshtest.CloseError{Code: 4003, Reason: "banned"}
		require.Equal(t, want, server.Connect(t).AwaitClose())
		c, err := server.Dial()
		require.NoError(t, err)
		require.Equal(t, want, c.AwaitClose())
	})
}

// If a function hangs, Connect gives up after the time of WithTimeout.
func TestConnectTimeout(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client(), func(o *mesh.Options) { o.HookTimeout = time.Hour })
		release := make(chan struct{})
		srv.OnConnection(func(ctx context.Context, _ *mesh.Connection) {
			select {
			case <-release:
			case <-ctx.Done():
			}
		})
		server := meshtest.StartServer(t, srv)
		began := time.Now()
		_, err := server.Dial(meshtest.WithTimeout(3 * time.Second))
		require.EqualError(t, err, "meshtest: the OnConnection functions have not returned within 3s")
		require.InDelta(t, 3*time.Second, time.Since(began), float64(time.Millisecond))

		early := server.Connect(t, meshtest.WithEarlyReturn())
		close(release)
		require.True(t, early.Join("lobby").Success)
	})
}

// In a bubble the leaves and the OnDisconnection functions are done when a method that
// ends a connection returns.
func TestClosingWaitsForTheEndOnTheServer(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		srv := newMesh(t, meshtest.StartRedis(t).Client())
		var ended atomic.Int32
		srv.OnDisconnection(func(context.Context, *mesh.Connection, error) { ended.Add(1) })
		server := meshtest.StartServer(t, srv)
		for i, end := range []func(c *meshtest.Client){
			(*meshtest.Client).Close, (*meshtest.Client).Kill,
			func(c *meshtest.Client) {
				conn, _ := srv.Connection(c.ID())
				_ = conn.Close(4000, "")
				c.AwaitClose()
			},
		} {
			c := server.Connect(t)
			c.Join("lobby")
			end(c)
			require.EqualValues(t, i+1, ended.Load())
			count, err := srv.Presence().Count(t.Context(), "lobby")
			require.NoError(t, err)
			require.Zero(t, count)
		}
	})
}
