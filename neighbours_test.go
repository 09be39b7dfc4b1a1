package mesh

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
)

// nameKind is one kind of names that a keyspace has: what it begins with, which
// ends may follow, and some of those.
type nameKind struct {
	begin string
	ends  *regexp.Regexp
	some  []string
}

func (n nameKind) has(name string) bool {
	rest, ok := strings.CutPrefix(name, n.begin)
	return ok && n.ends.MatchString(rest)
}

// minted reports whether the ends are drawn at random.
func (n nameKind) minted() bool { return len(n.some) == 1 && len(n.some[0]) >= 16 }

// kindsOf returns the kinds of names of a keyspace without a cluster.
func kindsOf(k keyspace) []nameKind {
	const inc = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	none := regexp.MustCompile(`^$`)
	room, roomConn := regexp.MustCompile(`(?s)^.+$`), regexp.MustCompile(`(?s)^.+:[^:]+$`)
	conn, random, digits := regexp.MustCompile(`^[^:\s]+$`), regexp.MustCompile(`^[A-Z2-7]{26}$`), regexp.MustCompile(`^[0-9a-f]{16}$`)
	words := []string{"x", "instances", "dead", "format", "rooms"}
	pairs := []string{"x:y", "presence:x:y", "room-meta:x:y"}
	return []nameKind{
		{k.Members(""), room, words}, {k.Seq(""), room, words}, {k.RoomMeta(""), room, words}, {k.EventsPrefix(), room, words},
		{strings.TrimSuffix(k.Conn("", ""), ":"), roomConn, pairs}, {strings.TrimSuffix(k.State("", ""), ":"), roomConn, pairs},
		{k.ConnMeta(""), conn, words}, {k.Owned(0, ""), random, []string{inc}}, {k.Fence(0, ""), random, []string{inc}},
		{k.Control(""), random, []string{inc}}, {k.prefix + "canary:", digits, []string{"0123456789abcdef"}},
		{k.Rooms(0), none, []string{""}}, {k.Instances(), none, []string{""}}, {k.Dead(), none, []string{""}}, {k.Format(), none, []string{""}},
		{k.Foreign()[0], none, []string{""}}, {k.Foreign()[1], none, []string{""}},
	}
}

// TestPrefixesNeverMeet: two prefixes that are both allowed have no name of a
// key or channel in common, however the longer one goes on after the shorter.
func TestPrefixesNeverMeet(t *testing.T) {
	t.Parallel()
	tried := 0
	for _, prefix := range []string{"mesh:", "a", "app1", "a:presence:"} {
		for _, db := range []int{0, 1, 10} {
			short := keyspace{prefix: prefix, db: db, buckets: 1}
			for _, more := range continuations(short) {
				if checkPrefix(prefix+more) != nil {
					continue
				}
				for _, otherDB := range []int{0, 1, 10} {
					tried++
					long := keyspace{prefix: prefix + more, db: otherDB, buckets: 1}
					require.Empty(t, common(short, long), "%q and %q, databases %d and %d", short.prefix, long.prefix, db, otherDB)
				}
			}
		}
	}
	require.Greater(t, tried, 2000)
	// The words are what keeps them apart.
	require.NotEmpty(t, common(plainKeys, keyspace{prefix: "mesh:room-meta:", buckets: 1}))
	for _, word := range layoutWords {
		require.ErrorIs(t, checkPrefix("mesh:"+word), ErrInvalidOptions)
	}
}

// continuations are what a prefix may go on with to look like a name.
func continuations(k keyspace) []string {
	list := []string{"b", "0", "1", "10", "@", "@0", "@0:", "1:"}
	for _, kind := range kindsOf(k) {
		ends := []string{""}
		if !kind.minted() { // nobody has those in a prefix
			ends = append(ends, kind.some...)
		}
		for _, end := range ends {
			name := strings.TrimPrefix(kind.begin+end, k.prefix)
			for i := 1; i <= len(name); i++ {
				list = append(list, name[:i])
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// common returns names that both keyspaces have.
func common(a, b keyspace) []string {
	var list []string
	for _, pair := range [][2][]nameKind{{kindsOf(a), kindsOf(b)}, {kindsOf(b), kindsOf(a)}} {
		for _, theirs := range pair[0] {
			for _, end := range theirs.some {
				if slices.ContainsFunc(pair[1], func(ours nameKind) bool { return ours.has(theirs.begin + end) }) {
					list = append(list, theirs.begin+end)
				}
			}
		}
	}
	return list
}

// tenant is one of two applications on one Redis: two servers with a transport
// of their own, and a subscriber of each room on the second one.
type tenant struct {
	t       *testing.T
	clients []redis.UniversalClient
	servers []*PresenceManager
	rooms   []string

	mu   sync.Mutex // guards told
	told []string   // "join lobby c1", as the subscribers were told
}

func newTenant(t *testing.T, w *world, opts func() Options, rooms []string) *tenant {
	t.Helper()
	n := &tenant{t: t, rooms: rooms}
	for range 2 {
		o := opts()
		o.LeaseTTL = 2 * time.Second
		m, err := NewPresenceManager(o)
		require.NoError(t, err)
		require.NoError(t, m.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{}))
		require.NoError(t, m.TrackPresence(Exact(roomTimed), PresenceOptions{TTL: time.Second}))
		require.NoError(t, m.Start(t.Context()))
		n.servers, n.clients = append(n.servers, m), append(n.clients, o.Redis)
	}
	var watching sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{}, len(rooms))
	for _, room := range rooms {
		watching.Go(func() {
			for e, err := range n.servers[1].Subscribe(ctx, room, SubscribeOptions{}) {
				switch {
				case err != nil && ctx.Err() == nil && !errors.Is(err, ErrClosed):
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
			everywhereOn(t, nil, func(t *testing.T, w *world) {
				side := func(i int) func() Options {
					return func() Options {
						o := redis.Options{}
						if w.virtual {
							o = *w.mem.Options()
						} else {
							o.Addr = w.real.Addr()
						}
						o.DB = c.db[i]
						client := redis.NewClient(&o)
						t.Cleanup(func() { _ = client.Close() })
						return Options{Redis: client, Prefix: c.prefix[i]}
					}
				}
				twoApplications(t, w, side(0), side(1), c.db[0] != c.db[1])
			})
		})
	}
}

func twoApplications(t *testing.T, w *world, one, other func() Options, databases bool) {
	// Rooms are called like parts of keys, too.
	rooms := []string{"lobby", roomTimed, "instances", "presence:conn:lobby", "presence:members:lobby"}
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
		w.eventually(10*time.Second, func() bool { alive(); return n.count(what) == times }, "%s: %d of %d, %v", what, n.count(what), times, n.heard())
	}
	for _, n := range []*tenant{a, b} {
		told(n, "join ", 3*len(rooms))
	}
	for range 40 { // two servers have seen enough of each other to judge
		alive()
		w.sleep(100 * time.Millisecond)
	}
	require.NoError(t, a.clients[0].Close()) // as good as dead
	told(a, "leave ", 2*len(rooms))
	require.Zero(t, b.count("leave"), "%v", b.heard())

	if databases {
		require.NoError(t, a.clients[1].FlushDB(t.Context()).Err())
		w.eventually(10*time.Second, func() bool {
			alive()
			ids, err := a.servers[1].PresentConnections(t.Context(), "lobby")
			return err == nil && slices.Equal(ids, []string{"c2"})
		}, "what was flushed is there again")
	}
	for range 40 {
		alive()
		w.sleep(100 * time.Millisecond)
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
	require.Zero(t, st.Buried+st.Reborn+st.Leaves["server_lost"]+st.Leaves["expired"]+st.Rejoined)
	// Silence in one room with a TTL is told by expired events or the owner's clock.
	w.eventually(5*time.Second, func() bool {
		_ = b.servers[0].Touch("c1")
		_ = b.servers[0].Touch("dead")
		return b.count("leave "+roomTimed+" c2") == 1
	}, "who is silent leaves")
	require.Equal(t, 1, b.count("leave"), "%v", b.heard())
}
