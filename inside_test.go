package mesh

import (
	"context"
	"regexp"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// world is the embedded Redis of a test that looks into a server. Tests that need no
// more than the exported API are in package mesh_test and use internal/e2e/harness,
// which this package cannot import.
type world struct {
	t   *testing.T
	mem *meshtest.Redis
}

// embedded runs a test in virtual time on the embedded Redis.
func embedded(t *testing.T, f func(t *testing.T, w *world), opts ...meshtest.Option) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r, err := meshtest.NewRedis(opts...)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, r.Close()) })
		f(t, &world{t, r})
	})
}

// client returns a new Redis client, closed at the end of the test.
func (w *world) client() *redis.Client {
	c := w.mem.Client()
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// sleep lets time pass until everything that is due has happened.
func (w *world) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// options returns the options of a server with changes.
func (w *world) options(setup []func(*Options)) Options {
	opts := Options{Redis: w.client(), LatencyInterval: -1}
	for _, f := range setup {
		f(&opts)
	}
	return opts
}

// server starts a server, and shuts it down at the end of the test.
func (w *world) server(setup ...func(*Options)) *Server {
	w.t.Helper()
	s, err := NewServer(w.options(setup))
	require.NoError(w.t, err)
	w.run(s.Start, s.Shutdown)
	return s
}

// tracked is server with a rule for every room.
func (w *world) tracked(setup ...func(*Options)) *Server {
	w.t.Helper()
	s := w.server(setup...)
	require.NoError(w.t, s.TrackPresence(Regexp(regexp.MustCompile(".*")), PresenceOptions{}))
	return s
}

func (w *world) run(start, shutdown func(context.Context) error) {
	w.t.Helper()
	require.NoError(w.t, start(w.t.Context()))
	w.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		require.NoError(w.t, shutdown(ctx))
	})
}

// leaseOf sets Options.LeaseTTL.
func leaseOf(d time.Duration) func(*Options) { return func(o *Options) { o.LeaseTTL = d } }
