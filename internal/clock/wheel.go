// Package clock is a timing wheel: a great many timers, most of which are
// cancelled or put off before they run out, for the price of one goroutine.
// It also notices when it was itself kept from running, so that nobody is
// judged silent by a clock that stood still.
package clock

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// DefaultStep is the step of a wheel that is given none.
	DefaultStep = 50 * time.Millisecond
	// StallAfter is how late a tick has to be handled to count as a stall.
	StallAfter = 500 * time.Millisecond

	// slots is how many ticks one turn of the wheel has. A timer that is
	// further away than that is looked at once per turn (at 50 ms: every
	// 205 s), which is why there is one level of slots and not several.
	slots    = 4096
	slotMask = slots - 1
)

// Wheel runs timers in steps: each fires at the first multiple of the step,
// counted from the making of the wheel, at or after its time. So none fires
// early, and none more than one step late plus what the scheduler adds.
// Scheduling and cancelling take constant time. While no timer is armed the
// wheel does not tick. All methods are safe for concurrent use.
//
// Timers of one tick fire in the order in which they were scheduled, ticks
// in their order, except that after a pause of a whole turn (4096 steps) the
// order of what was missed is not kept.
type Wheel struct {
	step   time.Duration
	origin time.Time // tick n is due at origin + n·step
	// stalled is the time since origin at which the last stall was noticed;
	// 0: never.
	stalled atomic.Int64
	wake    chan struct{} // capacity 1: the first timer was armed

	// running guards stop and done, and serialises Start and Stop. It is held
	// while Stop waits, so nothing that a timer calls may take it.
	running sync.Mutex
	stop    chan struct{} // nil: not running
	exited  chan struct{}

	mu      sync.Mutex    // guards everything below and the fields of every Timer
	started time.Duration // of the last Start, since origin: no stall counts from before
	armed   int           // timers in slots and expired
	handled int64         // the last tick that was handled, or needed no handling
	expired list          // due, waiting for their turn on the wheel's goroutine
	slots   [slots]list
}

// NewWheel returns a wheel that ticks every step, or every DefaultStep if
// step is not positive. It fires nothing before Start.
func NewWheel(step time.Duration) *Wheel {
	if step <= 0 {
		step = DefaultStep
	}
	return &Wheel{step: step, origin: time.Now(), wake: make(chan struct{}, 1)}
}

// Start begins to fire timers, those scheduled before included. It does
// nothing if the wheel is running, and may be called again after Stop.
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
	go w.run(w.stop, w.exited) // ends at stop, awaited in Stop
}

// Stop ends the firing and waits for the call under way, if any, to return.
// Timers that are armed stay so and do not fire. It does nothing if the wheel
// is not running. It must not be called by a timer.
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

// Schedule arms t: after that time, rounded up to the next step, the wheel's
// goroutine calls fire, once. If t is armed already, that is put off (or
// brought forward) and fire replaces the old function.
//
// Fire must not block, and may call Schedule and Cancel, also for t itself.
// As with Cancel, an earlier call that was just beginning may still come.
func (w *Wheel) Schedule(t *Timer, after time.Duration, fire func()) {
	now := time.Since(w.origin)
	w.mu.Lock()
	defer w.mu.Unlock()
	if t.in == nil {
		w.arming(now)
	} else {
		t.unlink()
	}
	t.fire = fire
	t.due = max(w.dueTick(now, after), w.handled+1)
	w.slots[t.due&slotMask].push(t)
}

// Cancel disarms t and reports whether it was armed. If so, its function will
// not be called. If not, its function was never scheduled, has run, or is
// about to run: the wheel lets go of its lock before it calls, so a call may
// still begin after a Cancel that returned false. Whoever must know looks, in
// the function, at its own state under its own lock.
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

// Armed returns how many timers are armed.
func (w *Wheel) Armed() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.armed
}

// LastStall returns when the wheel last noticed that it was more than
// StallAfter late, because the process was paused or starved or a timer's
// function blocked; the zero time if never. It is set before the functions
// that are late are called. While no timer is armed nothing is noticed.
func (w *Wheel) LastStall() time.Time {
	d := w.stalled.Load()
	if d == 0 {
		return time.Time{}
	}
	return w.origin.Add(time.Duration(d))
}

// arming counts a timer that was not armed before. The first one wakes the
// wheel, which slept: the ticks that it slept through had nothing to do.
// The caller holds mu.
func (w *Wheel) arming(now time.Duration) {
	if w.armed == 0 {
		w.handled = max(w.handled, int64(now/w.step))
		select {
		case w.wake <- struct{}{}:
		default: // it has been told and has not looked yet
		}
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
