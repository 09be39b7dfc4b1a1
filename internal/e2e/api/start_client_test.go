package api

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/internal/testhook"
)

// loneCluster starts a Redis Cluster of one node. The node has no slots yet.
func loneCluster(t *testing.T, more ...string) (*redistest.Server, *redis.Client) {
	t.Helper()
	r := redistest.Start(t, redistest.Args("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"), redistest.Args(more...))
	return r, r.Client(t)
}

// assignSlots assigns all slots to a node, and waits until it serves them.
func assignSlots(t *testing.T, admin *redis.Client) {
	t.Helper()
	require.NoError(t, admin.ClusterAddSlotsRange(t.Context(), 0, redistest.Slots-1).Err())
	require.Eventually(t, func() bool {
		return strings.Contains(admin.ClusterInfo(t.Context()).Val(), "cluster_state:ok")
	}, 2*time.Minute, 5*time.Millisecond)
}

// checkWrongClient starts a server with the wrong kind of client. Start must fail at
// once, with an error that names the remedy.
func checkWrongClient(t *testing.T, client redis.UniversalClient, remedy string) {
	t.Helper()
	defer func() { _ = client.Close() }()
	err := harness.TryStart(t, client)
	require.ErrorIs(t, err, mesh.ErrInvalidOptions, remedy)
	require.ErrorContains(t, err, remedy)
	require.NotContains(t, err.Error(), "store:", "the error names an internal package")
	require.NotContains(t, err.Error(), "unavailable", "Redis answers")
}

func TestStartWithTheWrongClient(t *testing.T) {
	t.Parallel()
	node, nodeAdmin := loneCluster(t)
	alone := redistest.Start(t)
	admin := alone.Client(t)
	at := func(addr string, setup ...func(*redis.Options)) *redis.Client {
		o := &redis.Options{Addr: addr}
		for _, f := range setup {
			f(o)
		}
		return redis.NewClient(o)
	}
	database := func(db int) func(*redis.Options) { return func(o *redis.Options) { o.DB = db } }
	clusterOf := func(addr string) *redis.ClusterClient {
		return redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{addr}})
	}

	checkWrongClient(t, at(node.Addr()), "NewClusterClient") // no slots yet
	assignSlots(t, nodeAdmin)
	checkWrongClient(t, at(node.Addr()), "NewClusterClient")
	checkWrongClient(t, at(node.Addr(), database(1)), "NewClusterClient")
	checkWrongClient(t, redis.NewUniversalClient(&redis.UniversalOptions{Addrs: []string{node.Addr()}}), "NewClusterClient")
	require.Empty(t, nodeAdmin.Keys(t.Context(), "*").Val(), "Redis has new keys")
	cluster := clusterOf(node.Addr())
	defer func() { _ = cluster.Close() }()
	require.NoError(t, harness.TryStart(t, cluster))

	checkWrongClient(t, clusterOf(alone.Addr()), "redis.NewClient")
	checkWrongClient(t, redis.NewUniversalClient(&redis.UniversalOptions{Addrs: []string{alone.Addr(), alone.Addr()}}), "redis.NewClient")
	checkWrongClient(t, at(alone.Addr(), database(99)), "no database 99")
	checkWrongClient(t, at(fakeSentinel(t, alone.Addr())), "NewFailoverClient")
	checkWrongClient(t, redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "m", SentinelAddrs: []string{alone.Addr()}}), "no Sentinel")
	require.Empty(t, admin.Keys(t.Context(), "*").Val(), "Redis has new keys")

	require.NoError(t, admin.ConfigSet(t.Context(), "replica-serve-stale-data", "no").Err())
	require.NoError(t, harness.ReadOnly.Begin(t.Context(), admin))
	checkWrongClient(t, at(alone.Addr()), "address of the master") // MASTERDOWN
	require.NoError(t, admin.ConfigSet(t.Context(), "replica-serve-stale-data", "yes").Err())
	checkWrongClient(t, at(alone.Addr()), "address of the master") // READONLY
	require.NoError(t, admin.ConfigSet(t.Context(), "replica-read-only", "no").Err())
	checkWrongClient(t, at(alone.Addr()), "address of the master") // accepts writes that would be lost
	require.NoError(t, harness.ReadOnly.End(t.Context(), admin))
	require.NoError(t, harness.TryStart(t, alone.Client(t)))
}

// TestStartWithOneNodeOfACluster checks a plain client on a node of a cluster, which
// answers MOVED.
func TestStartWithOneNodeOfACluster(t *testing.T) {
	t.Parallel()
	harness.Long(t, "starts a cluster")
	w := harness.ClusterWorld(t)
	for _, addr := range w.Cluster.Addrs() { // including replicas
		checkWrongClient(t, redis.NewClient(&redis.Options{Addr: addr}), "NewClusterClient")
	}
}

// withoutInfo is a hook that removes fields from INFO, as some services do.
type withoutInfo struct{ edit func(info string) string }

func (withoutInfo) DialHook(next redis.DialHook) redis.DialHook { return next }

func (withoutInfo) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h withoutInfo) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if info, ok := cmd.(*redis.StringCmd); ok && cmd.Name() == "info" {
			info.SetVal(h.edit(info.Val()))
		}
		return err
	}
}

// without returns a hook that removes the given fields, or all fields.
func without(fields ...string) withoutInfo {
	return withoutInfo{func(info string) string {
		var kept strings.Builder
		for line := range strings.Lines(info) {
			name, _, _ := strings.Cut(line, ":")
			drop := fields == nil
			for _, f := range fields {
				drop = drop || name == f
			}
			if !drop {
				kept.WriteString(line)
			}
		}
		return kept.String()
	}}
}

// shardingProxy is a hook that behaves like a proxy of several nodes: it refuses
// scripts with more than one key.
type shardingProxy struct{}

type crossSlot struct{}

func (crossSlot) Error() string { return "CROSSSLOT Keys in request don't hash to the same slot" }

func (crossSlot) RedisError() {}

func (shardingProxy) DialHook(next redis.DialHook) redis.DialHook { return next }

func (shardingProxy) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (shardingProxy) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if strings.HasPrefix(cmd.Name(), "eval") && fmt.Sprint(cmd.Args()[2]) != "1" {
			cmd.SetErr(crossSlot{})
			return crossSlot{}
		}
		return next(ctx, cmd)
	}
}

// Start fails if Redis would refuse most later calls.
func TestStartBehindAProxyThatSpreadsKeys(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		client := w.Client()
		client.(*redis.Client).AddHook(shardingProxy{})
		srv, err := mesh.NewServer(mesh.Options{Redis: client})
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err = srv.Start(ctx)
		require.ErrorContains(t, err, "CROSSSLOT")
		require.ErrorContains(t, err, "NewClusterClient")
		require.NoError(t, srv.Shutdown(t.Context()))
	})
}

// If INFO has no fields, the errors of Redis are enough.
func TestStartWithTheWrongClientWithoutInfo(t *testing.T) {
	t.Parallel()
	node, nodeAdmin := loneCluster(t)
	assignSlots(t, nodeAdmin)
	c := redis.NewClient(&redis.Options{Addr: node.Addr()})
	c.AddHook(without())
	checkWrongClient(t, c, "NewClusterClient")
	alone := redistest.Start(t)
	require.NoError(t, harness.ReadOnly.Begin(t.Context(), alone.Client(t)))
	c = redis.NewClient(&redis.Options{Addr: alone.Addr()})
	c.AddHook(without())
	checkWrongClient(t, c, "address of the master")
}

// fakeSentinel is a Sentinel that always names the same master.
func fakeSentinel(t *testing.T, master string) string {
	t.Helper()
	s, err := server.NewServer("127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(s.Close)
	host, port, err := net.SplitHostPort(master)
	require.NoError(t, err)
	answers := map[string]server.Cmd{
		"INFO": func(c *server.Peer, _ string, _ []string) { c.WriteBulk("# Server\r\nredis_mode:sentinel\r\n") },
		"PING": func(c *server.Peer, _ string, _ []string) { c.WriteInline("PONG") },
		"SENTINEL": func(c *server.Peer, _ string, args []string) {
			if strings.EqualFold(args[0], "get-master-addr-by-name") {
				c.WriteStrings([]string{host, port})
				return
			}
			c.WriteLen(0)
		},
		"SUBSCRIBE": func(c *server.Peer, _ string, args []string) {
			for i, channel := range args {
				c.WritePushLen(3)
				c.WriteBulk("subscribe")
				c.WriteBulk(channel)
				c.WriteInt(i + 1)
			}
		},
	}
	for name, answer := range answers {
		require.NoError(t, s.Register(name, answer))
	}
	return s.Addr().String()
}

// With Sentinel, a client may reach a master that was just demoted or is not promoted
// yet. Start waits.
func TestStartBehindSentinelWaitsForTheFailover(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t)
	admin := r.Client(t)
	require.NoError(t, harness.ReadOnly.Begin(t.Context(), admin))
	client := redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "mesh", SentinelAddrs: []string{fakeSentinel(t, r.Addr())}})
	defer func() { _ = client.Close() }()
	var log testlog.Warnings
	srv, err := mesh.NewServer(mesh.Options{Redis: client, Logger: slog.New(&log)})
	require.NoError(t, err)
	started := make(chan error, 1)
	go func() { started <- srv.Start(t.Context()) }() // ends with the test
	require.Eventually(t, func() bool { return strings.Contains(strings.Join(log.Texts(), "\n"), "start waits for redis") },
		harness.MachineShare, 5*time.Millisecond)
	require.Empty(t, started)
	require.NoError(t, harness.ReadOnly.End(t.Context(), admin))
	require.NoError(t, <-started)
	require.NoError(t, srv.Shutdown(t.Context()))
}

// Keys of this library with another layout (with or without a cluster, or another
// number of buckets) are distinguished from keys of other software.
func TestStartOnAnotherLayout(t *testing.T) {
	t.Parallel()
	node, nodeAdmin := loneCluster(t)
	assignSlots(t, nodeAdmin)
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{node.Addr()}})
	defer func() { _ = cluster.Close() }()
	alone := redistest.Start(t).Client(t)
	ctx := t.Context()
	refused := func(client redis.UniversalClient, prefix string, buckets int, texts ...string) {
		t.Helper()
		err := harness.TryStart(t, client, func(o *mesh.Options) { o.Prefix, o.Buckets = prefix, buckets })
		require.ErrorIs(t, err, mesh.ErrIncompatible)
		require.NotContains(t, err.Error(), "other software")
		for _, text := range texts {
			require.ErrorContains(t, err, text)
		}
	}
	on := func(client redis.UniversalClient, prefix string, buckets int) {
		t.Helper()
		require.NoError(t, harness.TryStart(t, client, func(o *mesh.Options) { o.Prefix, o.Buckets = prefix, buckets }))
	}

	// Copy the keys to the cluster, as an app that moves to one might.
	on(alone, "moved:", 0)
	for _, key := range []string{"moved:format", "moved:instances", "moved:dead", "moved:presence:rooms"} {
		dump, err := alone.Dump(ctx, key).Result()
		if err == nil {
			require.NoError(t, cluster.Restore(ctx, key, 0, dump).Err())
		}
	}
	require.NoError(t, cluster.ZAdd(ctx, "moved:instances", redis.Z{Score: 1, Member: "i"}).Err()) // left by a killed server
	refused(cluster, "moved:", 0, "moved:format", "do not use a Redis Cluster")
	on(cluster, "back:", 0)
	require.NoError(t, alone.Set(ctx, "back:{0}:format", cluster.Get(ctx, "back:{0}:format").Val(), 0).Err())
	refused(alone, "back:", 0, "back:{0}:format", "that use a Redis Cluster")

	on(cluster, "spread:", 16)
	on(cluster, "spread:", 16)
	refused(cluster, "spread:", 32, "spread:{0}:format", "Options.Buckets", "16", "32")
	refused(cluster, "spread:", 0, "Options.Buckets", "16", "64")
	on(alone, "spread:", 8)
	on(alone, "spread:", 9) // without a cluster Buckets has no effect
}

func TestStartWarnsAboutRedis(t *testing.T) {
	t.Parallel()
	started := func(r *redistest.Server, hooks ...redis.Hook) []string {
		var log testlog.Warnings
		c := r.Client(t)
		for _, h := range hooks {
			c.AddHook(h)
		}
		srv, err := mesh.NewServer(mesh.Options{Redis: c, Logger: slog.New(&log)})
		require.NoError(t, err)
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Start(t.Context()))
		require.NoError(t, srv.Shutdown(t.Context()))
		return log.Texts()
	}
	r := redistest.Start(t, redistest.Args("--notify-keyspace-events", "Ex"))
	require.Empty(t, started(r))
	require.Empty(t, started(r, without("run_id")), "other fields identify the process")
	warnings := started(r, without("run_id", "process_id", "tcp_port", "master_replid", "uptime_in_seconds"))
	require.Len(t, warnings, 1, "%v", warnings)
	require.Contains(t, warnings[0], "does not identify")
	require.NoError(t, r.Client(t).ConfigSet(t.Context(), "maxmemory-policy", "allkeys-lru").Err())
	warnings = started(r)
	require.Len(t, warnings, 1, "%v", warnings)
	require.Contains(t, warnings[0], "allkeys-lru")
	require.Contains(t, warnings[0], "noeviction")
	require.Empty(t, started(r, without("maxmemory_policy")), "missing fields of INFO cause no warning")
}

// Without a run_id in INFO, a restarted Redis is still recognised as another process.
func TestRestartWithoutARunID(t *testing.T) {
	t.Parallel()
	r := redistest.Start(t)
	c := r.Client(t)
	c.AddHook(without("run_id"))
	srv, err := mesh.NewServer(mesh.Options{Redis: c})
	require.NoError(t, err)
	require.NoError(t, srv.Start(t.Context()))
	first, ok := testhook.PartsOf(srv).Store.Generation(t.Context())
	require.True(t, ok)
	again, ok := testhook.PartsOf(srv).Store.Generation(t.Context())
	require.True(t, ok)
	require.Equal(t, first, again)
	r.Restart(true)
	require.Eventually(t, func() bool {
		now, ok := testhook.PartsOf(srv).Store.Generation(t.Context())
		return ok && now != first
	}, 2*time.Minute, 20*time.Millisecond)
	require.NoError(t, srv.Shutdown(t.Context()))
}

// If Redis refuses a write, callers get its answer as the error, not a timeout.
func TestRefusedWritesReturnTheErrorOfRedis(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		m, err := mesh.NewPresenceManager(w.Options())
		require.NoError(t, err)
		require.NoError(t, m.Start(t.Context()))
		defer func() { require.NoError(t, m.Shutdown(t.Context())) }()
		defer w.Mem.SetError("")
		require.NoError(t, m.TrackPresence(mesh.Exact("paced"), mesh.PresenceOptions{StateInterval: time.Second}))
		for _, id := range []string{"a", "b"} {
			require.NoError(t, m.Connect(t.Context(), id, nil))
		}
		require.NoError(t, m.Join(t.Context(), "room", "b"))
		require.NoError(t, m.Join(t.Context(), "paced", "b"))
		for _, text := range []string{
			"NOREPLICAS Not enough good replicas to write.",
			"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
			"OOM command not allowed when used memory > 'maxmemory'.",
			"ERR Error running script (call to f_1f): @user_script:1: @user_script: 1: -OOM command not allowed when used memory > 'maxmemory'.",
		} {
			w.Mem.SetError(text)
			for name, do := range map[string]func() error{
				"join":  func() error { return m.Join(t.Context(), "room", "a") },
				"leave": func() error { _, err := m.Leave(t.Context(), "room", "b"); return err },
				"state": func() error {
					return m.PublishState(t.Context(), "paced", "b", map[string]int{"n": 1}, mesh.StateOptions{})
				},
			} {
				err := do()
				require.ErrorIs(t, err, mesh.ErrUnavailable, name)
				require.ErrorContains(t, err, text, name)
				require.NotContains(t, err.Error(), "in time", name)
				require.NotErrorIs(t, err, context.DeadlineExceeded)
				message, _, _ := testhook.WireError(err)
				require.Equal(t, strings.Contains(text, "OOM"), strings.Contains(message, "storage is full"), message)
			}
			w.Mem.SetError("")
			w.Sleep(5 * time.Second)
			_, err := m.Leave(t.Context(), "room", "a")
			require.NoError(t, err)
			require.NoError(t, m.Join(t.Context(), "room", "b"))
		}
		w.Mem.Hang()
		err = m.Join(t.Context(), "room2", "a")
		require.ErrorIs(t, err, mesh.ErrUnavailable)
		require.NotContains(t, err.Error(), "OOM", "an old error")
		w.Mem.Resume()
	})
}
