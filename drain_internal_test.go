package mesh

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/admission"
)

// takeDue with a clock that jumps: what a process that stood still owes is not
// paid all at once, and yet in time.
func TestDrainAfterAStandstill(t *testing.T) {
	t.Parallel()
	for _, sockets := range []int{1, 2, 7, 1000, 20_000} {
		for _, still := range []time.Duration{0, 3 * time.Second, 9900 * time.Millisecond, 11 * time.Second} {
			s := &Server{n: &core{}, conns: map[string]*Connection{}, gate: admission.New(admission.Config{})}
			for i := range sockets {
				id := fmt.Sprint(i)
				s.conns[id] = &Connection{id: id}
			}
			assert.Equal(t, sockets, s.refuseMore())
			begun := time.Now()
			now, woken, until := begun, begun, begun.Add(10*time.Second)
			told, rounds := map[string]bool{}, 0
			for wait := time.Duration(0); wait >= 0; rounds++ {
				now = now.Add(wait)
				if rounds == 1 {
					now = now.Add(still)
					woken = now
				}
				var due []*Connection
				due, wait = s.takeDue(now, begun, until)
				for _, c := range due {
					require.False(t, told[c.id])
					told[c.id] = true
				}
				fair := sockets
				if now.Before(until) {
					left := until.Sub(woken) // what remains to spread them over
					fair = 1 + int(float64(sockets)*float64(drainLate+drainStep)/float64(left))
					if still == 0 {
						fair = 1 + int(float64(sockets)*float64(2*drainStep)/float64(10*time.Second))
					}
				}
				require.LessOrEqual(t, len(due), fair, "%d sockets, %v: %v after", sockets, still, now.Sub(begun))
			}
			require.Len(t, told, sockets)
			if woken.Before(until) {
				require.LessOrEqual(t, now, until)
			}
			require.LessOrEqual(t, rounds, 10_000/50+sockets)
		}
	}
}
