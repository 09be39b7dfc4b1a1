package faults

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
)

var clusterRuns = flag.Int("cluster.runs", 1, "runs of the tests that move slots or kill masters under load")

var clusterDark = flag.Duration("cluster.dark", 10*time.Second, "time for which a cluster node is unreachable")

// events returns the number of updates of all streams.
func (d *drill) events() int {
	n, seen := 0, make(map[*harness.Peer]bool)
	for _, s := range d.streams {
		if !seen[s.p] {
			seen[s.p] = true
			n += len(s.p.Got())
		}
	}
	return n
}

// depart closes peers, each of which is in one room.
func (d *drill) depart(peers []*harness.Peer) {
	d.T.Helper()
	for _, p := range peers {
		p.Close()
		d.forget(p)
	}
}

// departed checks that each stream has exactly one leave of each peer that was in its
// room.
func (d *drill) departed(peers []*harness.Peer) {
	d.T.Helper()
	for _, p := range peers {
		reported := 0
		for i, s := range d.streams {
			switch n := len(s.leaves()[p.ID]); n {
			case 0:
			case 1:
				reported++
			default:
				require.FailNow(d.T, "more than one leave", "subscriber %d: %d leaves of %s from %s", i, n, p.ID, s.room)
			}
		}
		require.Equal(d.T, len(d.servers), reported, "subscribers that received the leave of %s", p.ID)
	}
}

// recoveries collects the results of several runs.
type recoveries struct {
	took   []time.Duration
	events int
}

func (r *recoveries) report(t *testing.T, what string) {
	slices.Sort(r.took)
	if len(r.took) > 0 {
		t.Logf("%s: %d runs, recovered after %v (median), %v (worst); %d updates checked", what, len(r.took),
			r.took[len(r.took)/2].Round(time.Millisecond), r.took[len(r.took)-1].Round(time.Millisecond), r.events)
	}
}

// TestClusterFailover kills a master under load. Each run kills the master of another
// shard.
func TestClusterFailover(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := harness.OwnCluster(t)
	var all recoveries
	defer all.report(t, "master killed")
	for run := range *clusterRuns {
		t.Run(fmt.Sprint(run), func(t *testing.T) {
			w := &harness.World{T: t, Cluster: w.Cluster, Prefix: fmt.Sprintf("run%d:", run)}
			lease := 3 * time.Second
			if run%2 == 1 {
				lease = 10 * time.Second
			}
			masterKilled(w, run%w.Cluster.Shards(), lease, &all)
		})
	}
}

// afterFailover is the time limit for the recovery once the cluster is complete.
const afterFailover = 5 * time.Second

func masterKilled(w *harness.World, shard int, lease time.Duration, all *recoveries) {
	const ttl = 2 * time.Second // shorter than a failover
	plain, short := w.SpreadRooms("plain", 2), w.SpreadRooms("short", 1)
	d := newDrill(w, 3, slices.Concat(slices.Concat(plain...), slices.Concat(short...)), harness.LeaseOf(lease))
	for _, s := range d.servers {
		for _, rooms := range short {
			for _, room := range rooms {
				require.NoError(w.T, s.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{TTL: ttl}))
			}
		}
	}
	stay, before, during, after := d.members(2), d.members(1), d.members(1), d.members(1)
	d.settles(time.Now(), 10*time.Second)
	d.awaitContact()
	d.churn(len(d.rooms))
	d.Sleep(500 * time.Millisecond)

	d.depart(before)
	// TestClusterLosesWrites covers leaves that are lost with the master.
	w.Eventually(10*time.Second, func() bool { return d.missingLeaves(before) == "" }, "%s", d.missingLeaves(before))
	w.Cluster.Replicate(shard)
	killed := time.Now()
	w.Cluster.KillMaster(shard)
	d.Sleep(redistest.NodeTimeout / 2)
	d.depart(during)
	w.Cluster.WaitForFailover(shard)
	failed := time.Since(killed)
	complete := time.Now()
	d.depart(after)
	d.Sleep(time.Second)
	d.stopChurn()
	took := d.settles(complete, afterFailover)
	d.Sleep(lease + 2*time.Second) // time for unexpected updates
	require.Empty(w.T, d.diff())
	d.stayed(stay)
	d.departed(slices.Concat(before, during, after))
	all.took = append(all.took, took)
	all.events += d.events()
	w.T.Logf("shard %d, LeaseTTL %v: failed over after %v, recovered %v later, %d calls, %d updates",
		shard, lease, failed.Round(time.Millisecond), took.Round(time.Millisecond), d.calls.Load(), d.events())
	w.Cluster.Restart(shard)
	d.finish()
}

// caller makes one call after the other and collects the wrong answers.
type caller struct {
	worst time.Duration
	wrong []string
	calls int
	away  int    // answers that Redis is away
	last  string // the last of them
}

func (c *caller) call(p *harness.Peer, command string, payload map[string]any) {
	began := time.Now()
	answer, err := p.TryCall(command, payload)
	c.worst = max(c.worst, time.Since(began))
	c.calls++
	var v harness.View
	switch {
	case err != nil:
		c.wrong = append(c.wrong, command+": "+err.Error())
	case string(answer) == "true" || string(answer) == "false":
	case json.Unmarshal(answer, &v) != nil || !v.Success && v.Code != "EUNAVAILABLE":
		if len(c.wrong) < 5 {
			c.wrong = append(c.wrong, command+": "+string(answer))
		}
	case !v.Success, v.Stale && v.Epoch == "": // a failure, or an answer with no more than the entries of this server
		c.away++
		c.last = command + ": " + v.Error
	}
}

// TestClusterSlotsMove moves the slots of rooms that are in use, and the slot of the
// leases. It pauses in the middle of a move.
func TestClusterSlotsMove(t *testing.T) {
	t.Parallel()
	harness.Long(t, "takes real seconds")
	w := harness.OwnCluster(t)
	var all recoveries
	defer all.report(t, "slots moved")
	for run := range *clusterRuns {
		t.Run(fmt.Sprint(run), func(t *testing.T) {
			w := &harness.World{T: t, Cluster: w.Cluster, Prefix: fmt.Sprintf("run%d:", run)}
			slotsMove(w, &all)
		})
	}
}

func slotsMove(w *harness.World, all *recoveries) {
	const lease = 3 * time.Second
	rooms := slices.Concat(w.SpreadRooms("room", 2)...)
	d := newDrill(w, 2, rooms, harness.LeaseOf(lease), func(o *mesh.Options) { o.Limits.CommandsPerSecond = -1 })
	stay := d.members(3)
	d.settles(time.Now(), 10*time.Second)
	d.awaitContact()
	d.churn(2 * len(rooms))

	moving := []struct {
		key  string
		hold time.Duration // pause in the middle of the move
	}{
		{w.Keys().Members(rooms[0]), 500 * time.Millisecond},
		{w.Keys().Members(rooms[2]), 2500 * time.Millisecond}, // longer than the limit of a call
		{w.Keys().Members(rooms[4]), 0},
		{w.Keys().Instances(), lease + time.Second}, // until every lease has run out
	}
	var worst time.Duration
	for _, move := range moving {
		key := move.key
		leavers := d.members(1)
		d.awaitJoins(leavers)
		slot := w.Cluster.SlotOf(key)
		from := w.Cluster.Owner(slot)
		m := w.Cluster.BeginMove(slot, (from+1+rand.N(2))%3)
		c, done := &caller{}, make(chan struct{})
		p := d.servers[0].Dial()
		var probing sync.WaitGroup
		probing.Go(func() { // checks the answers during the move
			for room := range cycle(rooms) {
				select {
				case <-done:
					return
				default:
				}
				in := map[string]any{"roomName": room}
				c.call(p, "mesh/join-room", in)
				c.call(p, "mesh/get-presence-state", in)
				c.call(p, "mesh/leave-room", in)
			}
		})
		d.Sleep(50 * time.Millisecond)
		m.Keys(5)
		d.depart(leavers[:len(leavers)/2])
		d.Sleep(move.hold)
		m.Keys(5)
		d.depart(leavers[len(leavers)/2:])
		d.Sleep(move.hold / 4)
		m.Finish()
		moved := time.Now()
		close(done)
		probing.Wait()
		require.Empty(w.T, c.wrong, "answers")
		require.Less(w.T, c.worst, w.Unhurried(3*time.Second))
		w.T.Logf("slot of %s: %d calls, %d answered that Redis is away, slowest %v", key, c.calls, c.away, c.worst.Round(time.Millisecond))
		for _, room := range rooms {
			p.In(room)
			p.Out(room)
		}
		w.Eventually(afterFailover, func() bool { return d.missingLeaves(leavers) == "" }, "%s", d.missingLeaves(leavers))
		d.departed(leavers)
		worst = max(worst, time.Since(moved))
		all.took = append(all.took, time.Since(moved))
	}
	d.stopChurn()
	d.settles(time.Now(), afterFailover)
	d.Sleep(lease + 2*time.Second) // time for unexpected updates
	require.Empty(w.T, d.diff())
	d.stayed(stay)
	for _, s := range d.servers {
		require.Zero(w.T, s.Stats().ServersDeclaredDead, "a living server was declared dead")
		require.Zero(w.T, s.Stats().Reregistered)
	}
	all.events += d.events()
	w.T.Logf("LeaseTTL %v: recovered at most %v after a move, %d calls, %d updates", lease, worst.Round(time.Millisecond), d.calls.Load(), d.events())
	d.finish()
}

// cycle yields the elements of a list in an endless loop.
func cycle[T any](list []T) func(yield func(T) bool) {
	return func(yield func(T) bool) {
		for {
			for _, v := range list {
				if !yield(v) {
					return
				}
			}
		}
	}
}

// missingLeaves returns the first peer whose leave has not reached all subscribers, or
// "".
func (d *drill) missingLeaves(peers []*harness.Peer) string {
	for _, p := range peers {
		n := 0
		for _, s := range d.streams {
			n += len(s.leaves()[p.ID])
		}
		if n < len(d.servers) {
			return fmt.Sprintf("%s: %d of %d subscribers have the leave", p.ID, n, len(d.servers))
		}
	}
	return ""
}

// awaitJoins waits until every subscriber has received the joins of the peers.
func (d *drill) awaitJoins(peers []*harness.Peer) {
	d.T.Helper()
	d.Eventually(afterFailover, func() bool {
		for _, p := range peers {
			n := 0
			for _, s := range d.streams {
				if s.p.Count("join", p.ID) > 0 && d.isIn(s.room, p.ID) {
					n++
				}
			}
			if n < len(d.servers) {
				return false
			}
		}
		return true
	}, "all subscribers have the joins")
}

func (d *drill) isIn(room, id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.want[room][id]
	return ok
}
