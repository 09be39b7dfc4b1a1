//go:build unix

package mesh

import (
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func init() { faultCases = append([]faultCase{{"paused", paused}}, faultCases...) }

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
	took := d.settles(stopped, lease+time.Second+500*time.Millisecond)
	t.Logf("buried %v after it stopped", took.Round(time.Millisecond))
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
	took = d.settles(woke, lease+2*time.Second)
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
