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

// TestClusterLosesWrites kills a master whose replica lags: what was
// acknowledged in the last second is lost, joins, leaves and states. Nobody
// comes or goes afterwards, so that only the owners can notice.
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
	leaver, comer := d.servers[0].Dial(), d.servers[1].Dial()
	d.note(room, leaver.ID, leaver.In(room))
	d.settles(time.Now(), 10*time.Second)
	d.patient()

	w.Cluster.Detach(shard)
	leaver.Out(room)
	d.note(room, leaver.ID, harness.Wish{})
	d.note(room, comer.ID, comer.In(room))
	d.note(room, comer.ID, comer.States(room, 1))
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
	d.heals(complete, afterFailover)
	w.T.Logf("shard %d, LeaseTTL %v: in order %v after the failover", shard, lease, time.Since(complete).Round(time.Millisecond))
	d.Sleep(lease + 2*time.Second) // for what must not come
	require.Empty(w.T, d.state())
	d.stayed(append(stay, comer))
	w.Cluster.Restart(shard)
	d.over()
}

// heals waits until Redis itself holds what it should, and then that everybody
// knows.
func (d *drill) heals(since time.Time, within time.Duration) {
	d.T.Helper()
	for {
		took := d.settles(since, within)
		d.Sleep(200 * time.Millisecond)
		if d.state() == "" && took > 0 {
			return
		}
	}
}

// TestClusterNodeUnreachable: one server loses sight of one node, which
// swallows everything and refuses nothing. Its rooms on the other nodes go on
// as ever, however long that lasts, new ones among them; those on the lost one
// are said to be away, and true again afterwards.
func TestClusterNodeUnreachable(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := harness.ClusterWorld(t)
	proxies := make(map[string]*redistest.ProxyServer)
	for _, addr := range w.Cluster.Addrs() {
		proxies[addr] = redistest.Proxy(t, addr)
	}
	rooms := w.SpreadRooms("room", 12) // many buckets, each with a call under way
	var dialer net.Dialer
	var away atomic.Pointer[string] // whose machine does not even refuse a connection
	none := ""
	away.Store(&none)
	over := func(o *mesh.Options) {
		o.Limits.CommandsPerSecond = -1
		o.Redis = w.Cluster.Client(t, func(o *redis.ClusterOptions) {
			o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
				if *away.Load() == addr {
					ctx, cancel := context.WithTimeout(ctx, o.DialTimeout)
					defer cancel()
					select {
					case <-ctx.Done():
						return nil, ctx.Err()
					case <-t.Context().Done(): // nobody is waiting any more
						return nil, t.Context().Err()
					}
				}
				return dialer.DialContext(ctx, network, proxies[addr].Addr())
			}
		})
	}
	d := newDrill(w, 1, slices.Concat(rooms...), over)
	// The leases are kept elsewhere, and what is published is heard over another
	// node: a server out of touch with those is another story.
	listens := d.listensTo(rooms[0][0])
	gone := 0
	for gone == listens || gone == w.Cluster.Owner(w.Cluster.SlotOf(w.Keys().Instances())) {
		gone++
	}
	other := w.Tracked()
	d.servers = append(d.servers, other)
	p := other.Dial()
	for _, room := range d.rooms {
		d.streams = append(d.streams, follow(p, room))
	}
	stay := d.members(1)
	d.settles(time.Now(), 10*time.Second)

	firsts, subscribeAnew := d.subscribersAnew(gone)
	lostAddr := w.Cluster.Master(gone).Addr()
	away.Store(&lostAddr)
	proxies[lostAddr].BlackHole(true)
	heal := func() { away.Store(&none); proxies[lostAddr].Heal() }
	defer heal() // so that it can be shut down
	began := time.Now()
	subscribeAnew(began)
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
	for i, c := range firsts {
		t.Logf("shard %d (lost: %v): %d first subscriptions, %d answered that Redis is away, slowest %v", i, i == gone, c.calls, c.away, c.worst.Round(time.Millisecond))
		require.Empty(t, c.wrong)
		require.Greater(t, c.calls, 10)
		if i != gone {
			// A machine that has no processor to spare lets some answers come late.
			require.LessOrEqual(t, c.away, c.calls/4, "its node answers")
			require.Less(t, c.worst, w.Unhurried(time.Second))
		}
	}
	for i, c := range callers {
		t.Logf("shard %d (lost: %v): %d calls, %d answered that Redis is away, slowest %v %s", i, i == gone, c.calls, c.away, c.worst.Round(time.Millisecond), c.last)
		require.Empty(t, c.wrong)
		if i != gone {
			// A machine that has no processor to spare lets some answers come late.
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

// listensTo returns the shard whose master the subscription to a room was made at.
func (d *drill) listensTo(room string) (at int) {
	at = -1
	channel := d.Keys().EventsPrefix() + room
	d.Cluster.EachMaster(d.T, func(shard int, admin *redis.Client) {
		if n, err := admin.PubSubNumSub(d.T.Context(), channel).Result(); err == nil && n[channel] > 0 {
			at = shard
		}
	})
	require.GreaterOrEqual(d.T, at, 0, "nobody listens")
	return at
}

// subscribersAnew returns a function that has many clients of the first server
// subscribe to rooms of the lost shard that it does not watch yet, as fast as
// they are answered, and one at a time to such rooms of each other one. What
// they say is complete, by shard, when churning is over.
func (d *drill) subscribersAnew(lost int) (callers []*caller, begin func(at time.Time)) {
	const eager = 24
	rooms := d.SpreadRooms("anew", 300)
	peers := make([][]*harness.Peer, len(rooms)) // who connects meanwhile is kept waiting
	for i := range rooms {
		callers = append(callers, &caller{})
		peers[i] = append(peers[i], d.servers[0].Dial())
	}
	for range eager - 1 {
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
