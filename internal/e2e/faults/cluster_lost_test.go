package faults

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

// TestClusterLosesWrites kills a master whose replica lags, so that the acknowledged
// joins, leaves and states of the last second are lost. No connection joins or leaves
// afterwards, so only the owners can notice the loss.
func TestClusterLosesWrites(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := harness.OwnCluster(t)
	for run := range *clusterRuns {
		t.Run(fmt.Sprint(run), func(t *testing.T) {
			w := &harness.World{T: t, Cluster: w.Cluster, Prefix: fmt.Sprintf("run%d:", run)}
			lostWrites(w, run%w.Cluster.Shards())
		})
	}
}

func lostWrites(w *harness.World, shard int) {
	const lease = 6 * time.Second
	rooms := w.SpreadRooms("room", 1)
	room := rooms[shard][0]
	d := newDrill(w, 2, slices.Concat(rooms...), harness.LeaseOf(lease))
	stay := d.members(3)
	leaver, joiner := d.servers[0].Dial(), d.servers[1].Dial()
	d.note(room, leaver.ID, leaver.In(room))
	d.settles(time.Now(), 10*time.Second)
	d.awaitContact()

	w.Cluster.Detach(shard)
	leaver.Out(room)
	d.note(room, leaver.ID, harness.WantedEntry{})
	d.note(room, joiner.ID, joiner.In(room))
	d.note(room, joiner.ID, joiner.States(room, 1))
	for i, p := range stay {
		if d.isIn(room, p.ID) {
			d.note(room, p.ID, p.States(room, 100+i))
		}
	}
	d.settles(time.Now(), 5*time.Second)
	w.Cluster.KillMaster(shard)
	w.Cluster.WaitForFailover(shard)
	w.Cluster.Attach(shard)
	complete := time.Now()
	d.awaitRepair(complete, afterFailover)
	w.T.Logf("shard %d, LeaseTTL %v: recovered %v after the failover", shard, lease, time.Since(complete).Round(time.Millisecond))
	d.Sleep(lease + 2*time.Second) // time for unexpected updates
	require.Empty(w.T, d.diff())
	d.stayed(append(stay, joiner))
	w.Cluster.Restart(shard)
	d.finish()
}

// awaitRepair waits until all entries are as expected for 200 ms: first Redis, then the
// streams.
func (d *drill) awaitRepair(since time.Time, within time.Duration) {
	d.T.Helper()
	for {
		took := d.settles(since, within)
		d.Sleep(200 * time.Millisecond)
		if d.diff() == "" && took > 0 {
			return
		}
	}
}

// TestClusterNodeUnreachable makes one node unreachable for one server. Packets to the
// node are lost, so no connection is refused. The server's rooms on other nodes, new
// rooms too, must work as usual for the whole time. Requests for rooms on the lost node
// must be answered with EUNAVAILABLE or as stale, and those rooms must recover
// afterwards.
func TestClusterNodeUnreachable(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := harness.ClusterWorld(t)
	proxies := make(map[string]*redistest.ProxyServer)
	for _, addr := range w.Cluster.Addrs() {
		proxies[addr] = redistest.Proxy(t, addr)
	}
	rooms := w.SpreadRooms("room", 12) // many buckets, each with a call in flight
	var dialer net.Dialer
	var away atomic.Pointer[string] // address of the unreachable node
	none := ""
	away.Store(&none)
	proxied := func(o *mesh.Options) {
		o.Limits.CommandsPerSecond = -1
		o.Redis = w.Cluster.Client(t, func(o *redis.ClusterOptions) {
			o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
				if *away.Load() == addr {
					ctx, cancel := context.WithTimeout(ctx, o.DialTimeout)
					defer cancel()
					select {
					case <-ctx.Done():
						return nil, ctx.Err()
					case <-t.Context().Done(): // the test has ended
						return nil, t.Context().Err()
					}
				}
				return dialer.DialContext(ctx, network, proxies[addr].Addr())
			}
		})
	}
	d := newDrill(w, 1, slices.Concat(rooms...), proxied)
	// The test does not cut the nodes with the leases and with the subscriptions of the
	// listener.
	listener := d.listenerShard(rooms[0][0])
	lost := 0
	for lost == listener || lost == w.Cluster.Owner(w.Cluster.SlotOf(w.Keys().Instances())) {
		lost++
	}
	other := w.Tracked()
	d.servers = append(d.servers, other)
	p := other.Dial()
	for _, room := range d.rooms {
		d.streams = append(d.streams, follow(p, room))
	}
	stay := d.members(1)
	d.settles(time.Now(), 10*time.Second)

	subscribers, subscribe := d.newSubscribers(lost)
	lostAddr := w.Cluster.Master(lost).Addr()
	away.Store(&lostAddr)
	proxies[lostAddr].BlackHole(true)
	heal := func() { away.Store(&none); proxies[lostAddr].Heal() }
	defer heal() // before the server is shut down
	began := time.Now()
	subscribe(began)
	callers := make([]*caller, len(rooms))
	for i, list := range rooms {
		callers[i] = &caller{}
		var mu sync.Mutex
		for _, room := range list {
			p := d.servers[0].Dial()
			d.churning.Go(func() {
				in := map[string]any{"roomName": room}
				pace := time.NewTicker(200 * time.Millisecond)
				defer pace.Stop()
				for time.Since(began) < *clusterDark {
					<-pace.C
					c := &caller{}
					c.call(p, "mesh/join-room", in)
					c.call(p, "mesh/publish-presence-state", map[string]any{"roomName": room, "state": map[string]any{"n": 1}})
					c.call(p, "mesh/leave-room", in)
					mu.Lock()
					callers[i].add(c)
					mu.Unlock()
				}
			})
		}
	}
	d.churning.Wait()
	for i, c := range subscribers {
		t.Logf("shard %d (lost: %v): %d first subscriptions, %d answered that Redis is away, slowest %v", i, i == lost, c.calls, c.away, c.worst.Round(time.Millisecond))
		require.Empty(t, c.wrong)
		require.Greater(t, c.calls, 10)
		if i != lost {
			// Some answers are late on a busy machine.
			require.LessOrEqual(t, c.away, c.calls/4, "its node answers")
			require.Less(t, c.worst, w.Unhurried(time.Second))
		}
	}
	for i, c := range callers {
		t.Logf("shard %d (lost: %v): %d calls, %d answered that Redis is away, slowest %v %s", i, i == lost, c.calls, c.away, c.worst.Round(time.Millisecond), c.last)
		require.Empty(t, c.wrong)
		if i != lost {
			// Some answers are late on a busy machine.
			require.LessOrEqual(t, c.away, c.calls/4, "its node answers")
			require.Less(t, c.worst, w.Unhurried(2*time.Second))
		}
		require.Less(t, c.worst, w.Unhurried(3*time.Second))
	}
	t.Logf("%+v", d.servers[0].Stats())
	require.Zero(t, d.servers[0].Stats().Reregistered)
	heal()
	d.settles(time.Now(), 15*time.Second)
	d.stayed(stay)
}

// listenerShard returns the shard whose master has the listener's subscription to a
// room.
func (d *drill) listenerShard(room string) (at int) {
	at = -1
	channel := d.Keys().EventsPrefix() + room
	d.Cluster.EachMaster(d.T, func(shard int, admin *redis.Client) {
		if n, err := admin.PubSubNumSub(d.T.Context(), channel).Result(); err == nil && n[channel] > 0 {
			at = shard
		}
	})
	require.GreaterOrEqual(d.T, at, 0, "no master has the subscription")
	return at
}

// newSubscribers returns a function that makes clients of the first server subscribe to
// rooms which it does not watch yet: many clients to rooms of the lost shard, without a
// pause, and one client per other shard. The callers, by shard, are complete when
// d.churning is done.
func (d *drill) newSubscribers(lost int) (callers []*caller, begin func(at time.Time)) {
	const many = 24
	rooms := d.SpreadRooms("new", 300)
	peers := make([][]*harness.Peer, len(rooms)) // connected in advance, because new connections have to wait during the outage
	for i := range rooms {
		callers = append(callers, &caller{})
		peers[i] = append(peers[i], d.servers[0].Dial())
	}
	for range many - 1 {
		peers[lost] = append(peers[lost], d.servers[0].Dial())
	}
	return callers, func(at time.Time) {
		for i, list := range rooms {
			pause := 200 * time.Millisecond
			if i == lost {
				pause = time.Millisecond
			}
			var next atomic.Int64
			var mu sync.Mutex
			for _, p := range peers[i] {
				d.churning.Go(func() {
					pace := time.NewTicker(pause)
					defer pace.Stop()
					for time.Since(at) < *clusterDark {
						<-pace.C
						room := list[int(next.Add(1))%len(list)]
						c := &caller{}
						c.call(p, "mesh/subscribe-presence", map[string]any{"roomName": room})
						mu.Lock()
						callers[i].add(c)
						mu.Unlock()
					}
				})
			}
		}
	}
}

func (c *caller) add(more *caller) {
	c.worst = max(c.worst, more.worst)
	c.wrong = append(c.wrong, more.wrong...)
	c.calls += more.calls
	c.away += more.away
	c.last = cmp.Or(more.last, c.last)
}
