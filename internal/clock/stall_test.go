package clock

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// block arms a timer that blocks the wheel for d, from the next step on, like a pause of
// the process.
func block(w *Wheel, t *Timer, d time.Duration) {
	w.Schedule(t, 1, func() { time.Sleep(d) })
}

func TestStall(t *testing.T) {
	tests := []struct {
		name  string
		pause time.Duration
		stall bool
	}{
		{"none", 0, false},
		{"some steps", 400 * time.Millisecond, false},
		{"at the limit", StallAfter + DefaultStep, false},
		{"just above", StallAfter + DefaultStep + 1, true},
		{"long", time.Minute, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
				var blocker, other Timer
				var seen time.Time
				block(w, &blocker, test.pause)
				w.Schedule(&other, 2*DefaultStep, func() { seen = w.LastStall() })
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if !test.stall {
					assert.Zero(t, seen)
					assert.Zero(t, w.LastStall())
					return
				}
				require.NotZero(t, seen, "set before the first late function is called")
				assert.Equal(t, seen, w.LastStall())
				assert.Equal(t, 10*time.Minute-test.pause-DefaultStep, time.Since(seen))
			})
		})
	}
}

func TestStallWithinTick(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		var blocker, other Timer
		var seen time.Time
		block(w, &blocker, time.Second)
		w.Schedule(&other, 1, func() { seen = w.LastStall() }) // same tick
		time.Sleep(time.Minute)
		synctest.Wait()
		assert.NotZero(t, seen)
	})
}

func TestMissedTimersFireInOrderAfterPause(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		start := time.Now()
		var blocker Timer
		block(w, &blocker, time.Minute)
		timers := make([]Timer, 100)
		var got record[int]
		for i := range timers {
			w.Schedule(&timers[i], time.Duration(i+1)*time.Second, func() {
				got.add(i)
				assert.GreaterOrEqual(t, time.Since(start), time.Duration(i+1)*time.Second)
			})
		}
		time.Sleep(time.Minute + DefaultStep)
		synctest.Wait()
		order := got.take()
		assert.Len(t, order, 60, "all due timers fire at once")
		time.Sleep(time.Minute)
		synctest.Wait()
		order = append(order, got.take()...)
		require.Len(t, order, len(timers))
		assert.True(t, slices.IsSorted(order))
	})
}

// After a pause of many turns the wheel must go round once and skip the other ticks.
func TestWorkAfterLongPauseIsBounded(t *testing.T) {
	inBubble(t, time.Nanosecond, func(t *testing.T, w *Wheel) {
		var blocker Timer
		block(w, &blocker, 1000*time.Hour) // 3.6e15 ticks
		timers := make([]Timer, 1000)
		fired := 0
		for i := range timers {
			w.Schedule(&timers[i], time.Duration(i)*time.Hour+2, func() { fired++ })
		}
		time.Sleep(1000*time.Hour + 2)
		synctest.Wait()
		assert.Equal(t, len(timers), fired)
		assert.Zero(t, w.Armed())
	})
}

func TestLongPauseDoesNotFireTimersEarly(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		start := time.Now()
		var blocker, due, later Timer
		var dueAt, laterAt time.Duration
		block(w, &blocker, 3*slots*DefaultStep)
		w.Schedule(&due, 2*slots*DefaultStep, func() { dueAt = time.Since(start) })
		w.Schedule(&later, 5*slots*DefaultStep, func() { laterAt = time.Since(start) })
		time.Sleep(6 * slots * DefaultStep)
		synctest.Wait()
		assert.Equal(t, 3*slots*DefaultStep+DefaultStep, dueAt)
		assert.Equal(t, 5*slots*DefaultStep, laterAt)
	})
}
