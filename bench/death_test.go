package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/bench/internal/peer"
	"github.com/meshpresence/mesh/internal/redistest"
)

var (
	deathEntries = flag.Int("death.entries", 10_000, "entries of the server that dies in BenchmarkDeath")
	deathRooms   = flag.Int("death.rooms", 1_000, "rooms that they are in")
)

var (
	watchCrowd = newJob("watch", func(c crowd) (bool, error) {
		departures = newVigil(c)
		return true, departures.begin()
	})
	departed = newJob("departed", func(within time.Duration) (deaths, error) { return departures.await(within) })
)

// departures is the vigil of this process.
var departures *vigil

// vigil watches all rooms of a crowd, with one subscription each, and records the leaves.
type vigil struct {
	c    crowd
	done chan struct{} // closed when all entries have left

	mu     sync.Mutex // guards the fields below
	left   map[string]int
	leaves int
	first  time.Time
	last   time.Time
	err    error
}

// deaths is the result of a vigil. Times are in unix ns of the same machine.
type deaths struct {
	First, Last int64
	Leaves      int // one for each entry, if nothing is wrong
	Once        int // entries that left once
}

func newVigil(c crowd) *vigil {
	return &vigil{c: c, done: make(chan struct{}), left: make(map[string]int, c.Entries)}
}

// begin returns when all rooms have had their snapshots.
func (v *vigil) begin() error {
	seen := make(chan int, v.c.Rooms)
	for i := range v.c.Rooms {
		go v.watch(v.c.room(i), seen) // ends with the process
	}
	sum := 0
	for range v.c.Rooms {
		sum += <-seen
	}
	if sum != v.c.Entries {
		return fmt.Errorf("%d entries seen of %d: %w", sum, v.c.Entries, v.err)
	}
	return nil
}

func (v *vigil) watch(room string, seen chan<- int) {
	for e, err := range member.Presence.Subscribe(context.Background(), room, mesh.SubscribeOptions{}) {
		now := time.Now()
		switch {
		case err != nil:
			v.mu.Lock()
			v.err = errors.Join(v.err, err)
			v.mu.Unlock()
			seen <- 0
		case e.Type == mesh.EventSnapshot:
			seen <- len(e.Snapshot.Members)
		case e.Type == mesh.EventLeave:
			v.leave(e.ConnectionID, now)
		}
	}
}

func (v *vigil) leave(conn string, now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.leaves == 0 {
		v.first = now
	}
	v.leaves++
	v.last = now
	if v.left[conn]++; len(v.left) == v.c.Entries && v.left[conn] == 1 {
		close(v.done)
	}
}

// await waits until all entries have left, and then for surplus leaves.
func (v *vigil) await(within time.Duration) (deaths, error) {
	select {
	case <-v.done:
		time.Sleep(2 * time.Second)
	case <-time.After(within):
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	d := deaths{First: v.first.UnixNano(), Last: v.last.UnixNano(), Leaves: v.leaves}
	for _, n := range v.left {
		if n == 1 {
			d.Once++
		}
	}
	return d, v.err
}

// BenchmarkDeath measures the time until all entries of a dead server have left: from the
// first leave to the last, and from the end of its lease to both. One of three servers is
// killed. A server without entries watches all rooms.
func BenchmarkDeath(b *testing.B) {
	var spread, first, last, kill, cpu []float64
	for b.Loop() {
		r := redistest.Start(b)
		client := r.Client(b)
		cfg := peer.MemberConfig{Redis: r.Addr(), Rules: []peer.Rule{{Expr: ".*"}}}
		var members []*process
		var ids []string
		for range 3 {
			p := start(b, "server")
			ids = append(ids, startMember.on(p, cfg))
			time.Sleep(rand.N(3 * time.Second)) // real servers also renew their leases at different times
			members = append(members, p)
		}
		c := crowd{Name: "c", Entries: *deathEntries, Rooms: *deathRooms, RoomPrefix: "room"}
		connectCrowd.on(members[0], c)
		joinCrowd.on(members[0], c)
		watchCrowd.on(members[1], c)
		time.Sleep(11 * time.Second) // the others have been in contact for one lease, so that they may declare it dead
		before := usage(b, client)
		members[0].kill()
		killed := time.Now()
		deadline, err := client.ZScore(b.Context(), "mesh:instances", ids[0]).Result()
		require.NoError(b, err)
		lease := time.UnixMilli(int64(deadline))
		d := departed.on(members[1], 30*time.Second)
		used := usage(b, client).Since(before)
		require.Equal(b, c.Entries, d.Once, "%d leaves", d.Leaves)
		require.Equal(b, c.Entries, d.Leaves)

		from := func(t time.Time, ns int64) float64 { return time.Unix(0, ns).Sub(t).Seconds() }
		spread = append(spread, from(time.Unix(0, d.First), d.Last))
		first = append(first, from(lease, d.First))
		last = append(last, from(lease, d.Last))
		kill = append(kill, from(killed, d.First))
		cpu = append(cpu, used.CPU)
		b.Logf("lease left at the kill %.2f s; after its end: first %.3f s, last %.3f s; spread %.3f s; redis %.2f s, %d script calls, %d commands",
			lease.Sub(killed).Seconds(), first[len(first)-1], last[len(last)-1], spread[len(spread)-1], used.CPU, used.Scripts(), used.Total())
		for i, p := range members[1:] {
			s := statsOf.on(p, true)
			b.Logf("server %d: %d declared dead, entries ended: %d", i+1, s.ServersDeclaredDead, s.Leaves["server_lost"])
			stopMember.on(p, true)
		}
	}
	b.ReportMetric(median(spread), "first-to-last-s")
	b.ReportMetric(median(first), "lease-to-first-s")
	b.ReportMetric(median(last), "lease-to-last-s")
	b.ReportMetric(worst(last), "worst-lease-to-last-s") // promised: 1
	b.ReportMetric(median(kill), "kill-to-first-s")
	b.ReportMetric(median(cpu), "redis-s")
}
