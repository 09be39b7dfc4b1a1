package api

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// If Redis fails the registration of the lease, Start tries again until its context
// ends.
func TestStartRetriesTheLease(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		opts := w.Options()
		leases := new(harness.DeafToLeases)
		testhook.SetSeams(&opts, func(s *store.Store) testhook.Seams {
			leases.Store = s
			return testhook.Seams{Local: s, Lease: leases, Hub: s}
		})
		srv, err := mesh.NewServer(opts)
		require.NoError(t, err)
		leases.Left.Store(1000)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		require.ErrorIs(t, srv.Start(ctx), mesh.ErrUnavailable)
		require.Equal(t, 5*time.Second, time.Since(began), "Start tries until the deadline")
		require.ErrorIs(t, srv.Ready(t.Context()), mesh.ErrNotStarted)
		leases.Left.Store(3)
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Ready(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
	})
}

// redirect is a hook of the app that dials another address.
type redirect struct{ addr string }

func (e redirect) DialHook(redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, e.addr)
	}
}

func (redirect) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (redirect) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// Start only uses the client's own address in messages. A hook may dial another one.
func TestStartWithAClientThatDialsByAHook(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t)
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}) // no server listens there
	defer func() { _ = c.Close() }()
	c.AddHook(redirect{r.Addr()})
	srv, err := mesh.NewServer(mesh.Options{Redis: c})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	require.NoError(t, srv.Start(ctx))
	require.NoError(t, srv.Shutdown(ctx))
}

// Start waits for a Redis that answers but refuses writes. Its checks must not mistake
// that for missing rights of the user. TestStartWithTheWrongClient covers replicas.
func TestStartWaitsForARedisThatTakesNoWrites(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	for _, r := range []harness.Refusal{harness.MemoryFull, harness.NoReplicas, harness.SaveFailed} {
		t.Run(r.Text, func(t *testing.T) {
			t.Parallel()
			w := harness.RealWorld(t)
			admin := w.Client()
			require.NoError(t, r.Begin(t.Context(), admin))
			srv, err := mesh.NewServer(w.Options())
			require.NoError(t, err)
			short, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			err = srv.Start(short)
			require.ErrorIs(t, err, mesh.ErrUnavailable)
			started := make(chan error, 1)
			go func() { started <- srv.Start(t.Context()) }() // ends with the test
			require.Never(t, func() bool { return len(started) > 0 }, 500*time.Millisecond, 50*time.Millisecond)
			require.NoError(t, r.End(t.Context(), admin))
			require.NoError(t, <-started)
			require.NoError(t, srv.Shutdown(t.Context()))
		})
	}
}

// While Redis is replaced, it may answer like a replica or a Cluster for a moment.
// Start waits if INFO says otherwise, or if INFO fails.
func TestStartWaitsForTemporaryErrors(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"READONLY You can't write against a read only replica.", "TRYAGAIN Multiple keys request during rehashing of slot",
		"MOVED 1 127.0.0.1:1", "CLUSTERDOWN The cluster is down", "LOADING Redis is loading the dataset in memory",
		"BUSY Redis is busy running a script.", "ERR max number of clients reached",
	} {
		harness.Embedded(t, func(t *testing.T, w *harness.World) {
			srv, err := mesh.NewServer(w.Options())
			require.NoError(t, err)
			w.Mem.SetError(text)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			began := time.Now()
			require.ErrorIs(t, srv.Start(ctx), mesh.ErrUnavailable, text)
			require.Equal(t, 5*time.Second, time.Since(began), text)
			w.Mem.SetError("")
			require.NoError(t, srv.Start(t.Context()))
			require.NoError(t, srv.Shutdown(t.Context()))
		})
	}
}
