package harness

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// SpreadRooms returns n rooms on each master, by shard.
func (w *World) SpreadRooms(prefix string, n int) [][]string {
	w.T.Helper()
	owners := make([]int, ClusterBuckets)
	for b := range owners {
		owners[b] = w.Cluster.Owner(w.Cluster.SlotOf(w.Keys().Rooms(b)))
	}
	rooms := make([][]string, w.Cluster.Shards())
	for i, missing := 0, n*len(rooms); missing > 0; i++ {
		room := fmt.Sprintf("%s%d", prefix, i)
		shard := owners[w.Keys().RoomBucket(room)]
		if len(rooms[shard]) < n {
			rooms[shard] = append(rooms[shard], room)
			missing--
		}
	}
	return rooms
}

// suite is the Redis Cluster that the tests of a package share. Each test has its own
// prefix. Starting a cluster takes seconds and six processes.
var suite sharedCluster

type sharedCluster struct {
	start    sync.Once
	worlds   atomic.Int64
	cluster  *redistest.Cluster
	lifetime *lifetime
}

// lifetime is the testing.TB of a cluster that outlives the test that started it.
type lifetime struct {
	testing.TB // the test that started it, to fail or skip during the start

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

// running runs the tests of a package and then stops the shared cluster, before goleak
// looks for goroutines.
type running struct{ m *testing.M }

func (r running) Run() int {
	code := r.m.Run()
	suite.end()
	return code
}

// ClusterWorld returns a world on the shared cluster.
func ClusterWorld(t *testing.T) *World {
	t.Helper()
	suite.start.Do(func() {
		l := &lifetime{TB: t}
		suite.lifetime = l
		suite.cluster = redistest.StartCluster(l)
	})
	if suite.cluster == nil { // the first test has reported why
		t.Skip("no Redis Cluster")
	}
	return &World{T: t, Cluster: suite.cluster, Prefix: fmt.Sprintf("test%d:", suite.worlds.Add(1))}
}

// OwnCluster returns a world on a cluster of its own.
func OwnCluster(t *testing.T, opts ...redistest.Option) *World {
	t.Helper()
	return &World{T: t, Cluster: redistest.StartCluster(t, opts...), Prefix: RedisPrefix}
}

// Defaults of Options, as documented.
const (
	RedisPrefix    = "mesh:"
	ClusterBuckets = 64
)

// KeyPrefix returns Options.Prefix of the servers of this world.
func (w *World) KeyPrefix() string { return cmp.Or(w.Prefix, RedisPrefix) }

// Keys returns the names of the keys of this world.
func (w *World) Keys() store.Keys { return w.KeysUnder(w.KeyPrefix()) }

// KeysUnder returns the names of keys under another prefix in the Redis of this world.
func (w *World) KeysUnder(prefix string) store.Keys {
	if w.Cluster != nil {
		return testhook.NewKeys(prefix, 0, ClusterBuckets, true)
	}
	return testhook.NewKeys(prefix, 0, 1, false)
}

// ConnKey returns the key that expires if a connection is silent in a room.
func (w *World) ConnKey(room, conn string) string { return w.Keys().Conn(room, conn) }

// StateKey returns the key that holds a copy of a presence state.
func (w *World) StateKey(room, conn string) string { return w.Keys().State(room, conn) }

// EachNode calls do with a client of each Redis that accepts writes.
func (w *World) EachNode(do func(c redis.UniversalClient)) {
	w.T.Helper()
	if w.Cluster == nil {
		do(w.Client())
		return
	}
	w.Cluster.EachMaster(w.T, func(_ int, c *redis.Client) { do(c) })
}

// InStore returns the names of all keys of this world.
func (w *World) InStore() []string {
	w.T.Helper()
	var all []string
	w.EachNode(func(c redis.UniversalClient) {
		for i := c.Scan(w.T.Context(), 0, w.KeyPrefix()+"*", 10_000).Iterator(); ; {
			if !i.Next(w.T.Context()) {
				require.NoError(w.T, i.Err())
				return
			}
			all = append(all, i.Val())
		}
	})
	slices.Sort(all)
	return slices.Compact(all)
}
