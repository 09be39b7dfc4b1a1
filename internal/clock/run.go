package clock

import "time"

// run is the wheel's goroutine.
func (w *Wheel) run(stop <-chan struct{}, exited chan<- struct{}) {
	defer close(exited)
	sleep := time.NewTimer(time.Hour)
	defer sleep.Stop()
	for {
		wait, idle := w.untilNext()
		if idle {
			select {
			case <-stop:
				return
			case <-w.wake:
				continue
			}
		}
		sleep.Reset(wait)
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

// untilNext returns how long it is until the next tick, or that there is no
// need for one.
func (w *Wheel) untilNext() (wait time.Duration, idle bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.armed == 0 {
		return 0, true
	}
	return w.at(w.handled+1) - time.Since(w.origin), false
}

// advance handles every tick that is due. After a long pause it goes round
// the wheel once, however many turns were missed: a slot's timers that are
// due by now fire whichever turn they were for. It returns false if it was
// stopped.
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

// collect handles the next tick, if it is not after last: it moves its timers
// to expired.
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

// pop disarms the first expired timer and returns its function, nil if there
// is none. Timers leave expired one by one, so that one of them can still
// cancel or put off the others.
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
	// The functions before this one may have taken long, or the process been
	// paused between them.
	w.noteStall(time.Since(w.origin), t.due)
	return fire
}

// noteStall records a stall if the tick is being handled too late. The caller
// holds mu and is the wheel's goroutine.
func (w *Wheel) noteStall(now time.Duration, tick int64) {
	if now-max(w.at(tick), w.started) > StallAfter {
		w.stalled.Store(int64(now))
	}
}

// at returns when a tick is due, counted from origin.
func (w *Wheel) at(tick int64) time.Duration { return time.Duration(tick) * w.step }
