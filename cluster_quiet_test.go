package mesh

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// TestClusterExpiredEvents: keys with a TTL die on every master, one of which
// was a replica when the servers started. Each tells on its own, and what it
// tells is heard: the connections of a killed server leave with their TTL, long
// before its lease runs out.
func TestClusterExpiredEvents(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes real seconds")
	}
	const lease, ttl = 8 * time.Second, 2 * time.Second
	w := ownCluster(t)
	rooms := slices.Concat(w.spreadRooms("room", 1)...)
	d := newDrill(w, 2, rooms, leaseOf(lease))
	for _, s := range d.servers {
		for _, room := range rooms {
			require.NoError(t, s.TrackPresence(Exact(room), PresenceOptions{TTL: ttl}))
		}
	}
	w.cluster.EachNode(func(addr string, admin *redis.Client) { // replicas, too
		w.eventually(10*time.Second, func() bool {
			n, err := admin.PubSubNumSub(t.Context(), "__keyevent@0__:expired").Result()
			require.NoError(t, err)
			return n["__keyevent@0__:expired"] == int64(len(d.servers))
		}, "not everybody listens to %s", addr)
	})
	stay := d.members(2)
	w.cluster.Failover(0)
	victim := w.child(childConfig{Lease: lease, TTL: ttl, Events: true})
	var gone []*peer
	for _, room := range rooms {
		for range 10 {
			p := victim.dial()
			d.note(room, p.id, p.in(room))
			gone = append(gone, p)
		}
	}
	d.settles(time.Now(), 10*time.Second)
	w.sleep(6 * time.Second) // by now the failover was seen
	d.patient()
	perEvent := d.busPerEvent(gone[0], rooms[0])
	for _, p := range gone {
		p.call("mesh/noop", map[string]any{})
	}
	killed := time.Now()
	victim.die()
	for _, p := range gone {
		d.forget(p)
	}
	score, err := w.client().ZScore(t.Context(), w.keys().Instances(), victim.incarnation).Result()
	require.NoError(t, err)
	d.settles(killed, ttl+2*time.Second)
	require.True(t, time.Now().Before(time.UnixMilli(int64(score))), "its lease has run out meanwhile")
	took := time.Since(killed)
	d.departed(gone)
	for _, s := range d.servers {
		require.True(t, s.Stats().ExpiredEvents)
	}
	t.Logf("TTL %v, LeaseTTL %v: all %d have left %v after the kill; %.1f messages on the cluster bus per event",
		ttl, lease, len(gone), took.Round(time.Millisecond), perEvent)
	d.stayed(stay)
	d.over()
}

// busPerEvent returns how many messages nodes send each other for one event.
func (d *drill) busPerEvent(p *peer, room string) float64 {
	d.t.Helper()
	sent := func() (n int) {
		d.cluster.EachNode(func(_ string, admin *redis.Client) {
			info, err := admin.ClusterInfo(d.t.Context()).Result()
			require.NoError(d.t, err)
			_, rest, ok := strings.Cut(info, "cluster_stats_messages_publish_sent:")
			var one int
			if ok {
				_, err := fmt.Sscan(rest, &one)
				require.NoError(d.t, err)
			}
			n += one
		})
		return n
	}
	const events = 150 // what one connection may ask for at once
	before := sent()
	for i := range events {
		d.note(room, p.id, p.states(room, i))
	}
	return float64(sent()-before) / events
}

// TestClusterSpread: rooms lie evenly on the masters.
func TestClusterSpread(t *testing.T) {
	t.Parallel()
	w := clusterWorld(t)
	names := map[string]func(i int) string{
		"numbered": func(i int) string { return fmt.Sprintf("room%d", i) },
		"padded":   func(i int) string { return fmt.Sprintf("tenant-7:document:%08d", i*16) },
		"short":    func(i int) string { return fmt.Sprintf("%x", i) },
	}
	const count = 10_000
	owners, buckets := make([]int, defaultBuckets), make([]int, w.cluster.Shards())
	for b := range owners {
		owners[b] = w.cluster.Owner(w.cluster.SlotOf(w.keys().Rooms(b)))
		buckets[owners[b]]++
	}
	for name, room := range names {
		perBucket, perShard := make([]int, defaultBuckets), make([]int, w.cluster.Shards())
		for i := range count {
			b := w.keys().RoomBucket(room(i))
			perBucket[b]++
			perShard[owners[b]]++
		}
		t.Logf("%s: buckets per master %v, rooms per master %v, per bucket %d to %d", name, buckets, perShard,
			slices.Min(perBucket), slices.Max(perBucket))
		for _, n := range perShard {
			require.InDelta(t, count/w.cluster.Shards(), n, count/10, "a third each")
		}
		for b, n := range perBucket { // six standard deviations
			require.InDelta(t, count/defaultBuckets, n, 75, "bucket %d", b)
		}
	}
}

// TestClusterCostOfLiving: a heartbeat is one call, and one check for each bucket
// that holds something of the server's.
func TestClusterCostOfLiving(t *testing.T) {
	t.Parallel()
	const lease, beats = 3 * time.Second, 4
	ctx, w := t.Context(), clusterWorld(t)
	var log commandLog
	p := w.manager(leaseOf(lease), expirationOff, log.logging)
	require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{}))
	w.sleep(lease)
	used := make(map[int]bool)
	measure := func() (scripts, sizes, others int) {
		w.sleep(lease) // nothing is compared while something is being written
		before := log.counts()
		w.sleep(beats * lease / 3)
		for name, n := range log.counts() {
			switch n -= before[name]; {
			case name == "evalsha":
				scripts = n
			case name == "scard":
				sizes = n
			case name == "hello" || name == "client" || name == "cluster": // connections and their client's own
			default:
				others += n
			}
		}
		return scripts, sizes, others
	}
	scripts, sizes, others := measure()
	require.InDelta(t, beats, scripts, 1)
	require.Zero(t, sizes, "it holds nothing")
	require.Zero(t, others)
	for i := range 300 {
		require.NoError(t, p.Connect(ctx, costConn(i), nil))
		require.NoError(t, p.Join(ctx, fmt.Sprintf("room%d", i%5), costConn(i)))
		used[w.keys().ConnBucket(costConn(i))] = true
		used[w.keys().RoomBucket(fmt.Sprintf("room%d", i%5))] = true
	}
	scripts, sizes, others = measure()
	t.Logf("%d buckets in use: %d heartbeats made %d script calls and asked %d times for a bucket's size",
		len(used), beats, scripts, sizes)
	require.InDelta(t, beats, scripts, 1)
	require.LessOrEqual(t, sizes, (beats+1)*len(used))
	require.GreaterOrEqual(t, sizes, (beats-1)*len(used))
	require.LessOrEqual(t, others, (beats+1)*(2*len(used)+3*5), "a fence and connections per bucket, and the five rooms: %v", log.counts())
}
