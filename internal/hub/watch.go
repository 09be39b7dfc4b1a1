package hub

import (
	"context"
	"fmt"
	"time"
)

// Watch subscribes the sink to the room. ready is called once with a view of the
// room, before the first Deliver. Like Deliver, it must not block and must not call
// the hub. A sink that already watches the room gets a new view and is not added a
// second time.
//
// The first watcher of a room on this server waits for the subscription and the
// snapshot. Further watchers cost Redis nothing. If Redis does not answer, a
// mirrored room is shown as stale. If the room is not mirrored, Watch returns an
// error that wraps the context's error, and the sink is not added; see WatchNow.
func (h *Hub) Watch(ctx context.Context, room string, sink Sink, ready func(View)) error {
	m, err := h.acquire(room)
	if err != nil {
		return err
	}
	added, err := m.watch(ctx, sink, ready)
	if !added {
		h.release(m) // a sink that was there already has its own reference
	}
	return err
}

// watch adds the sink when the room can be shown.
func (m *mirror) watch(ctx context.Context, sink Sink, ready func(View)) (added bool, err error) {
	upToDate, err := m.lockReady(ctx)
	if err != nil {
		return false, err
	}
	defer m.mu.Unlock()
	added = m.sinks.add(sink)
	ready(m.view(!upToDate))
	return added, nil
}

// lockReady waits until the room can be shown, and returns with m.mu held. upToDate
// says that nothing can have been missed.
func (m *mirror) lockReady(ctx context.Context) (upToDate bool, err error) {
	var timeout *time.Timer
	timedOut := false
	for {
		if err := ctx.Err(); err != nil {
			return false, fmt.Errorf("mesh: watching a room: %w", err)
		}
		m.mu.Lock()
		upToDate := m.upToDate(time.Now())
		if m.live && (upToDate || timedOut) {
			return upToDate, nil
		}
		changed := m.nextChange()
		m.mu.Unlock()
		if timeout == nil {
			timeout = time.NewTimer(deliveryDelay)
			defer timeout.Stop()
		}
		select {
		case <-changed:
		case <-timeout.C:
			timedOut = true
			m.checkExpected()
		case <-ctx.Done():
		case <-m.hub.ctx.Done():
			return false, ErrStopped
		}
	}
}

// Load mirrors the room until release is called, and waits like Watch until the room
// can be shown. The caller must call release. upToDate says that a view would not be
// stale, so that Watch need not wait. The error wraps that of ctx, or is ErrStopped.
func (h *Hub) Load(ctx context.Context, room string) (release func(), upToDate bool, err error) {
	m, err := h.acquire(room)
	if err != nil {
		return func() {}, false, err
	}
	upToDate, err = m.lockReady(ctx)
	if err == nil {
		m.mu.Unlock()
	}
	return func() { h.release(m) }, upToDate, err
}

// WatchNow is like Watch and does not wait for Redis. The view is stale if something
// may have been missed. If the room has not been read yet, the view is empty. When
// the room has been read, the sink gets the listed members as repairs.
func (h *Hub) WatchNow(room string, sink Sink, ready func(View)) error {
	m, err := h.acquire(room)
	if err != nil {
		return err
	}
	m.mu.Lock()
	added := m.sinks.add(sink)
	ready(m.view(!m.upToDate(time.Now())))
	m.mu.Unlock()
	if !added {
		h.release(m)
	}
	return nil
}

// checkExpected queues a comparison if an event of this server's own write has not
// arrived. The event may be lost.
func (m *mirror) checkExpected() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.stale() && !m.reachedExpected(time.Time{}) {
		m.hub.toCompare.add(m.room, time.Now())
	}
}

// Unwatch ends a subscription of Watch or WatchNow. It reports whether the sink
// watched the room. After it has returned, the sink gets no more updates of the
// room.
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

// View returns a view of the room. It returns false if this server does not mirror
// the room or may have missed something; the caller must then ask Redis. View waits
// up to 250 ms for events that are known to be on their way.
func (h *Hub) View(room string) (View, bool) {
	m := h.mirror(room)
	if m == nil {
		return View{}, false
	}
	var timeout *time.Timer
	for {
		m.mu.Lock()
		if m.closed || m.stale() {
			m.mu.Unlock()
			return View{}, false
		}
		if m.upToDate(time.Now()) {
			v := m.view(false)
			m.mu.Unlock()
			return v, true
		}
		changed := m.nextChange()
		m.mu.Unlock()
		if timeout == nil {
			timeout = time.NewTimer(deliveryDelay)
			defer timeout.Stop()
		}
		select {
		case <-changed:
		case <-timeout.C:
			m.checkExpected()
			return View{}, false
		case <-h.ctx.Done():
			return View{}, false
		}
	}
}

// Whole returns a view of all members of the room as of one Seq, regardless of
// Config.Listed. It mirrors the room for the time of the call, and waits like Watch. The
// error wraps that of ctx, or is ErrStopped. The Present of the view is empty.
func (h *Hub) Whole(ctx context.Context, room string) (View, error) {
	m, err := h.acquire(room)
	if err != nil {
		return View{}, err
	}
	defer h.release(m)
	upToDate, err := m.lockReady(ctx)
	if err != nil {
		return View{}, err
	}
	defer m.mu.Unlock()
	l := Listing{Total: m.members.len(), Users: m.numbers.shown().Users, Stale: !upToDate}
	l.Epoch, l.Seq = m.past.shown()
	return View{Listing: l, encoded: newEncodedView(m.members.list, 0)}, nil
}

// StaleView returns the mirror's view of the room even if it is stale, for use while
// Redis does not answer. It never waits. It returns false if the room is unknown.
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
	return m.view(!m.upToDate(time.Now())), true
}

// view returns a view of the mirror. The caller holds m.mu.
func (m *mirror) view(stale bool) View {
	return View{Listing: m.listing(stale, ""), encoded: m.members.encodedView(m.hub.cfg.Listed)}
}

// listing returns a listing of the mirror. If conn is a member, it is always listed.
// The caller holds m.mu.
func (m *mirror) listing(stale bool, conn string) Listing {
	limit := m.hub.cfg.Listed
	l := Listing{Total: m.members.len(), Stale: stale, Present: m.members.encodedList(limit, conn)}
	l.Bounded = limit > 0 && l.Total > limit
	l.Users = m.numbers.shown().Users
	l.Epoch, l.Seq = m.past.shown()
	return l
}

// Watching reports whether any room is mirrored.
func (h *Hub) Watching() bool {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return len(h.mirrors) > 0
}

// Watches reports whether the room is mirrored.
func (h *Hub) Watches(room string) bool { return h.mirror(room) != nil }
