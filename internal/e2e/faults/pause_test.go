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

// paused: a server process stands still past its lease. It is buried once,
// wakes, and joins those anew whose sockets show life.
func paused(t *testing.T) {
	const lease = 2 * time.Second
	w := harness.RealWorld(t)
	d := newDrill(w, 2, []string{"lobby"}, harness.LeaseOf(lease))
	sleeper := w.Child(harness.ChildConfig{Lease: lease, Events: true})
	stay := d.members(5)
	alive, closing, deaf := make([]*harness.Peer, 20), make([]*harness.Peer, 10), make([]*harness.Peer, 5)
	for _, list := range [][]*harness.Peer{alive, closing, deaf} {
		for i := range list {
			list[i] = sleeper.Dial()
			d.note("lobby", list[i].ID, list[i].In("lobby"))
		}
	}
	d.note("lobby", alive[0].ID, alive[0].States("lobby", 1))
	d.settles(time.Now(), 5*time.Second)
	d.patient()

	require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGSTOP))
	stopped := time.Now()
	for _, list := range [][]*harness.Peer{alive, closing, deaf} {
		for _, p := range list {
			d.forget(p)
		}
	}
	d.toldBy(stopped.Add(lease+time.Second+500*time.Millisecond), lease, func() bool { return d.state() == "" }, "all are told")
	t.Logf("buried %v after it stopped", time.Since(stopped).Round(time.Millisecond))
	for i, p := range closing {
		if i%2 == 0 { // one more frame, which it will find when it wakes
			require.NoError(t, p.Send(map[string]any{"id": 1, "command": "mesh/noop", "payload": map[string]any{}}))
		}
		p.Close()
	}
	for _, p := range deaf {
		p.Mute()
	}
	once := func() {
		for i, s := range d.streams {
			leaves := s.leaves()
			for _, p := range alive {
				require.Len(t, leaves[p.ID], 1, "subscriber %d", i)
			}
			for _, p := range deaf {
				require.Len(t, leaves[p.ID], 1, "subscriber %d", i)
			}
		}
	}
	once()

	require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGCONT))
	woke := time.Now()
	for _, p := range alive {
		d.note("lobby", p.ID, harness.Wish{In: true}) // its state ended with the leave
	}
	took := d.settles(woke, lease+2*time.Second)
	t.Logf("its living sockets are back %v after it woke", took.Round(time.Millisecond))
	w.Sleep(lease)
	require.Empty(t, d.state(), "whose socket shows no life stays away")
	once()
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
	d.over()
}

// pausedTimed: a server process stands still past the TTL of one room, and past
// its lease or not. Who has a TTL is told to have left, once; who has none only
// with the lease. When it goes on all of them are there again.
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
		hers := map[string][]*harness.Peer{}
		for _, room := range d.rooms {
			for range 5 {
				p := sleeper.Dial()
				hers[room] = append(hers[room], p)
				d.note(room, p.ID, p.In(room))
			}
		}
		d.settles(time.Now(), 5*time.Second)
		d.patient()
		// Right after a renewal: what is left of the lease is known.
		renewed := func() float64 { return w.Client().ZScore(t.Context(), "mesh:instances", sleeper.Incarnation).Val() }
		before := renewed()
		d.Eventually(lease, func() bool { return renewed() > before }, "a renewal")

		require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGSTOP))
		stopped := time.Now()
		told := func(room string, times int) {
			for i, s := range d.streams {
				leaves := s.leaves()
				for _, p := range hers[room] {
					if s.room == room {
						require.Len(t, leaves[p.ID], times, "subscriber %d, %s", i, room)
					}
				}
			}
		}
		for _, p := range hers[harness.RoomTimed] {
			d.forget(p)
		}
		buried := pause > lease
		if buried {
			for _, p := range hers["lobby"] {
				d.forget(p)
			}
		}
		// The key lives TTL + 1 s from the last refresh, and few keys expire soon.
		// Where the others lose patience meanwhile, they leave it to the lease.
		patient, fits, took := true, "nothing", time.Duration(0)
		for fits != "" && time.Since(stopped) < pause {
			patient = patient && d.judging()
			if fits = d.state(); fits == "" {
				took = time.Since(stopped)
			}
			w.Sleep(10 * time.Millisecond)
		}
		if patient {
			require.Empty(t, fits, "not before the pause is over")
		}
		t.Logf("with a TTL of %v and a lease of %v told %v after it stopped, patient: %v", ttl, lease, took.Round(time.Millisecond), patient)
		w.Sleep(time.Until(stopped.Add(pause)))
		require.True(t, !patient || d.state() == "", "nobody comes back by himself")
		require.NoError(t, sleeper.Cmd.Process.Signal(syscall.SIGCONT))
		woke := time.Now()
		for _, room := range d.rooms {
			for _, p := range hers[room] {
				d.note(room, p.ID, harness.Wish{In: true})
			}
		}
		took = d.settles(woke, lease+2*time.Second)
		t.Logf("all are back %v after it went on", took.Round(time.Millisecond))
		l, err := sleeper.Lives()
		require.NoError(t, err)
		require.True(t, !patient || buried == (l.Reborn > 0))
		w.Sleep(ttl)
		require.Empty(t, d.state())
		if patient {
			told(harness.RoomTimed, 1)
			told("lobby", map[bool]int{true: 1}[buried])
		}
		d.stayed(stay)
		require.NoError(t, sleeper.Stop())
		for _, list := range hers {
			for _, p := range list {
				d.forget(p)
			}
		}
		d.settles(time.Now(), 2*time.Second)
		d.over()
	}
}
