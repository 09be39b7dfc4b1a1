package api

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// tenant is one of two apps on one Redis: two servers with an own transport, and a
// subscriber of each room on the second server.
type tenant struct {
	t       *testing.T
	clients []redis.UniversalClient
	servers []*mesh.PresenceManager
	rooms   []string

	mu      sync.Mutex // guards updates
	updates []string   // received updates, such as "join lobby c1"
}

func newTenant(t *testing.T, w *harness.World, opts func() mesh.Options, rooms []string) *tenant {
	t.Helper()
	n := &tenant{t: t, rooms: rooms}
	for range 2 {
		o := opts()
		o.LeaseTTL = 2 * time.Second
		m, err := mesh.NewPresenceManager(o)
		require.NoError(t, err)
		require.NoError(t, m.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		require.NoError(t, m.TrackPresence(mesh.Exact(harness.RoomTimed), mesh.PresenceOptions{TTL: time.Second}))
		require.NoError(t, m.Start(t.Context()))
		n.servers, n.clients = append(n.servers, m), append(n.clients, o.Redis)
	}
	var watching sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{}, len(rooms))
	for _, room := range rooms {
		watching.Go(func() {
			for e, err := range n.servers[1].Subscribe(ctx, room, mesh.SubscribeOptions{}) {
				switch {
				case err != nil && ctx.Err() == nil && !errors.Is(err, mesh.ErrClosed):
					t.Errorf("subscription to %s: %v", room, err)
				case err != nil:
				case e.Snapshot != nil:
					assert.Empty(t, e.Snapshot.Members)
					ready <- struct{}{}
				default:
					n.mu.Lock()
					n.updates = append(n.updates, fmt.Sprint(e.Type, " ", room, " ", e.ConnectionID))
					n.mu.Unlock()
				}
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		watching.Wait()
		for _, m := range n.servers {
			short, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			_ = m.Shutdown(short) // one server has no Redis any more
			cancel()
		}
	})
	for range rooms {
		<-ready
	}
	return n
}

// fill lets connections with the given names join every room, on one of the servers.
func (n *tenant) fill(server int, conns ...string) {
	n.t.Helper()
	for _, c := range conns {
		require.NoError(n.t, n.servers[server].Connect(n.t.Context(), c, nil))
		for _, room := range n.rooms {
			require.NoError(n.t, n.servers[server].Join(n.t.Context(), room, c))
		}
	}
}

// received returns the updates of the subscribers.
func (n *tenant) received() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.updates)
}

// count returns the number of updates that begin with a text.
func (n *tenant) count(text string) int {
	c := 0
	for _, update := range n.received() {
		if strings.HasPrefix(update, text) {
			c++
		}
	}
	return c
}

// TestTwoApplications runs two apps with the same names of rooms and connections on one
// Redis. Faults of one app must not affect the other.
func TestTwoApplications(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		prefix [2]string
		db     [2]int
	}{
		"prefixes":                  {prefix: [2]string{"mesh:", "mesh:presence:"}},
		"prefixes without colon":    {prefix: [2]string{"a", "ab"}},
		"prefix and number":         {prefix: [2]string{"a1", "a"}, db: [2]int{0, 10}},
		"databases, the same names": {prefix: [2]string{"mesh:", "mesh:"}, db: [2]int{0, 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
				side := func(i int) func() mesh.Options {
					return func() mesh.Options {
						o := redis.Options{}
						if w.Virtual {
							o = *w.Mem.Options()
						} else {
							o.Addr = w.Real.Addr()
						}
						o.DB = c.db[i]
						client := redis.NewClient(&o)
						t.Cleanup(func() { _ = client.Close() })
						return mesh.Options{Redis: client, Prefix: c.prefix[i]}
					}
				}
				twoApplications(t, w, side(0), side(1), c.db[0] != c.db[1])
			})
		})
	}
}

func twoApplications(t *testing.T, w *harness.World, one, other func() mesh.Options, databases bool) {
	// Some names of rooms look like parts of keys.
	rooms := []string{"lobby", harness.RoomTimed, "instances", "presence:conn:lobby", "presence:members:lobby"}
	a, b := newTenant(t, w, one, rooms), newTenant(t, w, other, rooms)
	for _, n := range []*tenant{a, b} {
		n.fill(0, "c1", "dead")
		n.fill(1, "c2")
	}
	alive := func() {
		for _, n := range []*tenant{a, b} {
			for i, ids := range [][]string{{"c1", "dead"}, {"c2"}} {
				for _, id := range ids {
					_ = n.servers[i].Touch(id)
				}
			}
		}
	}
	expect := func(n *tenant, text string, times int) {
		t.Helper()
		w.Eventually(10*time.Second, func() bool { alive(); return n.count(text) == times }, "%s: %d of %d, %v", text, n.count(text), times, n.received())
	}
	for _, n := range []*tenant{a, b} {
		expect(n, "join ", 3*len(rooms))
	}
	for range 40 { // until the servers are in contact
		alive()
		w.Sleep(100 * time.Millisecond)
	}
	require.NoError(t, a.clients[0].Close()) // has the same effect as killing the server
	expect(a, "leave ", 2*len(rooms))
	require.Zero(t, b.count("leave"), "%v", b.received())

	if databases {
		require.NoError(t, a.clients[1].FlushDB(t.Context()).Err())
		w.Eventually(10*time.Second, func() bool {
			alive()
			ids, err := a.servers[1].PresentConnections(t.Context(), "lobby")
			return err == nil && slices.Equal(ids, []string{"c2"})
		}, "the flushed entries are restored")
	}
	for range 40 {
		alive()
		w.Sleep(100 * time.Millisecond)
	}
	require.Equal(t, 2*len(rooms), a.count("leave"), "%v", a.received())
	require.Zero(t, b.count("leave"), "%v", b.received())
	require.Equal(t, 3*len(rooms), b.count("join"), "%v", b.received())
	for i, room := range rooms {
		ids, err := b.servers[0].PresentConnections(t.Context(), room)
		require.NoError(t, err)
		require.ElementsMatch(t, []string{"c1", "c2", "dead"}, ids, "%d %s", i, room)
		ids, err = a.servers[1].PresentConnections(t.Context(), room)
		require.NoError(t, err)
		require.Equal(t, []string{"c2"}, ids, room)
	}
	st := b.servers[0].Stats()
	require.Zero(t, st.ServersDeclaredDead+st.Reregistered+st.Leaves["server_lost"]+st.Leaves["expired"]+st.Rejoined)
	// In a room with a TTL, a silent connection leaves, by expired events or by the
	// owner's clock.
	w.Eventually(5*time.Second, func() bool {
		_ = b.servers[0].Touch("c1")
		_ = b.servers[0].Touch("dead")
		return b.count("leave "+harness.RoomTimed+" c2") == 1
	}, "the silent connection leaves")
	require.Equal(t, 1, b.count("leave"), "%v", b.received())
}
