package store

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// expiries records the calls of an ExpiredEvents.
type expiries struct {
	*ExpiredEvents
	mu     sync.Mutex // guards the fields below
	keys   map[string]int
	states []ExpiredState
	err    error
}

func watchExpired(client redis.UniversalClient) *expiries {
	x := &expiries{keys: make(map[string]int)}
	var n atomic.Int64
	x.ExpiredEvents = NewExpiredEvents(ExpiredConfig{
		Client: client,
		Canary: func() string { return fmt.Sprint("canary:", n.Add(1)) },
		Expired: func(key string) {
			x.mu.Lock()
			defer x.mu.Unlock()
			x.keys[key]++
		},
		Changed: func(state ExpiredState, err error) {
			x.mu.Lock()
			defer x.mu.Unlock()
			x.states = append(x.states, state)
			x.err = err
		},
	})
	x.Start()
	return x
}

func (x *expiries) heard(key string) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.keys[key]
}

func (x *expiries) told() []ExpiredState {
	x.mu.Lock()
	defer x.mu.Unlock()
	return append([]ExpiredState{}, x.states...)
}

// awaitState waits for a state and the Changed that goes with it.
func (x *expiries) awaitState(t *testing.T, state ExpiredState) {
	t.Helper()
	require.Eventually(t, func() bool {
		told := x.told()
		return x.State() == state && len(told) > 0 && told[len(told)-1] == state
	}, 2*time.Minute, 5*time.Millisecond)
}

// awaitExpiry lets keys expire until an event was received.
func (x *expiries) awaitExpiry(t *testing.T, client redis.UniversalClient, key string) {
	t.Helper()
	ctx := t.Context()
	require.NoError(t, client.Set(ctx, key, "", 20*time.Millisecond).Err())
	require.Eventually(t, func() bool {
		client.Exists(ctx, key)
		return x.heard(key) > 0
	}, 2*time.Minute, 5*time.Millisecond, key)
}

func TestExpiredEventsRedis(t *testing.T) {
	t.Parallel()
	for flags, want := range map[string]string{"": "xE", "KEA": "AKE", "Kg": "gxKE"} {
		t.Run("flags "+flags, func(t *testing.T) {
			t.Parallel()
			client := redistest.Start(t, redistest.Args("--notify-keyspace-events", flags)).Client(t)
			x := watchExpired(client)
			defer x.Stop()
			<-x.Known()
			require.Equal(t, ExpiredWorks, x.State())
			require.Equal(t, want, client.ConfigGet(t.Context(), notifySetting).Val()[notifySetting])
			x.awaitExpiry(t, client, "k")
			x.Stop()
			require.Equal(t, []ExpiredState{ExpiredWorks}, x.told())
			require.Len(t, x.keys, 1, "canaries are not passed on")
		})
	}
}

func TestExpiredEventsForbidden(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t, redistest.Args("--rename-command", "CONFIG", "")).Client(t)
	x := watchExpired(client)
	defer x.Stop()
	x.awaitState(t, ExpiredSilent)
	// It stays so after the next connection was checked.
	require.NoError(t, client.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	require.Eventually(t, func() bool { return len(x.told()) == 3 }, 2*time.Minute, 5*time.Millisecond)
	require.Equal(t, []ExpiredState{ExpiredSilent, ExpiredUnknown, ExpiredSilent}, x.told())
	x.Stop()
	require.ErrorIs(t, x.err, ErrNoExpiredEvents)
	require.ErrorContains(t, x.err, notifySetting, "the reason")
}

func TestExpiredEventsForbiddenButOn(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t, redistest.Args("--rename-command", "CONFIG", "", "--notify-keyspace-events", "Ex")).Client(t)
	x := watchExpired(client)
	defer x.Stop()
	<-x.Known()
	require.Equal(t, ExpiredWorks, x.State())
}

func TestExpiredEventsRestart(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	client := s.Client(t)
	x := watchExpired(client)
	defer x.Stop()
	x.awaitState(t, ExpiredWorks)
	s.Kill()
	x.awaitState(t, ExpiredUnknown)
	s.Restart(true)
	x.awaitState(t, ExpiredWorks)
	x.awaitExpiry(t, client, "k")
	require.NotContains(t, x.told(), ExpiredSilent)
}

func TestExpiredEventsChannelForbidden(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	require.NoError(t, client.Do(t.Context(), "ACL", "SETUSER", "poor", "on", "nopass", "~*", "+@all", "resetchannels").Err())
	poor := redis.NewClient(&redis.Options{Addr: client.Options().Addr, Username: "poor", Password: "x"})
	defer poor.Close()
	x := watchExpired(poor)
	defer x.Stop()
	x.awaitState(t, ExpiredSilent)
	x.Stop()
	require.True(t, redis.IsPermissionError(x.err), "%v", x.err)
}

func TestExpiredEventsAbsent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t) // supports neither CONFIG nor events
		defer m.Close()
		defer client.Close()
		x := watchExpired(client)
		defer x.Stop()
		m.SetTime(time.Now())
		for range 20 { // its clock moves only on request
			time.Sleep(canaryTTL)
			m.FastForward(canaryTTL)
		}
		<-x.Known()
		synctest.Wait()
		require.Equal(t, []ExpiredState{ExpiredSilent}, x.told())
	})
}

func TestExpiredEventsInBubble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := meshtest.StartRedis(t)
		client := s.Client()
		ctx := t.Context()
		x := watchExpired(client)
		defer x.Stop()
		<-x.Known()
		require.Equal(t, ExpiredWorks, x.State())

		// The setting is cleared. The next probe notices, and sets it again.
		require.NoError(t, client.ConfigSet(ctx, notifySetting, "").Err())
		time.Sleep(probeWorking + 2*probeWithin)
		synctest.Wait()
		require.Equal(t, []ExpiredState{ExpiredWorks, ExpiredUnknown, ExpiredWorks}, x.told())
		require.NoError(t, client.Set(ctx, "k", "", time.Second).Err())
		time.Sleep(2 * time.Second)
		require.Equal(t, 1, x.heard("k"))

		// An outage says nothing about events.
		s.Cut()
		time.Sleep(time.Minute)
		require.Equal(t, ExpiredUnknown, x.State())
		s.Heal()
		time.Sleep(time.Minute)
		require.Equal(t, ExpiredWorks, x.State())
		require.NotContains(t, x.told(), ExpiredSilent)
	})
}

func TestExpiredEventsStop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := meshtest.StartRedis(t).Client()
		x := NewExpiredEvents(ExpiredConfig{Client: client})
		x.Stop() // before Start
		x.Start()
		x.Stop()
		y := watchExpired(client)
		y.Stop() // at once
		y.Stop()
	})
}

// startCluster starts two masters, and a replica of the first.
func startCluster(t *testing.T) *redis.ClusterClient {
	t.Helper()
	ctx := t.Context()
	var nodes [3]*redis.Client
	var ids [3]string
	for i := range nodes {
		s := redistest.Start(t, redistest.Args("--cluster-enabled", "yes", "--cluster-node-timeout", "1000",
			"--repl-diskless-sync-delay", "0"))
		nodes[i] = s.Client(t)
		ids[i] = nodes[i].ClusterMyID(ctx).Val()
		require.NotEmpty(t, ids[i])
	}
	require.NoError(t, nodes[0].ClusterAddSlotsRange(ctx, 0, 8191).Err())
	require.NoError(t, nodes[1].ClusterAddSlotsRange(ctx, 8192, 16383).Err())
	host, port, err := net.SplitHostPort(nodes[0].Options().Addr)
	require.NoError(t, err)
	for _, n := range nodes[1:] {
		require.NoError(t, n.ClusterMeet(ctx, host, port).Err())
	}
	require.Eventually(t, func() bool {
		return nodes[2].ClusterReplicate(ctx, ids[0]).Err() == nil
	}, 2*time.Minute, 50*time.Millisecond)
	for _, n := range nodes {
		require.Eventually(t, func() bool {
			known := 0
			//lint:ignore SA1019 its successor needs Redis 7
			for _, slots := range n.ClusterSlots(ctx).Val() {
				known += len(slots.Nodes)
			}
			return known == len(nodes) && strings.Contains(n.ClusterInfo(ctx).Val(), "cluster_state:ok")
		}, 2*time.Minute, 50*time.Millisecond)
	}
	require.Eventually(t, func() bool {
		return strings.Contains(nodes[2].Info(ctx, "replication").Val(), "master_link_status:up")
	}, 2*time.Minute, 50*time.Millisecond)
	c := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{nodes[1].Options().Addr}})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestExpiredEventsCluster(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	cluster := startCluster(t)
	x := watchExpired(cluster)
	defer x.Stop()
	<-x.Known()
	require.Equal(t, ExpiredWorks, x.State(), "%v", x.err)

	require.Eventually(t, func() bool { // the replica may be listed later
		var good atomic.Int64
		err := cluster.ForEachShard(ctx, func(ctx context.Context, n *redis.Client) error {
			flags := n.ConfigGet(ctx, notifySetting).Val()[notifySetting]
			if flags == "xE" && n.PubSubNumSub(ctx, ExpiredChannel(0)).Val()[ExpiredChannel(0)] == 1 {
				good.Add(1)
			}
			return nil
		})
		return err == nil && good.Load() == 3
	}, 2*time.Minute, 50*time.Millisecond, "every node is made to send events and listened to, replicas too")
	for i := range 8 { // some on each master
		x.awaitExpiry(t, cluster, fmt.Sprint("k", i))
	}

	// The replica takes over. The watch has listened to it all the time.
	var replica *redis.Client
	require.NoError(t, cluster.ForEachSlave(ctx, func(_ context.Context, n *redis.Client) error {
		replica = n
		return nil
	}))
	require.NoError(t, replica.ClusterFailover(ctx).Err())
	require.Eventually(t, func() bool {
		return strings.Contains(replica.Info(ctx, "replication").Val(), "role:master")
	}, 2*time.Minute, 10*time.Millisecond)
	for i := range 8 {
		x.awaitExpiry(t, cluster, fmt.Sprint("l", i))
	}
	require.NotContains(t, x.told(), ExpiredSilent)
}

// oddCluster is a client whose hooks fail when its nodes are listed.
type oddCluster struct {
	redis.UniversalClient
	odd func()
}

func (c oddCluster) ForEachMaster(context.Context, func(context.Context, *redis.Client) error) error {
	c.odd()
	return nil
}

func (c oddCluster) ForEachSlave(context.Context, func(context.Context, *redis.Client) error) error {
	return nil
}

// A hook that panics or never returns when the nodes of a cluster are listed does not
// affect anything else.
func TestOddHooksWhileNodesAreListed(t *testing.T) {
	t.Parallel()
	never := make(chan struct{})
	t.Cleanup(func() { close(never) })
	var hanging atomic.Int32
	for _, odd := range []func(){func() { panic("hook") }, func() { hanging.Add(1); <-never }, runtime.Goexit} {
		e := NewExpiredEvents(ExpiredConfig{
			Client: oddCluster{odd: odd}, Canary: func() string { return "c" }, Expired: func(string) {}, Changed: func(ExpiredState, error) {},
		})
		e.Start()
		require.Error(t, e.Look(t.Context()))
		began := time.Now()
		e.Stop()
		require.Less(t, time.Since(began), 2*time.Minute)
	}
	require.EqualValues(t, 1, hanging.Load(), "a call that hangs is not repeated")
}
