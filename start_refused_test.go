package mesh

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
)

// deafToLeases is a Redis that does not take the first few leases.
type deafToLeases struct {
	lease.Store
	left atomic.Int32
}

func (d *deafToLeases) Register(ctx context.Context, inc string, ttl time.Duration) (int64, error) {
	if d.left.Add(-1) >= 0 {
		return 0, store.ErrUnavailable
	}
	return d.Store.Register(ctx, inc, ttl)
}

// Redis may go away between two steps of a start.
func TestStartGoesOnWhereALeaseIsNotTaken(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		opts := w.options()
		deaf := new(deafToLeases)
		opts.edge = func(s *store.Store) edge {
			deaf.Store = s
			return edge{owner: s, lease: deaf, hub: s}
		}
		srv, err := NewServer(opts)
		require.NoError(t, err)
		deaf.left.Store(1000)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		require.ErrorIs(t, srv.Start(ctx), ErrUnavailable)
		require.Equal(t, 5*time.Second, time.Since(began), "it tries as long as it may")
		require.ErrorIs(t, srv.Ready(t.Context()), ErrNotStarted)
		deaf.left.Store(3)
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Ready(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
	})
}

// elsewhere is an app's hook that makes the client's connections in its own way.
type elsewhere struct{ addr string }

func (e elsewhere) DialHook(redis.DialHook) redis.DialHook {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, e.addr)
	}
}
func (elsewhere) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }
func (elsewhere) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// What the dialer of a client says is an explanation, and no condition.
func TestStartWithAClientThatDialsByAHook(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t)
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"}) // nobody is there
	defer func() { _ = c.Close() }()
	c.AddHook(elsewhere{r.Addr()})
	srv, err := NewServer(Options{Redis: c})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	require.NoError(t, srv.Start(ctx))
	require.NoError(t, srv.Shutdown(ctx))
}

// Start waits for a Redis that answers and takes no writes: the checks of a start must
// not take its refusal for one of the user. (A replica is another
// matter: see TestStartWithTheWrongClient.)
func TestStartWaitsForARedisThatTakesNoWrites(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	for _, r := range []refusal{memoryFull, noReplicas, saveFailed} {
		t.Run(r.text, func(t *testing.T) {
			t.Parallel()
			w := realWorld(t)
			admin := w.client()
			require.NoError(t, r.begin(t.Context(), admin))
			srv, err := NewServer(w.options())
			require.NoError(t, err)
			short, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			err = srv.Start(short)
			require.ErrorIs(t, err, ErrUnavailable)
			started := make(chan error, 1)
			go func() { started <- srv.Start(t.Context()) }() // ends with the test
			require.Never(t, func() bool { return len(started) > 0 }, 500*time.Millisecond, 50*time.Millisecond)
			require.NoError(t, r.end(t.Context(), admin))
			require.NoError(t, <-started)
			require.NoError(t, srv.Shutdown(t.Context()))
		})
	}
}

// A Redis that is being replaced may answer as a replica or a Cluster does for a
// moment. What INFO contradicts, or cannot be asked about, is waited for.
func TestStartWaitsForWhatMayPass(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"READONLY You can't write against a read only replica.", "TRYAGAIN Multiple keys request during rehashing of slot",
		"MOVED 1 127.0.0.1:1", "CLUSTERDOWN The cluster is down", "LOADING Redis is loading the dataset in memory",
		"BUSY Redis is busy running a script.", "ERR max number of clients reached",
	} {
		embedded(t, func(t *testing.T, w *world) {
			srv, err := NewServer(w.options())
			require.NoError(t, err)
			w.mem.SetError(text)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			began := time.Now()
			require.ErrorIs(t, srv.Start(ctx), ErrUnavailable, text)
			require.Equal(t, 5*time.Second, time.Since(began), text)
			w.mem.SetError("")
			require.NoError(t, srv.Start(t.Context()))
			require.NoError(t, srv.Shutdown(t.Context()))
		})
	}
}
