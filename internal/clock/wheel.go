// Package clock is a timing wheel. It runs a very large number of timers, most of
// which are cancelled or put off before they fire, on one goroutine. It also notices
// if it was itself kept from running, so that a connection is not treated as silent
// after a stall.
package clock

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// DefaultStep is the step of a wheel if none is given.
	DefaultStep = 50 * time.Millisecond
	// StallAfter is the delay of a tick above which it counts as a stall.
	StallAfter = 500 * time.Millisecond

	// slots is the number of ticks in one turn of the wheel. A timer that is further
	// away is looked at once per turn (at 50 ms: every 205 s). That is cheap enough
	// for a single level of slots.
	slots    = 4096
	slotMask = slots - 1
)

// Wheel runs timers in steps. Each timer fires at the first multiple of the step,
// counted from the creation of the wheel, at or after its time. So no timer fires
// early, and none fires more than one step late plus the delay of the scheduler.
// Scheduling and cancelling take constant time. While no timer is armed the wheel
// does not tick. All methods are safe for concurrent use.
//
// Timers of one tick fire in the order in which they were scheduled, and ticks follow
// in order. After a pause of a whole turn (4096 steps) the order of the missed timers
// is not kept.
type Wheel struct {
	step      time.Duration
	origin    time.Time    // tick n is due at origin + n·step
	lastStall atomic.Int64 // when the last stall was noticed, since origin; 0: never
	wake      wait.Signal  // the first timer was armed

	// running guards stop and exited, and serialises Start and Stop. It is held while
	// Stop waits, so no function of a timer may take it.
	running sync.Mutex
	stop    chan struct{} // nil: not running
	exited  chan struct{}

	mu      sync.Mutex    // guards the following, and the fields of every Timer
	started time.Duration // time of the last Start, since origin; earlier stalls do not count
	armed   int           // timers in slots and expired
	handled int64         // the last tick that was handled or skipped
	expired list          // timers that are due and not yet called
	slots   [slots]list
}

// NewWheel returns a wheel that ticks every step, or every DefaultStep if step is not
// positive. No timer fires before Start.
func NewWheel(step time.Duration) *Wheel {
	if step <= 0 {
		step = DefaultStep
	}
	return &Wheel{step: step, origin: time.Now(), wake: wait.NewSignal()}
}

// Start starts the wheel. Timers that were scheduled before fire as well. Start does
// nothing if the wheel is running. It may be called again after Stop.
func (w *Wheel) Start() {
	w.running.Lock()
	defer w.running.Unlock()
	if w.stop != nil {
		return
	}
	w.mu.Lock()
	w.started = time.Since(w.origin)
	w.mu.Unlock()
	w.stop, w.exited = make(chan struct{}), make(chan struct{})
	go w.run(w.stop, w.exited) // Stop ends it and waits for it
}

// Stop stops the wheel and waits until the running function, if any, has returned.
// Armed timers stay armed and do not fire. Stop does nothing if the wheel is not
// running. A timer's function must not call it.
func (w *Wheel) Stop() {
	w.running.Lock()
	defer w.running.Unlock()
	if w.stop == nil {
		return
	}
	close(w.stop)
	<-w.exited
	w.stop, w.exited = nil, nil
}

// Schedule arms t: after the given time, rounded up to the next step, the wheel's
// goroutine calls fire once. If t is already armed, the new time and function replace
// the old ones.
//
// fire must not block. It may call Schedule and Cancel, also for t itself. As with
// Cancel, an earlier call that is just beginning may still come.
func (w *Wheel) Schedule(t *Timer, after time.Duration, fire func()) {
	now := time.Since(w.origin)
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.in == nil {
		w.noteArmed(now)
	} else {
		t.unlink()
	}
	t.fire = fire
	t.due = max(w.dueTick(now, after), w.handled+1)
	w.slots[t.due&slotMask].push(t)
}

// Cancel disarms t and reports whether it was armed. If it was, its function will not
// be called. If it was not, the function was never scheduled, has run, or is about to
// run: the wheel releases its lock before the call, so the call may still begin after
// Cancel has returned false. A function for which this matters checks its own state
// under its own lock.
func (w *Wheel) Cancel(t *Timer) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.in == nil {
		return false
	}
	t.unlink()
	t.fire = nil
	w.armed--
	return true
}

// Armed returns the number of armed timers.
func (w *Wheel) Armed() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.armed
}

// LastStall returns the time at which the wheel last noticed that it was more than
// StallAfter late, or the zero time. The process was then paused or starved, or a
// timer's function blocked. LastStall is set before the late functions are called.
// While no timer is armed, no stall is noticed.
func (w *Wheel) LastStall() time.Time {
	d := w.lastStall.Load()
	if d == 0 {
		return time.Time{}
	}
	return w.origin.Add(time.Duration(d))
}

// noteArmed counts a timer that was not armed before. The first one wakes the wheel;
// the ticks during its sleep are skipped. The caller holds mu.
func (w *Wheel) noteArmed(now time.Duration) {
	if w.armed == 0 {
		w.handled = max(w.handled, int64(now/w.step))
		w.wake.Set()
	}
	w.armed++
}

// dueTick returns the first tick at or after now + after.
func (w *Wheel) dueTick(now, after time.Duration) int64 {
	at := now + max(after, 0)
	if at < 0 { // overflow: in 292 years
		at = math.MaxInt64
	}
	tick := int64(at / w.step)
	if at%w.step > 0 {
		tick++
	}
	return tick
}

// run is the wheel's goroutine.
func (w *Wheel) run(stop <-chan struct{}, exited chan<- struct{}) {
	defer close(exited)
	sleep := time.NewTimer(time.Hour)
	defer sleep.Stop()
	for {
		pause, idle := w.untilNext()
		if idle {
			select {
			case <-stop:
				return
			case <-w.wake:
				continue
			}
		}
		sleep.Reset(pause)
		select {
		case <-stop:
			return
		case <-sleep.C:
		}
		if !w.advance(stop) {
			return
		}
	}
}

// untilNext returns the time until the next tick. idle says that no timer is armed.
func (w *Wheel) untilNext() (pause time.Duration, idle bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.armed == 0 {
		return 0, true
	}
	return w.at(w.handled+1) - time.Since(w.origin), false
}

// advance handles every tick that is due. After a long pause it goes round the wheel
// only once, however many turns were missed: all due timers of a slot fire together,
// regardless of their turn. It returns false if the wheel was stopped.
func (w *Wheel) advance(stop <-chan struct{}) bool {
	now := time.Since(w.origin)
	last := int64(now / w.step)
	w.mu.Lock()
	w.noteStall(now, w.handled+1)
	w.handled = max(w.handled, last-slots)
	w.mu.Unlock()
	for w.collect(last) {
		for {
			select {
			case <-stop:
				return false
			default:
			}
			fire := w.pop()
			if fire == nil {
				break
			}
			fire()
		}
	}
	return true
}

// collect moves the due timers of the next tick to expired. It returns false if that
// tick is after last.
func (w *Wheel) collect(last int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.handled >= last {
		return false
	}
	w.handled++
	for t := w.slots[w.handled&slotMask].head; t != nil; {
		next := t.next
		if t.due <= w.handled {
			t.unlink()
			w.expired.push(t)
		}
		t = next
	}
	return true
}

// pop disarms the first expired timer and returns its function, or nil if there is
// none. Timers leave expired one by one, so that a function can still cancel or put
// off the timers after it.
func (w *Wheel) pop() func() {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := w.expired.head
	if t == nil {
		return nil
	}
	t.unlink()
	w.armed--
	fire := t.fire
	t.fire = nil
	// The functions before this one may have taken long, or the process may have been
	// paused between them.
	w.noteStall(time.Since(w.origin), t.due)
	return fire
}

// noteStall records a stall if the tick is handled too late. Only the wheel's
// goroutine calls it, and holds mu.
func (w *Wheel) noteStall(now time.Duration, tick int64) {
	if now-max(w.at(tick), w.started) > StallAfter {
		w.lastStall.Store(int64(now))
	}
}

// at returns the time at which a tick is due, since origin.
func (w *Wheel) at(tick int64) time.Duration { return time.Duration(tick) * w.step }
