package clock

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// model is a sorted list of timers with the specified behaviour of a wheel.
type model struct {
	origin time.Time
	armed  []modelTimer
	order  int
}

type modelTimer struct {
	id    int
	at    time.Duration // since origin, a multiple of the step
	order int           // of scheduling
}

func (m *model) schedule(id int, after time.Duration) {
	m.cancel(id)
	now := time.Since(m.origin)
	at := now + max(after, 0)
	if rest := at % DefaultStep; rest > 0 {
		at += DefaultStep - rest
	}
	if at == now { // that tick has been handled already
		at += DefaultStep
	}
	m.order++
	m.armed = append(m.armed, modelTimer{id, at, m.order})
}

func (m *model) cancel(id int) bool {
	n := len(m.armed)
	m.armed = slices.DeleteFunc(m.armed, func(t modelTimer) bool { return t.id == id })
	return len(m.armed) < n
}

// due removes the timers that must have fired by now, and returns their ids in order.
func (m *model) due() (ids []int) {
	slices.SortFunc(m.armed, func(a, b modelTimer) int {
		return cmp.Or(cmp.Compare(a.at, b.at), cmp.Compare(a.order, b.order))
	})
	for len(m.armed) > 0 && m.armed[0].at <= time.Since(m.origin) {
		ids = append(ids, m.armed[0].id)
		m.armed = m.armed[1:]
	}
	return ids
}

func TestAgainstModel(t *testing.T) {
	seeds := uint64(20)
	if testing.Short() {
		seeds = 5
	}
	for seed := range seeds {
		t.Run("", func(t *testing.T) {
			inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) { compare(t, w, seed) })
		})
	}
}

// compare makes random calls to a wheel and to the model. The same timers must fire in
// the same order.
func compare(t *testing.T, w *Wheel, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	m := &model{origin: w.origin}
	timers := make([]Timer, 100)
	var fired record[int]
	for range 3000 {
		id := rnd.IntN(len(timers))
		switch rnd.IntN(10) {
		case 0, 1:
			require.Equal(t, m.cancel(id), w.Cancel(&timers[id]))
		case 2:
			time.Sleep(time.Duration(rnd.Int64N(int64(3 * DefaultStep))))
		case 3:
			if rnd.IntN(20) == 0 { // up to two turns
				time.Sleep(time.Duration(rnd.Int64N(int64(2 * slots * DefaultStep))))
			}
			time.Sleep(time.Duration(rnd.Int64N(int64(time.Second))))
		default:
			after := time.Duration(rnd.Int64N(int64(10 * time.Second)))
			switch rnd.IntN(8) {
			case 0:
				after = time.Duration(rnd.Int64N(int64(3 * slots * DefaultStep)))
			case 1:
				after = time.Duration(rnd.IntN(4)) * DefaultStep
			}
			m.schedule(id, after)
			w.Schedule(&timers[id], after, func() { fired.add(id) })
		}
		synctest.Wait()
		require.Equal(t, m.due(), fired.take())
		require.Equal(t, len(m.armed), w.Armed())
	}
}
