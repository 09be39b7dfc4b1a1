//go:build unix

package mesh

import (
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
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
	w := realWorld(t)
	d := newDrill(w, 2, []string{"lobby"}, leaseOf(lease))
	sleeper := w.child(childConfig{Lease: lease, Events: true})
	stay := d.members(5)
	alive, closing, deaf := make([]*peer, 20), make([]*peer, 10), make([]*peer, 5)
	for _, list := range [][]*peer{alive, closing, deaf} {
		for i := range list {
			list[i] = sleeper.dial()
			d.note("lobby", list[i].id, list[i].in("lobby"))
		}
	}
	d.note("lobby", alive[0].id, alive[0].states("lobby", 1))
	d.settles(time.Now(), 5*time.Second)
	d.patient()

	require.NoError(t, sleeper.cmd.Process.Signal(syscall.SIGSTOP))
	stopped := time.Now()
	for _, list := range [][]*peer{alive, closing, deaf} {
		for _, p := range list {
			d.forget(p)
		}
	}
	d.toldBy(stopped.Add(lease+time.Second+500*time.Millisecond), lease, func() bool { return d.state() == "" }, "all are told")
	t.Logf("buried %v after it stopped", time.Since(stopped).Round(time.Millisecond))
	for i, p := range closing {
		if i%2 == 0 { // one more frame, which it will find when it wakes
			require.NoError(t, p.send(map[string]any{"id": 1, "command": "mesh/noop", "payload": map[string]any{}}))
		}
		p.close()
	}
	for _, p := range deaf {
		p.mute()
	}
	once := func() {
		for i, s := range d.streams {
			leaves := s.leaves()
			for _, p := range alive {
				require.Len(t, leaves[p.id], 1, "subscriber %d", i)
			}
			for _, p := range deaf {
				require.Len(t, leaves[p.id], 1, "subscriber %d", i)
			}
		}
	}
	once()

	require.NoError(t, sleeper.cmd.Process.Signal(syscall.SIGCONT))
	woke := time.Now()
	for _, p := range alive {
		d.note("lobby", p.id, wish{in: true}) // its state ended with the leave
	}
	took := d.settles(woke, lease+2*time.Second)
	t.Logf("its living sockets are back %v after it woke", took.Round(time.Millisecond))
	w.sleep(lease)
	require.Empty(t, d.state(), "whose socket shows no life stays away")
	once()
	for _, p := range alive[:10] {
		p.leave("lobby")
		d.forget(p)
	}
	for _, p := range alive[10:] {
		p.close()
		d.forget(p)
	}
	d.settles(time.Now(), 2*time.Second)
	sleeper.die()
	d.stayed(stay)
	d.over()
}

// pausedTimed: a server process stands still past the TTL of one room, and past
// its lease or not. Who has a TTL is told to have left, once; who has none only
// with the lease. When it goes on all of them are there again.
func pausedTimed(lease, pause time.Duration) func(t *testing.T) {
	const ttl = 2 * time.Second
	return func(t *testing.T) {
		w := realWorld(t)
		d := newDrill(w, 2, []string{"lobby", roomTimed}, leaseOf(lease))
		for _, s := range d.servers {
			require.NoError(t, s.trackTimed(ttl))
		}
		sleeper := w.child(childConfig{Lease: lease, Timed: ttl, Events: true})
		stay := d.members(3)
		hers := map[string][]*peer{}
		for _, room := range d.rooms {
			for range 5 {
				p := sleeper.dial()
				hers[room] = append(hers[room], p)
				d.note(room, p.id, p.in(room))
			}
		}
		d.settles(time.Now(), 5*time.Second)
		d.patient()
		// Right after a renewal: what is left of the lease is known.
		renewed := func() float64 { return w.client().ZScore(t.Context(), "mesh:instances", sleeper.incarnation).Val() }
		before := renewed()
		d.eventually(lease, func() bool { return renewed() > before }, "a renewal")

		require.NoError(t, sleeper.cmd.Process.Signal(syscall.SIGSTOP))
		stopped := time.Now()
		told := func(room string, times int) {
			for i, s := range d.streams {
				leaves := s.leaves()
				for _, p := range hers[room] {
					if s.room == room {
						require.Len(t, leaves[p.id], times, "subscriber %d, %s", i, room)
					}
				}
			}
		}
		for _, p := range hers[roomTimed] {
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
			w.sleep(10 * time.Millisecond)
		}
		if patient {
			require.Empty(t, fits)
			require.LessOrEqual(t, took, ttl+2500*time.Millisecond)
		}
		t.Logf("with a TTL of %v and a lease of %v told %v after it stopped, patient: %v", ttl, lease, took.Round(time.Millisecond), patient)
		w.sleep(time.Until(stopped.Add(pause)))
		require.True(t, !patient || d.state() == "", "nobody comes back by himself")
		require.NoError(t, sleeper.cmd.Process.Signal(syscall.SIGCONT))
		woke := time.Now()
		for _, room := range d.rooms {
			for _, p := range hers[room] {
				d.note(room, p.id, wish{in: true})
			}
		}
		took = d.settles(woke, lease+2*time.Second)
		t.Logf("all are back %v after it went on", took.Round(time.Millisecond))
		l, err := sleeper.lives()
		require.NoError(t, err)
		require.True(t, !patient || buried == (l.Reborn > 0))
		w.sleep(ttl)
		require.Empty(t, d.state())
		if patient {
			told(roomTimed, 1)
			told("lobby", map[bool]int{true: 1}[buried])
		}
		d.stayed(stay)
		require.NoError(t, sleeper.stop())
		for _, list := range hers {
			for _, p := range list {
				d.forget(p)
			}
		}
		d.settles(time.Now(), 2*time.Second)
		d.over()
	}
}
