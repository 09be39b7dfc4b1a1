package faults

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// TestClusterExpiredEvents checks the expired events of all masters, one of which was a
// replica when the servers started. The entries of a killed server must end with their
// TTL, long before its lease runs out.
func TestClusterExpiredEvents(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	const lease, ttl = 8 * time.Second, 2 * time.Second
	w := harness.OwnCluster(t)
	rooms := slices.Concat(w.SpreadRooms("room", 1)...)
	d := newDrill(w, 2, rooms, harness.LeaseOf(lease))
	for _, s := range d.servers {
		for _, room := range rooms {
			require.NoError(t, s.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{TTL: ttl}))
		}
	}
	w.Cluster.EachNode(func(addr string, admin *redis.Client) { // including replicas
		w.Eventually(10*time.Second, func() bool {
			n, err := admin.PubSubNumSub(t.Context(), "__keyevent@0__:expired").Result()
			require.NoError(t, err)
			return n["__keyevent@0__:expired"] == int64(len(d.servers))
		}, "not all servers listen to %s", addr)
	})
	stay := d.members(2)
	w.Cluster.Failover(0)
	victim := w.Child(harness.ChildConfig{Lease: lease, TTL: ttl, Events: true})
	var gone []*harness.Peer
	for _, room := range rooms {
		for range 10 {
			p := victim.Dial()
			d.note(room, p.ID, p.In(room))
			gone = append(gone, p)
		}
	}
	d.settles(time.Now(), 10*time.Second)
	w.Sleep(6 * time.Second) // until the servers have noticed the failover
	d.awaitContact()
	perEvent := d.busPerEvent(gone[0], rooms[0])
	for _, p := range gone {
		p.Call("mesh/noop", map[string]any{})
	}
	killed := time.Now()
	victim.Die()
	for _, p := range gone {
		d.forget(p)
	}
	score, err := w.Client().ZScore(t.Context(), w.Keys().Instances(), victim.Incarnation).Result()
	require.NoError(t, err)
	d.settles(killed, ttl+2*time.Second)
	require.True(t, time.Now().Before(time.UnixMilli(int64(score))), "its lease has run out first")
	took := time.Since(killed)
	d.departed(gone)
	for _, s := range d.servers {
		require.True(t, s.Stats().ExpiredEventsWorking)
	}
	t.Logf("TTL %v, LeaseTTL %v: all %d have left %v after the kill; %.1f messages on the cluster bus per event",
		ttl, lease, len(gone), took.Round(time.Millisecond), perEvent)
	d.stayed(stay)
	d.finish()
}

// busPerEvent returns the number of messages between the nodes for one event.
func (d *drill) busPerEvent(p *harness.Peer, room string) float64 {
	d.T.Helper()
	sent := func() (n int) {
		d.Cluster.EachNode(func(_ string, admin *redis.Client) {
			info, err := admin.ClusterInfo(d.T.Context()).Result()
			require.NoError(d.T, err)
			_, rest, ok := strings.Cut(info, "cluster_stats_messages_publish_sent:")
			var one int
			if ok {
				_, err := fmt.Sscan(rest, &one)
				require.NoError(d.T, err)
			}
			n += one
		})
		return n
	}
	const events = 150 // the number of commands that one connection may send at once
	before := sent()
	for i := range events {
		d.note(room, p.ID, p.States(room, i))
	}
	return float64(sent()-before) / events
}

// TestClusterSpread checks that rooms are spread evenly over the masters.
func TestClusterSpread(t *testing.T) {
	t.Parallel()
	w := harness.ClusterWorld(t)
	names := map[string]func(i int) string{
		"numbered": func(i int) string { return fmt.Sprintf("room%d", i) },
		"padded":   func(i int) string { return fmt.Sprintf("tenant-7:document:%08d", i*16) },
		"short":    func(i int) string { return fmt.Sprintf("%x", i) },
	}
	const count = 10_000
	owners, buckets := make([]int, harness.ClusterBuckets), make([]int, w.Cluster.Shards())
	for b := range owners {
		owners[b] = w.Cluster.Owner(w.Cluster.SlotOf(w.Keys().Rooms(b)))
		buckets[owners[b]]++
	}
	for name, room := range names {
		perBucket, perShard := make([]int, harness.ClusterBuckets), make([]int, w.Cluster.Shards())
		for i := range count {
			b := w.Keys().RoomBucket(room(i))
			perBucket[b]++
			perShard[owners[b]]++
		}
		t.Logf("%s: buckets per master %v, rooms per master %v, per bucket %d to %d", name, buckets, perShard,
			slices.Min(perBucket), slices.Max(perBucket))
		for _, n := range perShard {
			require.InDelta(t, count/w.Cluster.Shards(), n, count/10, "a third each")
		}
		for b, n := range perBucket { // six standard deviations
			require.InDelta(t, count/harness.ClusterBuckets, n, 75, "bucket %d", b)
		}
	}
}

// TestClusterCostOfHeartbeats checks that a heartbeat makes one script call, and one
// check for each bucket with local entries or connections.
func TestClusterCostOfHeartbeats(t *testing.T) {
	t.Parallel()
	const lease = 3 * time.Second
	heartbeats := 4
	ctx, w := t.Context(), harness.ClusterWorld(t)
	var log harness.CommandLog
	p := w.Manager(harness.LeaseOf(lease), harness.ExpirationOff, log.Logging)
	require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	w.Sleep(lease)
	used := make(map[int]bool)
	measure := func() (scripts, sizes, others int) {
		w.Sleep(lease) // the checks only run when nothing is being written
		before, began := log.Counts(), time.Now()
		w.Sleep(4 * lease / 3)
		heartbeats = int(time.Since(began) / (lease / 3)) // may exceed four on a slow machine
		for name, n := range log.Counts() {
			switch n -= before[name]; {
			case name == "evalsha":
				scripts = n
			case name == "scard":
				sizes = n
			case name == "hello" || name == "client" || name == "cluster": // sent by the Redis client for its connections
			default:
				others += n
			}
		}
		return scripts, sizes, others
	}
	scripts, sizes, others := measure()
	require.Positive(t, scripts)
	require.LessOrEqual(t, scripts, heartbeats+1)
	require.Zero(t, sizes, "the server has no entries")
	require.Zero(t, others)
	for i := range 300 {
		require.NoError(t, p.Connect(ctx, harness.CostConn(i), nil))
		require.NoError(t, p.Join(ctx, fmt.Sprintf("room%d", i%5), harness.CostConn(i)))
		used[w.Keys().ConnBucket(harness.CostConn(i))] = true
		used[w.Keys().RoomBucket(fmt.Sprintf("room%d", i%5))] = true
	}
	scripts, sizes, others = measure()
	t.Logf("%d buckets in use: %d heartbeats made %d script calls and %d requests for the size of a bucket",
		len(used), heartbeats, scripts, sizes)
	require.Positive(t, scripts)
	require.LessOrEqual(t, scripts, heartbeats+1)
	require.LessOrEqual(t, sizes, (heartbeats+1)*len(used))
	require.GreaterOrEqual(t, sizes, len(used))
	require.LessOrEqual(t, others, (heartbeats+1)*(2*len(used)+3*5), "one fence and connections per bucket, and five rooms: %v", log.Counts())
}
