package mesh

import (
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
)

// suite is the Redis Cluster that the tests of one run share, each under a
// prefix of its own: to start one takes seconds and six processes.
var suite sharedCluster

type sharedCluster struct {
	start    sync.Once
	worlds   atomic.Int64
	cluster  *redistest.Cluster
	lifetime *lifetime
}

// lifetime is the testing.TB of what outlives the test that started it.
type lifetime struct {
	testing.TB // that test's, to fail or skip while it starts

	mu    sync.Mutex // guards tasks
	tasks []func()
}

func (l *lifetime) Cleanup(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tasks = append(l.tasks, f)
}

func (l *lifetime) TempDir() string {
	dir, err := os.MkdirTemp("", "mesh-cluster-")
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// end is called when all tests are over.
func (s *sharedCluster) end() {
	if s.lifetime == nil {
		return
	}
	s.lifetime.mu.Lock()
	defer s.lifetime.mu.Unlock()
	for _, f := range slices.Backward(s.lifetime.tasks) {
		f()
	}
}

// running is a run of all tests, and ends what they shared before it is looked
// at what they left.
type running struct{ m *testing.M }

func (r running) Run() int {
	code := r.m.Run()
	suite.end()
	return code
}

// clusterWorld is a world on the cluster that is shared by all tests.
func clusterWorld(t *testing.T) *world {
	t.Helper()
	suite.start.Do(func() {
		l := &lifetime{TB: t}
		suite.lifetime = l
		suite.cluster = redistest.StartCluster(l)
	})
	if suite.cluster == nil { // the first test has been told why
		t.Skip("no Redis Cluster")
	}
	return &world{t: t, cluster: suite.cluster, prefix: fmt.Sprintf("test%d:", suite.worlds.Add(1))}
}

// ownCluster is a world on a cluster of its own.
func ownCluster(t *testing.T, opts ...redistest.Option) *world {
	t.Helper()
	return &world{t: t, cluster: redistest.StartCluster(t, opts...), prefix: defaultPrefix}
}

// keys returns the names under which the servers of this world keep things.
func (w *world) keys() keyspace {
	k := keyspace{prefix: w.prefix, buckets: 1}
	if k.prefix == "" {
		k.prefix = defaultPrefix
	}
	if w.cluster != nil {
		k.buckets, k.cluster = defaultBuckets, true
	}
	return k
}

// connKey is the key whose life is an entry's deadline.
func (w *world) connKey(room, conn string) string { return w.keys().Conn(room, conn) }

// stateKey is the key that holds a copy of a presence state.
func (w *world) stateKey(room, conn string) string { return w.keys().State(room, conn) }

// eachNode runs do with a client of each Redis that takes writes.
func (w *world) eachNode(do func(c redis.UniversalClient)) {
	w.t.Helper()
	if w.cluster == nil {
		do(w.client())
		return
	}
	w.cluster.EachMaster(w.t, func(_ int, c *redis.Client) { do(c) })
}

// inStore returns the names of all keys of this world.
func (w *world) inStore() []string {
	w.t.Helper()
	var all []string
	w.eachNode(func(c redis.UniversalClient) {
		for i := c.Scan(w.t.Context(), 0, w.keys().prefix+"*", 10_000).Iterator(); ; {
			if !i.Next(w.t.Context()) {
				require.NoError(w.t, i.Err())
				return
			}
			all = append(all, i.Val())
		}
	})
	slices.Sort(all)
	return slices.Compact(all)
}
