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

// tenant is one of two applications on one Redis: two servers with a transport
// of their own, and a subscriber of each room on the second one.
type tenant struct {
	t       *testing.T
	clients []redis.UniversalClient
	servers []*mesh.PresenceManager
	rooms   []string

	mu   sync.Mutex // guards told
	told []string   // "join lobby c1", as the subscribers were told
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
					n.told = append(n.told, fmt.Sprint(e.Type, " ", room, " ", e.ConnectionID))
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
			_ = m.Shutdown(short) // one of them has no Redis any more
			cancel()
		}
	})
	for range rooms {
		<-ready
	}
	return n
}

// fill has a connection of each name join every room, on one of the servers.
func (n *tenant) fill(server int, conns ...string) {
	n.t.Helper()
	for _, c := range conns {
		require.NoError(n.t, n.servers[server].Connect(n.t.Context(), c, nil))
		for _, room := range n.rooms {
			require.NoError(n.t, n.servers[server].Join(n.t.Context(), room, c))
		}
	}
}

// count returns how often the subscribers were told something.
// heard returns what the tenant's second server has told.
func (n *tenant) heard() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.told)
}

func (n *tenant) count(what string) int {
	c := 0
	for _, told := range n.heard() {
		if strings.HasPrefix(told, what) {
			c++
		}
	}
	return c
}

// TestTwoApplications: two applications use the same names of rooms and
// connections on one Redis. What befalls one, the other does not see.
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
	// Rooms are called like parts of keys, too.
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
	told := func(n *tenant, what string, times int) {
		t.Helper()
		w.Eventually(10*time.Second, func() bool { alive(); return n.count(what) == times }, "%s: %d of %d, %v", what, n.count(what), times, n.heard())
	}
	for _, n := range []*tenant{a, b} {
		told(n, "join ", 3*len(rooms))
	}
	for range 40 { // two servers have seen enough of each other to judge
		alive()
		w.Sleep(100 * time.Millisecond)
	}
	require.NoError(t, a.clients[0].Close()) // as good as dead
	told(a, "leave ", 2*len(rooms))
	require.Zero(t, b.count("leave"), "%v", b.heard())

	if databases {
		require.NoError(t, a.clients[1].FlushDB(t.Context()).Err())
		w.Eventually(10*time.Second, func() bool {
			alive()
			ids, err := a.servers[1].PresentConnections(t.Context(), "lobby")
			return err == nil && slices.Equal(ids, []string{"c2"})
		}, "what was flushed is there again")
	}
	for range 40 {
		alive()
		w.Sleep(100 * time.Millisecond)
	}
	require.Equal(t, 2*len(rooms), a.count("leave"), "%v", a.heard())
	require.Zero(t, b.count("leave"), "%v", b.heard())
	require.Equal(t, 3*len(rooms), b.count("join"), "%v", b.heard())
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
	// Silence in one room with a TTL is told by expired events or the owner's clock.
	w.Eventually(5*time.Second, func() bool {
		_ = b.servers[0].Touch("c1")
		_ = b.servers[0].Touch("dead")
		return b.count("leave "+harness.RoomTimed+" c2") == 1
	}, "who is silent leaves")
	require.Equal(t, 1, b.count("leave"), "%v", b.heard())
}
