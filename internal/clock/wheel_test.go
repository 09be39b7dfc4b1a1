package clock

import (
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// record collects values from functions of timers. synctest.Wait orders those functions
// before the test's next step, but nothing orders the test's steps before them. So
// record has a lock.
type record[T any] struct {
	mu  sync.Mutex // guards got
	got []T
}

func (r *record[T]) add(v T) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, v)
}

// take returns the values since the last take.
func (r *record[T]) take() []T {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := r.got
	r.got = nil
	return got
}

// inBubble runs test in a synctest bubble with a started wheel.
func inBubble(t *testing.T, step time.Duration, test func(t *testing.T, w *Wheel)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWheel(step)
		w.Start()
		defer w.Stop()
		test(t, w)
	})
}

func TestFiresNeverEarlyAndAtMostOneStepLate(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		time.Sleep(17 * time.Millisecond) // between two ticks
		start := time.Now()
		afters := []time.Duration{
			-time.Second, 0, 1, time.Millisecond, 33 * time.Millisecond, 34 * time.Millisecond, 50 * time.Millisecond,
			time.Second, 10 * time.Second, slots * DefaultStep, slots*DefaultStep + 1, time.Hour,
		}
		timers := make([]Timer, len(afters))
		fired := make([]time.Duration, len(afters)) // read once all have fired
		for i, after := range afters {
			w.Schedule(&timers[i], after, func() { fired[i] = time.Since(start) })
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		for i, after := range afters {
			want := max(after, 0)
			assert.GreaterOrEqual(t, fired[i], want, "after %v", after)
			assert.LessOrEqual(t, fired[i], want+DefaultStep, "after %v", after)
			assert.NotZero(t, fired[i], "after %v", after)
		}
		assert.Zero(t, w.Armed())
		assert.Zero(t, w.LastStall())
	})
}

func TestScheduleDuringTickFiresAtLaterTick(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		start := time.Now()
		var a, b Timer
		var at record[time.Duration]
		w.Schedule(&a, time.Second, func() {
			// The present tick is being handled, so 0 means the next one.
			w.Schedule(&b, 0, func() { at.add(time.Since(start)) })
		})
		time.Sleep(2 * time.Second)
		synctest.Wait()
		assert.Equal(t, []time.Duration{time.Second + DefaultStep}, at.take())
	})
}

func TestScheduleReplacesEarlierSchedule(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		start := time.Now()
		var timer Timer
		var got record[string]
		w.Schedule(&timer, time.Second, func() { got.add("first") })
		w.Schedule(&timer, 3*time.Second, func() { got.add("put off") })
		assert.Equal(t, 1, w.Armed())
		time.Sleep(2 * time.Second)
		synctest.Wait()
		assert.Empty(t, got.take())
		w.Schedule(&timer, 100*time.Millisecond, func() { got.add("brought forward") })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		assert.Equal(t, []string{"brought forward"}, got.take())
		assert.Equal(t, 12*time.Second, time.Since(start))
	})
}

func TestCancel(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		var timer Timer
		assert.False(t, w.Cancel(&timer), "never armed")
		var fired atomic.Int32
		w.Schedule(&timer, time.Second, func() { fired.Add(1) })
		assert.True(t, w.Cancel(&timer))
		assert.False(t, w.Cancel(&timer), "twice")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		assert.Zero(t, fired.Load())
		w.Schedule(&timer, time.Second, func() { fired.Add(1) })
		time.Sleep(2 * time.Second)
		synctest.Wait()
		assert.EqualValues(t, 1, fired.Load())
		assert.False(t, w.Cancel(&timer), "has fired")
	})
}

func TestTimersOfOneTickCancelEachOther(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		var first, second, third Timer
		var got record[string]
		w.Schedule(&first, time.Second, func() {
			got.add("first")
			assert.True(t, w.Cancel(&second), "due and not yet called")
			w.Schedule(&third, time.Second, func() { got.add("third, later") })
			w.Schedule(&first, 500*time.Millisecond, func() { got.add("first again") })
		})
		w.Schedule(&second, time.Second, func() { got.add("second") })
		w.Schedule(&third, time.Second, func() { got.add("third") })
		time.Sleep(3 * time.Second)
		synctest.Wait()
		assert.Equal(t, []string{"first", "first again", "third, later"}, got.take())
		assert.Zero(t, w.Armed())
	})
}

func TestFiresInOrderWithinAndBetweenTicks(t *testing.T) {
	inBubble(t, DefaultStep, func(t *testing.T, w *Wheel) {
		timers := make([]Timer, 300)
		var got record[int]
		for i := range timers {
			w.Schedule(&timers[i], time.Duration(i/3)*time.Second, func() { got.add(i) })
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		order := got.take()
		require.Len(t, order, len(timers))
		assert.True(t, slices.IsSorted(order))
	})
}

func TestIdleWheelDoesNotTick(t *testing.T) {
	inBubble(t, time.Nanosecond, func(t *testing.T, w *Wheel) {
		// At one tick per nanosecond this would not end if the wheel ticked.
		time.Sleep(1000 * time.Hour)
		synctest.Wait()
		var timer Timer
		start := time.Now()
		var fired record[time.Duration]
		w.Schedule(&timer, 5, func() { fired.add(time.Since(start)) })
		time.Sleep(1000 * time.Hour)
		synctest.Wait()
		assert.Equal(t, []time.Duration{5}, fired.take())
		assert.Zero(t, w.LastStall(), "an idle wheel does not stall")
	})
}

func TestScheduleBeforeStartAndAfterStop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWheel(DefaultStep)
		var timer Timer
		var fired atomic.Int32
		w.Schedule(&timer, time.Second, func() { fired.Add(1) })
		time.Sleep(time.Hour)
		assert.Zero(t, fired.Load(), "not started")
		w.Start()
		w.Start()
		time.Sleep(DefaultStep)
		synctest.Wait()
		assert.EqualValues(t, 1, fired.Load())
		w.Schedule(&timer, time.Second, func() { fired.Add(1) })
		w.Stop()
		w.Stop()
		time.Sleep(time.Hour)
		assert.EqualValues(t, 1, fired.Load(), "stopped")
		assert.Equal(t, 1, w.Armed())
		w.Start()
		time.Sleep(DefaultStep)
		synctest.Wait()
		assert.EqualValues(t, 2, fired.Load(), "started again")
		assert.Zero(t, w.LastStall(), "a stopped wheel does not stall")
		w.Stop()
	})
}

func TestStopWaitsForRunningFunction(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := NewWheel(DefaultStep)
		w.Start()
		var first, second Timer
		var done, next atomic.Bool
		w.Schedule(&first, DefaultStep, func() { time.Sleep(time.Minute); done.Store(true) })
		w.Schedule(&second, DefaultStep, func() { next.Store(true) })
		time.Sleep(time.Second)
		w.Stop()
		assert.True(t, done.Load())
		assert.False(t, next.Load(), "no timer fires after Stop was called")
	})
}

func TestFarFuture(t *testing.T) {
	inBubble(t, time.Second, func(t *testing.T, w *Wheel) {
		time.Sleep(time.Minute)
		var timer Timer
		w.Schedule(&timer, math.MaxInt64, func() { t.Error("fired 292 years early") })
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		assert.True(t, w.Cancel(&timer))
	})
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	w := NewWheel(time.Millisecond)
	w.Start()
	var fired atomic.Int64
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), 1))
			timers := make([]Timer, 64)
			for range 5000 {
				timer := &timers[rnd.IntN(len(timers))]
				if rnd.IntN(3) == 0 {
					w.Cancel(timer)
					continue
				}
				w.Schedule(timer, time.Duration(rnd.IntN(3000))*time.Microsecond, func() { fired.Add(1) })
			}
		})
	}
	wg.Wait()
	require.Eventually(t, func() bool { return w.Armed() == 0 }, 2*time.Minute, time.Millisecond)
	w.Stop()
	assert.Positive(t, fired.Load())
}
