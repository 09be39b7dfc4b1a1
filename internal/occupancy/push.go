package occupancy

import "time"

// update returns the numbers as an update.
func (r *room) update() *Update {
	if r.current == nil {
		r.current = r.newUpdate(r.stale)
	}
	return r.current
}

func (r *room) newUpdate(stale bool) *Update {
	return &Update{
		Room: r.name, Connections: r.numbers.connections, Users: r.numbers.users,
		Epoch: r.numbers.epoch, Seq: r.numbers.shownSeq, Stale: stale, number: r.rooms.updates.Add(1),
	}
}

// mayPush reports whether there is something to push, and the numbers are either stale
// or as they were read last. In between they may become stale at any moment, or a reading
// is on its way.
func (r *room) mayPush() bool {
	if !r.stale && (r.stage != stageIdle || r.troubleAt != 0) {
		return false
	}
	return r.shown != nil && (r.mixed || !r.isShownBy(r.shown))
}

// isShownBy reports whether an update has the present numbers. It makes no update, because
// most events do not change the numbers.
func (r *room) isShownBy(u *Update) bool {
	return u.Connections == r.numbers.connections && u.Users == r.numbers.users && u.Stale == r.stale
}

// pushTime returns the time from which on the numbers may be pushed.
func (r *room) pushTime() time.Duration {
	interval := r.rooms.interval(r.name)
	at := time.Duration(1)
	if r.pushedAt != 0 {
		at = r.pushedAt + interval
	}
	if r.emptyAt != 0 {
		at = max(at, r.emptyAt+interval)
	}
	return at
}

// push delivers the numbers to the watchers that have others. Usually it changes nothing
// in the map, because all of them have the update that was shown last.
func (r *room) push(now time.Duration) {
	u, delivered := r.update(), 0
	for w, last := range r.watchers {
		switch last {
		case waiting:
			continue // Watch answers it
		case nil:
			last = r.shown
		default:
			r.watchers[w] = nil
		}
		if !last.same(u) {
			w.Deliver(u)
			delivered++
		}
	}
	r.shown, r.mixed = u, false
	if delivered > 0 {
		r.pushedAt = now
		r.rooms.counters.pushes.Add(1)
		r.rooms.counters.delivered.Add(uint64(delivered))
	}
}

// answer gives a watcher its first numbers, or newer ones if it watches the room again.
func (r *room) answer(w Watcher, stale bool) *Update {
	u := r.update()
	if stale && !u.Stale {
		u = r.newUpdate(true)
		r.current = nil // a later update has a higher number
	}
	if r.watchers[w] == waiting {
		r.answered++
	}
	switch {
	case r.answered == 1:
		r.watchers[w], r.shown, r.mixed = nil, u, false
	case r.shown.same(u):
		r.watchers[w] = nil
	default:
		r.watchers[w], r.mixed = u, true
	}
	r.settle() // others may lack these numbers
	return u
}

// remove ends a watch.
func (r *room) remove(w Watcher) {
	if r.watchers[w] != waiting {
		if r.answered--; r.answered == 0 {
			r.shown, r.mixed = nil, false
		}
	}
	delete(r.watchers, w)
}
