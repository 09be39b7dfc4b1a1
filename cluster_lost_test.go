package mesh

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

	"github.com/meshpresence/mesh/internal/redistest"
)

// TestClusterLosesWrites kills a master whose replica lags: what was
// acknowledged in the last second is lost, joins, leaves and states. Nobody
// comes or goes afterwards, so that only the owners can notice.
func TestClusterLosesWrites(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	w := ownCluster(t)
	for run := range *clusterRuns {
		t.Run(fmt.Sprint(run), func(t *testing.T) {
			w := &world{t: t, cluster: w.cluster, prefix: fmt.Sprintf("run%d:", run)}
			lostWrites(w, run%w.cluster.Shards())
		})
	}
}

func lostWrites(w *world, shard int) {
	const lease = 6 * time.Second
	rooms := w.spreadRooms("room", 1)
	room := rooms[shard][0]
	d := newDrill(w, 2, slices.Concat(rooms...), leaseOf(lease))
	stay := d.members(3)
	leaver, comer := d.servers[0].dial(), d.servers[1].dial()
	d.note(room, leaver.id, leaver.in(room))
	d.settles(time.Now(), 10*time.Second)
	d.patient()

	w.cluster.Detach(shard)
	leaver.out(room)
	d.note(room, leaver.id, wish{})
	d.note(room, comer.id, comer.in(room))
	d.note(room, comer.id, comer.states(room, 1))
	for i, p := range stay {
		if d.isIn(room, p.id) {
			d.note(room, p.id, p.states(room, 100+i))
		}
	}
	d.settles(time.Now(), 5*time.Second)
	w.cluster.KillMaster(shard)
	w.cluster.WaitForFailover(shard)
	w.cluster.Attach(shard)
	complete := time.Now()
	d.heals(complete, afterFailover)
	w.t.Logf("shard %d, LeaseTTL %v: in order %v after the failover", shard, lease, time.Since(complete).Round(time.Millisecond))
	d.sleep(lease + 2*time.Second) // for what must not come
	require.Empty(w.t, d.state())
	d.stayed(append(stay, comer))
	w.cluster.Restart(shard)
	d.over()
}

// heals waits until Redis itself holds what it should, and then that everybody
// knows.
func (d *drill) heals(since time.Time, within time.Duration) {
	d.t.Helper()
	for {
		took := d.settles(since, within)
		d.sleep(200 * time.Millisecond)
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
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	w := clusterWorld(t)
	proxies := make(map[string]*redistest.ProxyServer)
	for _, addr := range w.cluster.Addrs() {
		proxies[addr] = redistest.Proxy(t, addr)
	}
	rooms := w.spreadRooms("room", 12) // many buckets, each with a call under way
	var dialer net.Dialer
	var away atomic.Pointer[string] // whose machine does not even refuse a connection
	none := ""
	away.Store(&none)
	over := func(o *Options) {
		o.Limits.CommandsPerSecond = -1
		o.Redis = w.cluster.Client(t, func(o *redis.ClusterOptions) {
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
	for gone == listens || gone == w.cluster.Owner(w.cluster.SlotOf(w.keys().Instances())) {
		gone++
	}
	other := w.tracked()
	d.servers = append(d.servers, other)
	p := other.dial()
	for _, room := range d.rooms {
		d.streams = append(d.streams, follow(p, room))
	}
	stay := d.members(1)
	d.settles(time.Now(), 10*time.Second)

	firsts, subscribeAnew := d.subscribersAnew(gone)
	lostAddr := w.cluster.Master(gone).Addr()
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
			p := d.servers[0].dial()
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
			require.Zero(t, c.away, "its node answers")
			require.Less(t, c.worst, time.Second)
		}
	}
	for i, c := range callers {
		t.Logf("shard %d (lost: %v): %d calls, %d answered that Redis is away, slowest %v %s", i, i == gone, c.calls, c.away, c.worst.Round(time.Millisecond), c.last)
		require.Empty(t, c.wrong)
		if i != gone {
			require.Zero(t, c.away, "its node answers")
			require.Less(t, c.worst, 2*time.Second)
		}
		require.Less(t, c.worst, 3*time.Second)
	}
	t.Logf("%+v", d.servers[0].Stats())
	require.Zero(t, d.servers[0].Stats().Reborn)
	heal()
	d.settles(time.Now(), 15*time.Second)
	d.stayed(stay)
}

// listensTo returns the shard whose master the subscription to a room was made at.
func (d *drill) listensTo(room string) (at int) {
	at = -1
	channel := d.keys().EventsPrefix() + room
	d.cluster.EachMaster(d.t, func(shard int, admin *redis.Client) {
		if n, err := admin.PubSubNumSub(d.t.Context(), channel).Result(); err == nil && n[channel] > 0 {
			at = shard
		}
	})
	require.GreaterOrEqual(d.t, at, 0, "nobody listens")
	return at
}

// subscribersAnew returns a function that has many clients of the first server
// subscribe to rooms of the lost shard that it does not watch yet, as fast as
// they are answered, and one at a time to such rooms of each other one. What
// they say is complete, by shard, when churning is over.
func (d *drill) subscribersAnew(lost int) (callers []*caller, begin func(at time.Time)) {
	const eager = 24
	rooms := d.spreadRooms("anew", 300)
	peers := make([][]*peer, len(rooms)) // who connects meanwhile is kept waiting
	for i := range rooms {
		callers = append(callers, &caller{})
		peers[i] = append(peers[i], d.servers[0].dial())
	}
	for range eager - 1 {
		peers[lost] = append(peers[lost], d.servers[0].dial())
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
