package hub

import (
	"context"
	"fmt"
	"time"
)

// Watch lets the sink follow the room. Ready is called once with a view of
// the room, before the first Deliver and as Deliver is: it must not block, and
// must not call the hub. A sink that watches the room already gets a new view
// and is not added twice.
//
// The first watcher of a room on this server waits for the subscription and
// the snapshot; further ones cost Redis nothing. Where Redis does not answer,
// a room that is mirrored already is shown as stale. For one that is not,
// Watch returns an error that wraps the context's, and the sink is not added.
func (h *Hub) Watch(ctx context.Context, room string, sink Sink, ready func(View)) error {
	m, err := h.hold(room)
	if err != nil {
		return err
	}
	added, err := m.watch(ctx, sink, ready)
	if !added {
		h.release(m) // a sink that is there holds a reference of its own
	}
	return err
}

// watch adds the sink once there is something to show it.
func (m *mirror) watch(ctx context.Context, sink Sink, ready func(View)) (added bool, err error) {
	patience := time.NewTimer(inFlight)
	defer patience.Stop()
	patient := true
	for {
		if err := ctx.Err(); err != nil {
			return false, fmt.Errorf("mesh: watching a room: %w", err)
		}
		m.mu.Lock()
		settled := m.settled(time.Now())
		if m.live && (settled || !patient) {
			added = m.sinks.add(sink)
			ready(m.view(!settled))
			m.mu.Unlock()
			return added, nil
		}
		changed := m.waitChange()
		m.mu.Unlock()
		select {
		case <-changed:
		case <-patience.C:
			patient = false
			m.checkExpected()
		case <-ctx.Done():
		case <-m.hub.ctx.Done():
			return false, ErrStopped
		}
	}
}

// checkExpected has the mirror compared if what this server wrote has not
// come back yet: the event may be lost.
func (m *mirror) checkExpected() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.stale() && !m.fulfilled(time.Time{}) {
		m.hub.suspects.add(m, time.Now())
	}
}

// Unwatch ends what Watch began. It reports whether the sink watched the
// room; once it has returned, the sink is told nothing more of it.
func (h *Hub) Unwatch(room string, sink Sink) bool {
	m := h.mirror(room)
	if m == nil {
		return false
	}
	m.mu.Lock()
	removed := m.sinks.remove(sink)
	m.mu.Unlock()
	if removed {
		h.release(m)
	}
	return removed
}

// View returns a view of the room. It is false where this server does not
// mirror the room, or something may have been missed: Redis has to be asked
// then. It waits, at most 250 ms, for events that are known to be on their way.
func (h *Hub) View(room string) (View, bool) {
	m := h.mirror(room)
	if m == nil {
		return View{}, false
	}
	var patience *time.Timer
	for {
		m.mu.Lock()
		if m.closed || m.stale() {
			m.mu.Unlock()
			return View{}, false
		}
		if m.settled(time.Now()) {
			v := m.view(false)
			m.mu.Unlock()
			return v, true
		}
		changed := m.waitChange()
		m.mu.Unlock()
		if patience == nil {
			patience = time.NewTimer(inFlight)
			defer patience.Stop()
		}
		select {
		case <-changed:
		case <-patience.C:
			m.checkExpected()
			return View{}, false
		case <-h.ctx.Done():
			return View{}, false
		}
	}
}

// StaleView returns what is known of the room, in order or not, for when
// Redis does not answer. It never waits; false: nothing is known.
func (h *Hub) StaleView(room string) (View, bool) {
	m := h.mirror(room)
	if m == nil {
		return View{}, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed || !m.live {
		return View{}, false
	}
	return m.view(!m.settled(time.Now())), true
}

// Watching reports whether any room is mirrored.
func (h *Hub) Watching() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.mirrors) > 0
}

// Watches reports whether the room is mirrored.
func (h *Hub) Watches(room string) bool { return h.mirror(room) != nil }
