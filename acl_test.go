package mesh

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/store"
)

// The rights that the Redis user of a server needs: this is the one place they
// are written down, and the README quotes it. All of it is what Redis 6.2
// understands. HELLO and AUTH need no right.
const (
	aclKeys     = "~mesh:*"
	aclChannels = "&mesh:* &__keyevent@0__:expired"
	aclCommands = "+ping +info +time +eval +evalsha +publish +subscribe +unsubscribe " +
		"+type +exists +del +get +set +mget +mset +pexpire " +
		"+hget +hset +hsetnx +hmget +hdel +hlen +hgetall +hscan " +
		"+sadd +srem +scard +smismember +sscan +zadd +zrem +zscore +zrange"
	// aclCluster is what a client of a cluster asks besides, aclConfig what
	// lets servers set notify-keyspace-events by themselves.
	aclCluster = "+cluster|slots +command"
	aclConfig  = "+config|get +config|set"
)

// aclOf returns rules for a user with that password.
func aclOf(password string, more ...string) string {
	return strings.Join(append([]string{"on", ">" + password, aclKeys, "resetchannels", aclChannels, aclCommands}, more...), " ")
}

// optionsOf returns the options of a client at a URL, who trusts what the
// authority in that file has signed.
func optionsOf(url, ca string) (*redis.Options, error) {
	opts, err := redis.ParseURL(url)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	opts.TLSConfig = &tls.Config{RootCAs: pool, ServerName: opts.TLSConfig.ServerName, MinVersion: tls.VersionTLS12}
	return opts, nil
}

const aclPassword = "s3cr3t/of=mesh"

// restricted is a world whose servers reach Redis by a URL with TLS, as a user
// with no more than the rights they need.
func restricted(t *testing.T, more ...string) *world {
	t.Helper()
	w := realWorld(t, redistest.WithTLS(), redistest.WithUser("mesh "+aclOf(aclPassword, more...)))
	w.url, w.ca = w.real.URL("mesh", aclPassword), w.real.CAFile()
	w.as = func() redis.UniversalClient { return clientAt(t, w.url, w.ca) }
	return w
}

func clientAt(t *testing.T, url, ca string, setup ...func(*redis.Options)) *redis.Client {
	t.Helper()
	opts, err := optionsOf(url, ca)
	require.NoError(t, err)
	for _, f := range setup {
		f(opts)
	}
	c := redis.NewClient(opts)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// refusals returns what Redis has refused to a user, as far as that is not what
// the client library asks of newer servers when it connects, and lives without.
func refusals(t *testing.T, admin *redis.Client, user string) []string {
	t.Helper()
	entries, err := admin.ACLLog(t.Context(), 100).Result()
	require.NoError(t, err)
	var list []string
	for _, e := range entries {
		command, _, _ := strings.Cut(e.Object, "|") // before 7.0 there is no subcommand
		if e.Username == user && command != "client" {
			list = append(list, e.Reason+" "+command)
		}
	}
	return list
}

// TestRestrictedUser goes through what servers do as a user who may do nothing
// else, over TLS, without CONFIG: nothing of it is refused but the question for
// one setting, and that is all that is logged.
func TestRestrictedUser(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	w := restricted(t)
	admin := w.real.Client(t)
	var log warnings
	d := newDrill(w, 2, []string{"a", roomTimed}, leaseOf(2*time.Second), allowMetadata, func(o *Options) { o.Logger = slog.New(&log) })
	for _, s := range d.servers {
		require.NoError(t, s.trackTimed(time.Second))
	}
	started := log.texts()
	require.Len(t, started, len(d.servers), "%v", started)
	for _, text := range started {
		require.Contains(t, text, "set notify-keyspace-events to include Ex")
	}
	stay := d.members(4)
	useEverything(t, d)
	crowd(t, w)

	victim := w.child(childConfig{Lease: 2 * time.Second, Timed: time.Second, Events: true})
	for range 5 {
		p := victim.dial()
		p.join("a")
		p.join(roomTimed)
		d.note("a", p.id, p.states("a", 1))
		d.note(roomTimed, p.id, wish{in: true})
		defer d.forget(p)
	}
	d.settles(time.Now(), 5*time.Second)
	d.patient()
	victim.die()
	d.mu.Lock()
	for _, room := range d.want {
		for id := range room {
			if !slices.ContainsFunc(stay, func(p *peer) bool { return p.id == id }) {
				delete(room, id)
			}
		}
	}
	d.mu.Unlock()
	d.settles(time.Now(), 8*time.Second)
	d.stayed(stay)
	require.Equal(t, []string{"command config"}, refusals(t, admin, "mesh"))
	require.Equal(t, started, log.texts(), "no more than the one warning of each")

	w.real.Restart(true)
	d.settles(time.Now(), 8*time.Second)
	d.stayed(stay)
	d.patient()
	d.over()
	require.Equal(t, []string{"command config"}, refusals(t, admin, "mesh"))
	for _, text := range log.texts()[len(started):] { // that Redis was away
		require.NotContains(t, text, "NOPERM")
	}
}

// useEverything calls what an app can call, from the server where the
// connection is, and from another.
func useEverything(t *testing.T, d *drill) {
	t.Helper()
	ctx := t.Context()
	here, there := d.servers[0], d.servers[1]
	p, q := here.dial(), there.dial()
	d.settles(time.Now(), 5*time.Second)
	for _, s := range []*testServer{here, there} {
		conns, rooms := s.Connections(), s.Rooms()
		require.NoError(t, conns.SetMetadata(ctx, p.id, map[string]string{"name": "p"}, MetadataOptions{}))
		got, err := conns.Metadata(ctx, p.id)
		require.NoError(t, err)
		require.JSONEq(t, `{"name":"p"}`, string(got))
		require.NoError(t, rooms.Add(ctx, "work", p.id))
		require.NoError(t, rooms.Add(ctx, "work", q.id))
		in, err := rooms.Contains(ctx, "work", p.id)
		require.NoError(t, err)
		require.True(t, in)
		members, err := rooms.Members(ctx, "work")
		require.NoError(t, err)
		require.Len(t, members, 2)
		all, err := rooms.All(ctx)
		require.NoError(t, err)
		require.Contains(t, all, "work")
		_, err = s.Presence().Servers(ctx)
		require.NoError(t, err)
		_, err = rooms.List(ctx, RoomQuery{})
		require.NoError(t, err)
		_, err = rooms.Entries(ctx, "work", EntryQuery{})
		require.NoError(t, err)
		_, err = rooms.Watched(ctx, WatchedQuery{})
		require.NoError(t, err)
		_, err = rooms.Of(ctx, p.id)
		require.NoError(t, err)
		_, err = conns.RoomMetadata(ctx, "work")
		require.NoError(t, err)
		require.NoError(t, rooms.SetMetadata(ctx, "work", map[string]int{"n": 1}, MetadataOptions{}))
		require.NoError(t, rooms.SetMetadata(ctx, "work", map[string]int{"m": 1}, MetadataOptions{Strategy: Merge}))
		_, err = rooms.Metadata(ctx, "work")
		require.NoError(t, err)
		require.NoError(t, rooms.Send(ctx, "work", "hello", nil))
		require.NoError(t, conns.Send(ctx, p.id, "hello", nil))
		require.NoError(t, conns.Recheck(ctx, p.id))
		watcher := s.dial()
		watcher.subscribe("work")
		p.state("work", map[string]int{"n": 1}, map[string]any{"expireAfter": 300})
		watcher.w.eventually(5*time.Second, func() bool { return watcher.count("state", p.id) >= 2 }, "the end of a state")
		_, err = rooms.Remove(ctx, "work", p.id)
		require.NoError(t, err)
		n, err := s.Presence().Count(ctx, "work")
		require.NoError(t, err)
		require.Equal(t, 1, n)
		_, err = s.Presence().CleanExpired(ctx, "work")
		require.NoError(t, err)
		require.NoError(t, rooms.Clear(ctx, "work"))
		require.NoError(t, rooms.Delete(ctx, "work"))
	}
	require.NoError(t, here.Connections().Close(ctx, q.id))
	q.closed(5 * time.Second)
}

// crowd fills a room that is read in pages.
func crowd(t *testing.T, w *world) {
	t.Helper()
	const size = 600
	m, err := NewPresenceManager(w.options())
	require.NoError(t, err)
	require.NoError(t, m.Start(t.Context()))
	defer func() { require.NoError(t, m.Shutdown(t.Context())) }()
	require.NoError(t, m.TrackPresence(Exact("crowd"), PresenceOptions{}))
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
	for event, err := range m.Subscribe(t.Context(), "crowd", SubscribeOptions{}) {
		require.NoError(t, err)
		require.NotEmpty(t, event)
		break
	}
}

// TestRestrictedUserMayConfigure: with CONFIG nothing at all is refused, and
// the setting is made.
func TestRestrictedUserMayConfigure(t *testing.T) {
	t.Parallel()
	w := restricted(t, aclConfig)
	admin := w.real.Client(t)
	var log warnings
	s := w.tracked(func(o *Options) { o.Logger = slog.New(&log) })
	s.dial().join("lobby")
	got, err := admin.ConfigGet(t.Context(), "notify-keyspace-events").Result()
	require.NoError(t, err)
	require.Subset(t, []byte(got["notify-keyspace-events"]), []byte("xE"))
	s.shutdown()
	require.Empty(t, refusals(t, admin, "mesh"))
	require.Empty(t, log.texts())
}

// tryStart starts a server that must be refused, at once, and returns why.
func tryStart(t *testing.T, client redis.UniversalClient, setup ...func(*Options)) error {
	t.Helper()
	opts := Options{Redis: client}
	for _, f := range setup {
		f(&opts)
	}
	srv, err := NewServer(opts)
	require.NoError(t, err)
	began := time.Now()
	err = srv.Start(t.Context())
	require.Less(t, time.Since(began), 5*time.Second, "there is no use in trying again")
	require.NoError(t, srv.Shutdown(t.Context()))
	return err
}

// TestUserLacksARight takes each right away, one at a time: without it a server
// does not start, and says what it lacks. So none of them is given in vain, and
// none is missed later, in the middle of a script.
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
	all := strings.Fields(aclOf("pw"))
	with := func(old string, now ...string) []string {
		i := slices.Index(all, old)
		require.GreaterOrEqual(t, i, 0, old)
		return slices.Concat(all[:i], now, all[i+1:])
	}
	refused := func(c *redis.Client, says string) {
		err := tryStart(t, c)
		require.ErrorIs(t, err, ErrUnavailable, says)
		require.ErrorContains(t, err, says)
		require.ErrorContains(t, err, "ACL")
		for _, key := range admin.Keys(t.Context(), "*").Val() {
			require.NotEqual(t, time.Duration(-1), admin.PTTL(t.Context(), key).Val(), "nothing is half done, but for %s", key)
		}
	}
	for _, right := range strings.Fields(aclCommands) {
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
	// NOAUTH: nobody may come without a name.
	require.NoError(t, admin.ACLSetUser(t.Context(), "default", "resetpass", ">pw").Err())
	refused(r.Client(t), "NOAUTH")
}

// TestUserLacksTheExpiredEvents: that is the one right that servers can do without.
func TestUserLacksTheExpiredEvents(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t, redistest.Args("--notify-keyspace-events", "Ex"),
		redistest.WithUser("mesh "+strings.ReplaceAll(aclOf("pw"), "&__keyevent@0__:expired", "")))
	var log warnings
	c := redis.NewClient(&redis.Options{Addr: r.Addr(), Username: "mesh", Password: "pw"})
	defer func() { _ = c.Close() }()
	srv, err := NewServer(Options{Redis: c, Logger: slog.New(&log)})
	require.NoError(t, err)
	require.NoError(t, srv.Start(t.Context()))
	require.NoError(t, srv.Shutdown(t.Context()))
	require.Len(t, log.texts(), 1)
	require.Contains(t, log.texts()[0], "__keyevent@0__:expired")
}

// TestRestrictedUserOfACluster: what the client of a cluster asks besides.
func TestRestrictedUserOfACluster(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("starts a cluster")
	}
	w := clusterWorld(t)
	user := strings.TrimSuffix(w.keys().prefix, ":") // the cluster is shared
	rules := strings.ReplaceAll(aclOf("pw", aclCluster, aclConfig), "mesh:*", w.keys().prefix+"*")
	admins := make([]*redis.Client, 0, len(w.cluster.Addrs()))
	for _, addr := range w.cluster.Addrs() {
		c := redis.NewClient(&redis.Options{Addr: addr})
		defer func() { _ = c.Close() }()
		require.NoError(t, c.ACLSetUser(t.Context(), user, strings.Fields(rules)...).Err())
		admins = append(admins, c)
	}
	w.as = func() redis.UniversalClient {
		return w.cluster.Client(t, func(o *redis.ClusterOptions) { o.Username, o.Password = user, "pw" })
	}
	var log warnings
	d := newDrill(w, 2, []string{"a", roomTimed}, leaseOf(2*time.Second), allowMetadata, func(o *Options) { o.Logger = slog.New(&log) })
	for _, s := range d.servers {
		require.NoError(t, s.trackTimed(time.Second))
	}
	d.members(2)
	useEverything(t, d)
	crowd(t, w)
	d.settles(time.Now(), 5*time.Second)
	for _, s := range d.servers {
		s.shutdown()
	}
	for _, admin := range admins {
		require.Empty(t, refusals(t, admin, user), admin)
	}
	require.Empty(t, log.texts())
}

// TestUserOfAClusterLacksARightOnOneNode: users are made node by node, so that
// one is soon forgotten, or made before the right is known.
func TestUserOfAClusterLacksARightOnOneNode(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("starts a cluster")
	}
	w := clusterWorld(t)
	prefix := w.keys().prefix // the cluster is shared
	user := strings.TrimSuffix(prefix, ":")
	rules := strings.Fields(strings.ReplaceAll(aclOf("pw", aclCluster, aclConfig), "mesh:*", prefix+"*"))
	set := func(shard int, rules ...string) {
		w.cluster.EachMaster(t, func(s int, admin *redis.Client) {
			if s == shard {
				require.NoError(t, admin.ACLSetUser(t.Context(), user, rules...).Err())
			}
		})
	}
	for _, addr := range w.cluster.Addrs() {
		c := redis.NewClient(&redis.Options{Addr: addr})
		require.NoError(t, c.ACLSetUser(t.Context(), user, rules...).Err())
		require.NoError(t, c.Close())
	}
	try := func() error {
		client := w.cluster.Client(t, func(o *redis.ClusterOptions) { o.Username, o.Password = user, "pw" })
		return tryStart(t, client, func(o *Options) { o.Prefix = prefix })
	}
	for shard := range w.cluster.Shards() {
		set(shard, "-info")
		err := try()
		require.ErrorIs(t, err, store.ErrForbidden)
		require.ErrorContains(t, err, "info")
		set(shard, rules...)
	}
	require.NoError(t, try())
}

// TestReadmeQuotesTheRights: what the README has people type is what is tried here.
func TestReadmeQuotesTheRights(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("README.md")
	require.NoError(t, err)
	_, rest, found := strings.Cut(string(text), "redis-cli ACL SETUSER mesh reset ")
	require.True(t, found, "README.md has the line")
	quoted, _, found := strings.Cut(rest, "\n```")
	require.True(t, found)
	words := strings.Fields(strings.NewReplacer("\\\n", " ", "'", "").Replace(quoted))
	require.Equal(t, strings.Fields(aclOf("PASSWORD")), words)
	for _, more := range strings.Fields(aclCluster + " " + aclConfig) {
		require.Contains(t, string(text), "`"+more+"`")
	}
}
