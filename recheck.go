package mesh

import "time"

// recheckPause is the shortest time between two rechecks of one subscription.
// Changes that come faster are answered by one recheck. The first one after a pause
// is at once.
const recheckPause = 100 * time.Millisecond

// recheck is the asking of a subscription's guards again.
type recheck struct{ again bool } // something has changed since they were asked; guarded by watchers.mu

// recheck asks again about a viewer's subscriptions: its metadata has changed.
func (w *watchers) recheck(viewer string) { w.recheckRoom(viewer, "") }

// recheckRoom asks again about a viewer's subscriptions to a room ("": to all
// rooms). Nothing is delivered to each of them until there is a verdict about it.
// It does not block.
func (w *watchers) recheckRoom(viewer, room string) {
	if viewer == "" {
		return // the app itself, which no guard is asked about
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return
	}
	for s := range w.byViewer[viewer] {
		if room == "" || s.room == room {
			w.recheckOne(s)
		}
	}
}

// recheckOne asks again about a subscription. The caller holds mu, and the
// watchers are not closed.
func (w *watchers) recheckOne(s *subscription) {
	s.hold()
	asking := w.byViewer[s.viewer][s]
	if asking != nil {
		asking.again = true
		return
	}
	asking = &recheck{}
	w.byViewer[s.viewer][s] = asking
	w.work.Go(func() { w.ask(s, asking) })
}

// ask runs until the subscription has a verdict that is up to date.
func (w *watchers) ask(s *subscription, r *recheck) {
	asking := repeated{name: callbackGuard, limit: w.n.verdicts.guardTimeout, log: w.n.calls.log}
	defer asking.end()
	for {
		w.rest(s, r)
		d, err := w.n.sees(w.life, s.viewer, question{room: s.room})
		again := w.settle(s, r, d.owed, err)
		if again {
			err = asking.again(w.life)
		}
		if w.life.Err() != nil {
			err = ErrClosed // not the guard's word
		}
		switch {
		case err != nil:
			w.end(s, err)
			return
		case again:
		case !d.owed || s.isOver() || !pause(w.life, failedFor):
			return
		default: // the guards could not be asked a second ago
			asking.end()
		}
	}
}

// settle lets the events through that were held back if the guards have said yes
// and nothing has changed since they were asked. It reports whether something has.
func (w *watchers) settle(s *subscription, r *recheck, owed bool, err error) (again bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r.again {
		return true
	}
	if set := w.byViewer[s.viewer]; set[s] == r && !owed {
		set[s] = nil
	}
	if err == nil {
		s.release()
	}
	return false
}

// rest keeps recheckPause between the rechecks of a subscription. What changes
// until it returns is part of the recheck that follows.
func (w *watchers) rest(s *subscription, r *recheck) {
	w.mu.Lock()
	wait := recheckPause - time.Since(s.rechecked)
	w.mu.Unlock()
	if wait > 0 && s.viewer != "" && !w.n.verdicts.current(s.viewer, w.n.member(s.viewer), s.room) {
		pause(w.life, wait)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.rechecked, r.again = time.Now(), false
}
