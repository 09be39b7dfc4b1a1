//go:build unix

package faults

import (
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func init() {
	faultCases = append([]faultCase{
		{"paused", paused},
		{"paused, shorter than the lease", pausedTimed(6500*time.Millisecond, 4500*time.Millisecond)},
		{"paused past lease and TTL", pausedTimed(2*time.Second, 4500*time.Millisecond)},
	}, faultCases...)
}

// paused stops a server process for longer than its lease. It is declared dead once.
// When it continues, it lets those connections join again whose sockets show a sign of
// life.
func paused(t *testing.T) {
	const lease = 2 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 2, []string{"lobby"}, harness.LeaseOf(lease))
	sleeper := w.Child(harness.ChildConfig{Lease: lease, Events: true})
	stay := d.members(5)
	alive, closing, mute := make([]*harness.Peer, 20), make([]*harness.Peer, 10), make([]*harness.Peer, 5)
	for _, list := range [][]*harness.Peer{alive, closing, mute} {
		for i := range list {
			list[i] = sleeper.Dial()
			d.note("lobby", list[i].ID, list[i].In("lobby"))
		}
	}
	d.note("lobby", alive[0].ID, alive[0].States("lobby", 1))
	d.settles(time.Now(), 5*time.Second)
	d.awaitContact()

	require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGSTOP))
	stopped := time.Now()
	for _, list := range [][]*harness.Peer{alive, closing, mute} {
		for _, p := range list {
			d.forget(p)
		}
	}
	d.reportedBy(stopped.Add(lease+time.Second+500*time.Millisecond), lease, func() bool { return d.diff() == "" }, "the leaves are reported")
	t.Logf("declared dead %v after the stop", time.Since(stopped).Round(time.Millisecond))
	for i, p := range closing {
		if i%2 == 0 { // one more frame, which the process reads when it continues
			require.NoError(t, p.Send(map[string]any{"id": 1, "command": "mesh/noop", "payload": map[string]any{}}))
		}
		p.Close()
	}
	for _, p := range mute {
		p.Mute()
	}
	checkLeaves := func() {
		for i, s := range d.streams {
			leaves := s.leaves()
			for _, p := range alive {
				require.Len(t, leaves[p.ID], 1, "subscriber %d", i)
			}
			for _, p := range mute {
				require.Len(t, leaves[p.ID], 1, "subscriber %d", i)
			}
		}
	}
	checkLeaves()

	require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGCONT))
	woke := time.Now()
	for _, p := range alive {
		d.note("lobby", p.ID, harness.WantedEntry{In: true}) // the state ended with the leave
	}
	took := d.settles(woke, lease+2*time.Second)
	t.Logf("living connections returned %v after the process continued", took.Round(time.Millisecond))
	w.Sleep(lease)
	require.Empty(t, d.diff(), "connections without a sign of life must not return")
	checkLeaves()
	for _, p := range alive[:10] {
		p.Leave("lobby")
		d.forget(p)
	}
	for _, p := range alive[10:] {
		p.Close()
		d.forget(p)
	}
	d.settles(time.Now(), 2*time.Second)
	sleeper.Die()
	d.stayed(stay)
	d.finish()
}

// pausedTimed stops a server process for longer than the TTL of one room, and for
// longer than its lease or not. Entries of the room with a TTL must be reported as left
// once, and other entries only if the lease ran out. All entries must return when the
// process continues.
func pausedTimed(lease, pause time.Duration) func(t *testing.T) {
	const ttl = 2 * time.Second
	return func(t *testing.T) {
		w := harness.RealWorld(t)
		d := newDrill(w, 2, []string{"lobby", harness.RoomTimed}, harness.LeaseOf(lease))
		for _, s := range d.servers {
			require.NoError(t, harness.TrackTimed(s.Server, ttl))
		}
		sleeper := w.Child(harness.ChildConfig{Lease: lease, Timed: ttl, Events: true})
		stay := d.members(3)
		peers := map[string][]*harness.Peer{}
		for _, room := range d.rooms {
			for range 5 {
				p := sleeper.Dial()
				peers[room] = append(peers[room], p)
				d.note(room, p.ID, p.In(room))
			}
		}
		d.settles(time.Now(), 5*time.Second)
		d.awaitContact()
		// Stop right after a heartbeat, so that the rest of the lease is known.
		renewed := func() float64 { return w.Client().ZScore(t.Context(), "mesh:instances", sleeper.Incarnation).Val() }
		before := renewed()
		d.Eventually(lease, func() bool { return renewed() > before }, "a heartbeat")

		require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGSTOP))
		stopped := time.Now()
		checkLeaves := func(room string, times int) {
			for i, s := range d.streams {
				leaves := s.leaves()
				for _, p := range peers[room] {
					if s.room == room {
						require.Len(t, leaves[p.ID], times, "subscriber %d, %s", i, room)
					}
				}
			}
		}
		for _, p := range peers[harness.RoomTimed] {
			d.forget(p)
		}
		declaredDead := pause > lease
		if declaredDead {
			for _, p := range peers["lobby"] {
				d.forget(p)
			}
		}
		// The key lives for TTL + 1 s after its last refresh, and few keys expire soon.
		// If the other servers lose contact, the entries end with the lease instead.
		contact, diff, took := true, "not compared", time.Duration(0)
		for diff != "" && time.Since(stopped) < pause {
			contact = contact && d.inContact()
			if diff = d.diff(); diff == "" {
				took = time.Since(stopped)
			}
			w.Sleep(10 * time.Millisecond)
		}
		if contact {
			require.Empty(t, diff, "the leaves are reported during the pause")
		}
		t.Logf("TTL %v, LeaseTTL %v: leaves reported %v after the stop, contact: %v", ttl, lease, took.Round(time.Millisecond), contact)
		w.Sleep(time.Until(stopped.Add(pause)))
		require.True(t, !contact || d.diff() == "", "no connection returns during the pause")
		require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGCONT))
		woke := time.Now()
		for _, room := range d.rooms {
			for _, p := range peers[room] {
				d.note(room, p.ID, harness.WantedEntry{In: true})
			}
		}
		took = d.settles(woke, lease+2*time.Second)
		t.Logf("all connections returned %v after the process continued", took.Round(time.Millisecond))
		l, err := sleeper.Interruptions()
		require.NoError(t, err)
		require.True(t, !contact || declaredDead == (l.Reregistered > 0))
		w.Sleep(ttl)
		require.Empty(t, d.diff())
		if contact {
			checkLeaves(harness.RoomTimed, 1)
			checkLeaves("lobby", map[bool]int{true: 1}[declaredDead])
		}
		d.stayed(stay)
		require.NoError(t, sleeper.Stop())
		for _, list := range peers {
			for _, p := range list {
				d.forget(p)
			}
		}
		d.settles(time.Now(), 2*time.Second)
		d.finish()
	}
}
