package faults

import (
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
)

const aclPassword = "s3cr3t/of=mesh"

// restricted returns a world whose servers reach Redis over a URL with TLS, as a user
// with the documented rights only.
func restricted(t *testing.T, more ...string) *harness.World {
	t.Helper()
	w := harness.RealWorld(t, redistest.WithTLS(), redistest.WithUser("mesh "+harness.AclOf(aclPassword, more...)))
	w.URL, w.CA = w.Real.URL("mesh", aclPassword), w.Real.CAFile()
	w.As = func() redis.UniversalClient { return harness.ClientAt(t, w.URL, w.CA) }
	return w
}

// refusals returns the commands that Redis has refused to a user. It leaves out what
// the Redis client sends to newer servers when it connects, and does not need.
func refusals(t *testing.T, admin *redis.Client, user string) []string {
	t.Helper()
	entries, err := admin.ACLLog(t.Context(), 100).Result()
	require.NoError(t, err)
	var list []string
	for _, e := range entries {
		command, _, _ := strings.Cut(e.Object, "|") // Redis before 7.0 reports no subcommand
		if e.Username == user && command != "client" {
			list = append(list, e.Reason+" "+command)
		}
	}
	return list
}

// TestRestrictedUser uses all features with a restricted user without CONFIG, over TLS.
// Redis may only refuse the one CONFIG command, and the log may only have the warning
// about it.
func TestRestrictedUser(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := restricted(t)
	admin := w.Real.Client(t)
	var log testlog.Warnings
	d := newDrill(w, 2, []string{"a", harness.RoomTimed}, harness.LeaseOf(2*time.Second), harness.AllowMetadata, func(o *mesh.Options) { o.Logger = slog.New(&log) })
	for _, s := range d.servers {
		require.NoError(t, harness.TrackTimed(s.Server, time.Second))
	}
	started := log.Texts()
	require.Len(t, started, len(d.servers), "%v", started)
	for _, text := range started {
		require.Contains(t, text, "set notify-keyspace-events to include Ex")
	}
	stay := d.members(4)
	useEverything(t, d)
	crowd(t, w)

	victim := w.Child(harness.ChildConfig{Lease: 2 * time.Second, Timed: time.Second, Events: true})
	for range 5 {
		p := victim.Dial()
		p.Join("a")
		p.Join(harness.RoomTimed)
		d.note("a", p.ID, p.States("a", 1))
		d.note(harness.RoomTimed, p.ID, harness.WantedEntry{In: true})
		defer d.forget(p)
	}
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()
	victim.Die()
	d.mu.Lock()
	for _, room := range d.want {
		for id := range room {
			if !slices.ContainsFunc(stay, func(p *harness.Peer) bool { return p.ID == id }) {
				delete(room, id)
			}
		}
	}
	d.mu.Unlock()
	d.settles(time.Now(), 8*time.Second)
	d.stayed(stay)
	require.Equal(t, []string{"command config"}, refusals(t, admin, "mesh"))
	require.Equal(t, started, log.Texts(), "one warning per server")

	w.Real.Restart(true)
	d.settles(time.Now(), 8*time.Second)
	d.stayed(stay)
	d.awaitContact()
	d.finish()
	require.Equal(t, []string{"command config"}, refusals(t, admin, "mesh"))
	for _, text := range log.Texts()[len(started):] { // the warnings about the restart
		require.NotContains(t, text, "NOPERM")
	}
}

// TestRestrictedUserWithUsers uses users, Grace and caps with a restricted user: they need
// no further right.
func TestRestrictedUserWithUsers(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	const room, soon = "a", 10 * time.Second
	w := restricted(t)
	admin := w.Real.Client(t)
	s := w.Users(mesh.PresenceOptions{Grace: time.Second, MaxUsers: 2}, harness.LeaseOf(2*time.Second))
	viewer, ann, bob, eve := s.DialAs("viewer"), s.DialAs("ann"), s.DialAs("bob"), s.DialAs("eve")
	require.True(t, viewer.Subscribe(room).Success)
	ann.Join(room)
	bob.Join(room)
	require.Equal(t, "EFULL", eve.Room("mesh/join-room", room).Code)

	ann.Close()
	viewer.Expect(soon, "disconnect", ann.ID)
	back := s.DialAs("ann")
	require.True(t, back.Join(room).Success, "in its own place, or in a free one")
	viewer.Expect(soon, "leave", ann.ID)
	require.NoError(t, admin.Del(t.Context(), w.Keys().Users(room)).Err()) // the users are counted again
	last := s.DialAs("ann")
	require.True(t, last.JoinReplacing(room, back.ID).Success)
	viewer.Expect(soon, "leave", back.ID)

	bob.Close()
	viewer.Expect(soon, "disconnect", bob.ID)
	viewer.Expect(soon, "leave", bob.ID)
	removed, err := s.Rooms().RemoveUser(t.Context(), room, "ann")
	require.NoError(t, err)
	require.Equal(t, 1, removed)
	viewer.Expect(soon, "leave", last.ID)
	numbers, err := s.Presence().Occupancy(t.Context(), room)
	require.NoError(t, err)
	require.Zero(t, numbers[room].Connections)
	require.Equal(t, []string{"command config"}, refusals(t, admin, "mesh"))
}

// useEverything calls the API for connections and rooms, on the server of the
// connection and on another one.
func useEverything(t *testing.T, d *drill) {
	t.Helper()
	ctx := t.Context()
	here, there := d.servers[0], d.servers[1]
	p, q := here.Dial(), there.Dial()
	d.settles(time.Now(), 5*time.Second)
	for _, s := range []*harness.Server{here, there} {
		conns, rooms := s.Connections(), s.Rooms()
		require.NoError(t, conns.SetMetadata(ctx, p.ID, map[string]string{"name": "p"}, mesh.MetadataOptions{}))
		got, err := conns.Metadata(ctx, p.ID)
		require.NoError(t, err)
		require.JSONEq(t, `{"name":"p"}`, string(got))
		require.NoError(t, rooms.Add(ctx, "work", p.ID, mesh.AddOptions{}))
		require.NoError(t, rooms.Add(ctx, "work", q.ID, mesh.AddOptions{}))
		in, err := rooms.Contains(ctx, "work", p.ID)
		require.NoError(t, err)
		require.True(t, in)
		members, err := rooms.ConnectionIDs(ctx, "work")
		require.NoError(t, err)
		require.Len(t, members, 2)
		all, err := rooms.All(ctx)
		require.NoError(t, err)
		require.Contains(t, all, "work")
		_, err = s.Presence().Servers(ctx)
		require.NoError(t, err)
		_, err = rooms.List(ctx, mesh.RoomQuery{})
		require.NoError(t, err)
		_, err = rooms.Entries(ctx, "work", mesh.EntryQuery{})
		require.NoError(t, err)
		_, err = rooms.Watched(ctx, mesh.WatchedQuery{})
		require.NoError(t, err)
		_, err = rooms.Of(ctx, p.ID)
		require.NoError(t, err)
		_, err = conns.RoomMetadata(ctx, "work")
		require.NoError(t, err)
		require.NoError(t, rooms.SetMetadata(ctx, "work", map[string]int{"n": 1}, mesh.MetadataOptions{}))
		require.NoError(t, rooms.SetMetadata(ctx, "work", map[string]int{"m": 1}, mesh.MetadataOptions{Strategy: mesh.Merge}))
		_, err = rooms.Metadata(ctx, "work")
		require.NoError(t, err)
		require.NoError(t, rooms.Send(ctx, "work", "hello", nil))
		require.NoError(t, conns.Send(ctx, p.ID, "hello", nil))
		require.NoError(t, conns.Recheck(ctx, p.ID))
		watcher := s.Dial()
		watcher.Subscribe("work")
		p.State("work", map[string]int{"n": 1}, map[string]any{"expireAfter": 300})
		watcher.W.Eventually(5*time.Second, func() bool { return watcher.Count("state", p.ID) >= 2 }, "the end of a state")
		_, err = rooms.Remove(ctx, "work", p.ID)
		require.NoError(t, err)
		n, err := s.Presence().Count(ctx, "work")
		require.NoError(t, err)
		require.Equal(t, 1, n)
		_, err = s.Presence().CleanExpired(ctx, "work")
		require.NoError(t, err)
		require.NoError(t, rooms.Clear(ctx, "work"))
		require.NoError(t, rooms.Delete(ctx, "work"))
	}
	require.NoError(t, here.Connections().Close(ctx, q.ID))
	q.Closed(5 * time.Second)
}

// crowd fills a room that has to be read in pages.
func crowd(t *testing.T, w *harness.World) {
	t.Helper()
	const size = 600
	m, err := mesh.NewPresenceManager(w.Options())
	require.NoError(t, err)
	require.NoError(t, m.Start(t.Context()))
	defer func() { require.NoError(t, m.Shutdown(t.Context())) }()
	require.NoError(t, m.TrackPresence(mesh.Exact("crowd"), mesh.PresenceOptions{}))
	errs := make(chan error, size)
	for i := range size {
		go func() {
			id := fmt.Sprint("c", i)
			if err := m.Connect(t.Context(), id, nil); err != nil {
				errs <- err
				return
			}
			errs <- m.Join(t.Context(), "crowd", id)
		}()
	}
	for range size {
		require.NoError(t, <-errs)
	}
	members, err := m.Members(t.Context(), "crowd")
	require.NoError(t, err)
	require.Len(t, members, size)
	for event, err := range m.Subscribe(t.Context(), "crowd", mesh.SubscribeOptions{}) {
		require.NoError(t, err)
		require.NotEmpty(t, event)
		break
	}
}

// TestRestrictedUserMayConfigure checks that a user with CONFIG is refused nothing, and
// that the server makes the setting.
func TestRestrictedUserMayConfigure(t *testing.T) {
	t.Parallel()
	w := restricted(t, harness.AclConfig)
	admin := w.Real.Client(t)
	var log testlog.Warnings
	s := w.Tracked(func(o *mesh.Options) { o.Logger = slog.New(&log) })
	s.Dial().Join("lobby")
	got, err := admin.ConfigGet(t.Context(), "notify-keyspace-events").Result()
	require.NoError(t, err)
	require.Subset(t, []byte(got["notify-keyspace-events"]), []byte("xE"))
	s.End()
	require.Empty(t, refusals(t, admin, "mesh"))
	require.Empty(t, log.Texts())
}

// TestUserLacksARight removes one right at a time. Without it, Start must fail and name
// the right. So each documented right is needed, and a missing one is not only noticed
// later, in the middle of a script.
func TestUserLacksARight(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t)
	admin := r.Client(t)
	users := 0
	as := func(db int, rules []string) *redis.Client {
		users++
		name := fmt.Sprint("user", users)
		require.NoError(t, admin.ACLSetUser(t.Context(), name, rules...).Err())
		c := redis.NewClient(&redis.Options{Addr: r.Addr(), Username: name, Password: "pw", DB: db})
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	all := strings.Fields(harness.AclOf("pw"))
	with := func(old string, now ...string) []string {
		i := slices.Index(all, old)
		require.GreaterOrEqual(t, i, 0, old)
		return slices.Concat(all[:i], now, all[i+1:])
	}
	refused := func(c *redis.Client, text string) {
		err := harness.TryStart(t, c)
		require.ErrorIs(t, err, mesh.ErrUnavailable, text)
		require.ErrorContains(t, err, text)
		require.ErrorContains(t, err, "ACL")
		for _, key := range admin.Keys(t.Context(), "*").Val() {
			require.NotEqual(t, time.Duration(-1), admin.PTTL(t.Context(), key).Val(), "a failed start leaves %s", key)
		}
	}
	for right := range strings.FieldsSeq(harness.AclCommands) {
		require.NoError(t, admin.ScriptFlush(t.Context()).Err())
		refused(as(0, with(right)), right[1:])
	}
	refused(as(0, with("~mesh:*", "~other:*")), `"mesh:`)
	refused(as(0, with("~mesh:*", "~mesh:presence:*")), `"mesh:room-meta:`)
	refused(as(0, with("&mesh:*", "&other:*")), "publish")
	refused(as(0, with("&mesh:*", "&mesh:@0:server:*")), "publish")
	refused(as(0, with("&mesh:*", "&mesh:@0:server:*", "&mesh:@0:presence:events:*")), `"mesh:@0:ended"`)
	refused(as(1, all), "select")
	refused(as(0, with(">pw", ">other")), "WRONGPASS")
	refused(as(0, with("on", "off")), "WRONGPASS")
	// NOAUTH: the default user needs a password.
	require.NoError(t, admin.ACLSetUser(t.Context(), "default", "resetpass", ">pw").Err())
	refused(r.Client(t), "NOAUTH")
}

// TestUserLacksTheExpiredEvents checks that servers work without the right to expired
// events, and warn about it.
func TestUserLacksTheExpiredEvents(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t, redistest.Args("--notify-keyspace-events", "Ex"),
		redistest.WithUser("mesh "+strings.ReplaceAll(harness.AclOf("pw"), "&__keyevent@0__:expired", "")))
	var log testlog.Warnings
	c := redis.NewClient(&redis.Options{Addr: r.Addr(), Username: "mesh", Password: "pw"})
	defer func() { _ = c.Close() }()
	srv, err := mesh.NewServer(mesh.Options{Redis: c, Logger: slog.New(&log)})
	require.NoError(t, err)
	require.NoError(t, srv.Start(t.Context()))
	require.NoError(t, srv.Shutdown(t.Context()))
	require.Len(t, log.Texts(), 1)
	require.Contains(t, log.Texts()[0], "__keyevent@0__:expired")
}

// TestRestrictedUserOfACluster checks the rights that a cluster client needs in
// addition.
func TestRestrictedUserOfACluster(t *testing.T) {
	t.Parallel()
	harness.Long(t, "starts a cluster")
	w := harness.ClusterWorld(t)
	user := strings.TrimSuffix(w.KeyPrefix(), ":") // the cluster is shared
	rules := strings.ReplaceAll(harness.AclOf("pw", harness.AclCluster, harness.AclConfig), "mesh:*", w.KeyPrefix()+"*")
	admins := make([]*redis.Client, 0, len(w.Cluster.Addrs()))
	for _, addr := range w.Cluster.Addrs() {
		c := redis.NewClient(&redis.Options{Addr: addr})
		defer func() { _ = c.Close() }()
		require.NoError(t, c.ACLSetUser(t.Context(), user, strings.Fields(rules)...).Err())
		admins = append(admins, c)
	}
	w.As = func() redis.UniversalClient {
		return w.Cluster.Client(t, func(o *redis.ClusterOptions) { o.Username, o.Password = user, "pw" })
	}
	var log testlog.Warnings
	d := newDrill(w, 2, []string{"a", harness.RoomTimed}, harness.LeaseOf(2*time.Second), harness.AllowMetadata, func(o *mesh.Options) { o.Logger = slog.New(&log) })
	for _, s := range d.servers {
		require.NoError(t, harness.TrackTimed(s.Server, time.Second))
	}
	d.members(2)
	useEverything(t, d)
	crowd(t, w)
	d.settles(time.Now(), 5*time.Second)
	for _, s := range d.servers {
		s.End()
	}
	for _, admin := range admins {
		require.Empty(t, refusals(t, admin, user), admin)
	}
	require.Empty(t, log.Texts())
}

// TestUserOfAClusterLacksARightOnOneNode checks that a right which is missing on one
// node is reported. Users are made on each node separately, so one node is easily
// forgotten.
func TestUserOfAClusterLacksARightOnOneNode(t *testing.T) {
	t.Parallel()
	harness.Long(t, "starts a cluster")
	w := harness.ClusterWorld(t)
	prefix := w.KeyPrefix() // the cluster is shared
	user := strings.TrimSuffix(prefix, ":")
	rules := strings.Fields(strings.ReplaceAll(harness.AclOf("pw", harness.AclCluster, harness.AclConfig), "mesh:*", prefix+"*"))
	set := func(shard int, rules ...string) {
		w.Cluster.EachMaster(t, func(s int, admin *redis.Client) {
			if s == shard {
				require.NoError(t, admin.ACLSetUser(t.Context(), user, rules...).Err())
			}
		})
	}
	for _, addr := range w.Cluster.Addrs() {
		c := redis.NewClient(&redis.Options{Addr: addr})
		require.NoError(t, c.ACLSetUser(t.Context(), user, rules...).Err())
		require.NoError(t, c.Close())
	}
	try := func() error {
		client := w.Cluster.Client(t, func(o *redis.ClusterOptions) { o.Username, o.Password = user, "pw" })
		return harness.TryStart(t, client, func(o *mesh.Options) { o.Prefix = prefix })
	}
	for shard := range w.Cluster.Shards() {
		set(shard, "-info")
		err := try()
		require.ErrorIs(t, err, store.ErrForbidden)
		require.ErrorContains(t, err, "info")
		set(shard, rules...)
	}
	require.NoError(t, try())
}

// TestDocsQuoteTheRights checks that docs/operations.md lists the same rights as this
// package tests.
func TestDocsQuoteTheRights(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(harness.InModule("docs", "operations.md"))
	require.NoError(t, err)
	_, rest, found := strings.Cut(string(text), "redis-cli ACL SETUSER mesh reset ")
	require.True(t, found, "the page lacks the command")
	quoted, _, found := strings.Cut(rest, "\n```")
	require.True(t, found)
	words := strings.Fields(strings.NewReplacer("\\\n", " ", "'", "").Replace(quoted))
	require.Equal(t, strings.Fields(harness.AclOf("PASSWORD")), words)
	for more := range strings.FieldsSeq(harness.AclCluster + " " + harness.AclConfig) {
		require.Contains(t, string(text), "`"+more+"`")
	}
}
