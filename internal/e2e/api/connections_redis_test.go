package api

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// The connections of a server to each Redis process, as docs/operations.md describes
// them: the pools of the client as far as they are needed, one subscription connection
// for the events of rooms, and one for expired events if they are used. On a cluster,
// the former is at one node, and the latter at every node.
const (
	testPool      = 6
	testPipelines = 3
	ownConns      = 2
)

const connName = "mesh-under-test"

// connGauge counts the connections of one client at some Redis processes.
type connGauge struct {
	t      *testing.T
	admins []*redis.Client

	stop chan struct{}
	done chan struct{}
	most []int // largest number at each process since watch
}

func newConnGauge(t *testing.T, addrs ...string) *connGauge {
	g := &connGauge{t: t, most: make([]int, len(addrs))}
	for _, addr := range addrs {
		c := redis.NewClient(&redis.Options{Addr: addr})
		t.Cleanup(func() { _ = c.Close() })
		g.admins = append(g.admins, c)
	}
	return g
}

// count returns the number of connections at each process, and the number of all
// connections that subscribe.
func (g *connGauge) count() (at []int, subscribing int) {
	at = make([]int, len(g.admins))
	for i, admin := range g.admins {
		list, err := admin.ClientList(g.t.Context()).Result()
		if err != nil {
			g.t.Error(err)
			return at, 0
		}
		for line := range strings.Lines(list) {
			if !strings.Contains(line, " name="+connName+" ") {
				continue
			}
			at[i]++
			if !strings.Contains(line, " sub=0 ") {
				subscribing++
			}
		}
	}
	return at, subscribing
}

// watch records the largest number of connections until the returned function is
// called.
func (g *connGauge) watch() (most func() []int) {
	g.stop, g.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(g.done)
		for tick := time.NewTicker(5 * time.Millisecond); ; {
			at, _ := g.count()
			for i := range at {
				g.most[i] = max(g.most[i], at[i])
			}
			select {
			case <-tick.C:
			case <-g.stop:
				tick.Stop()
				return
			}
		}
	}()
	return func() []int {
		close(g.stop)
		<-g.done
		return g.most
	}
}

func TestConnectionsToRedis(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	t.Run("standalone", func(t *testing.T) {
		t.Parallel()
		w := harness.RealWorld(t)
		w.As = func() redis.UniversalClient {
			c := redis.NewClient(&redis.Options{Addr: w.Real.Addr(), ClientName: connName, PoolSize: testPool, PipelinePoolSize: testPipelines})
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		connectionsToRedis(t, w, 2, w.Real.Addr())
	})
	t.Run("sentinel", func(t *testing.T) {
		t.Parallel()
		s := redistest.StartSentinel(t)
		w := &harness.World{T: t, Watched: s}
		w.As = func() redis.UniversalClient {
			c := redis.NewFailoverClient(&redis.FailoverOptions{
				MasterName: s.MasterName(), SentinelAddrs: s.Addrs(), ClientName: connName, PoolSize: testPool, PipelinePoolSize: testPipelines,
			})
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		connectionsToRedis(t, w, 2, s.Master().Addr())
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		w := harness.ClusterWorld(t)
		w.As = func() redis.UniversalClient {
			return w.Cluster.Client(t, func(o *redis.ClusterOptions) {
				o.ClientName, o.PoolSize, o.PipelinePoolSize = connName, testPool, testPipelines
			})
		}
		connectionsToRedis(t, w, 1+len(w.Cluster.Addrs()), w.Cluster.Addrs()...)
	})
}

// connectionsToRedis counts the connections of a server that is idle, that watches
// rooms, and that has 512 concurrent callers.
func connectionsToRedis(t *testing.T, w *harness.World, subscriptions int, addrs ...string) {
	const rooms, callers, readers, joins = 10, 512, 64, 5
	g := newConnGauge(t, addrs...)
	s := w.Tracked()
	awaitSubscriptions := func() []int {
		t.Helper()
		w.Eventually(10*time.Second, func() bool { _, n := g.count(); return n == subscriptions }, "%d subscriptions", subscriptions)
		at, _ := g.count()
		return at
	}
	idle := awaitSubscriptions()
	p := s.Dial()
	for i := range rooms {
		p.Subscribe(fmt.Sprint("room", i))
	}
	watching := awaitSubscriptions()

	load := func(callers int, each func(id string, room int) error) ([]int, time.Duration) {
		most := g.watch()
		began := time.Now()
		var all sync.WaitGroup
		for i := range callers {
			all.Go(func() {
				for r := range joins {
					if err := each(fmt.Sprint("c", i), r); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		took := time.Since(began).Round(time.Millisecond)
		return most(), took
	}
	joining, joined := load(callers, func(id string, room int) error {
		if room == 0 {
			if err := s.Presence().Connect(t.Context(), id, nil); err != nil {
				return err
			}
		}
		return s.Presence().Join(t.Context(), fmt.Sprint("room", room), id)
	})
	joining = slices.Clone(joining)
	reading, read := load(readers, func(id string, room int) error { // each call is a command of its own
		_, err := s.Rooms().Contains(t.Context(), fmt.Sprint("room", room), id)
		_, err2 := s.Presence().Count(t.Context(), fmt.Sprint("room", room))
		return errors.Join(err, err2)
	})
	t.Logf("idle %v, watching %d rooms %v, at most %v while %d callers join %d rooms each in %v, and %v while %d read them twice in %v",
		idle, rooms, watching, joining, callers, joins, joined, reading, readers, read)
	for i := range addrs {
		require.LessOrEqual(t, reading[i], testPool+testPipelines+ownConns, addrs[i])
	}
	awaitSubscriptions()
}
