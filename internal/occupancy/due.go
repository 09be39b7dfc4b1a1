package occupancy

import "sync"

// dueList holds the rooms whose timers have fired. A goroutine that exists only while
// there is work handles them, because a push to many watchers would delay the other
// timers of the wheel.
type dueList struct {
	mu      sync.Mutex // guards the following
	list    []*room
	running bool
	closed  bool
}

// fired hands a room whose timer has fired to the goroutine.
func (rs *Rooms) fired(r *room) {
	d := &rs.due
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	d.list = append(d.list, r)
	if !d.running {
		d.running = true
		rs.wg.Go(rs.handleDue)
	}
}

// handleDue handles due rooms until none is left.
func (rs *Rooms) handleDue() {
	for list := rs.due.take(); len(list) > 0; list = rs.due.take() {
		for _, r := range list {
			r.tick()
		}
	}
}

// take empties the list. If it was empty, the goroutine must end.
func (d *dueList) take() []*room {
	d.mu.Lock()
	defer d.mu.Unlock()
	list := d.list
	d.list = nil
	if d.closed {
		list = nil
	}
	d.running = len(list) > 0
	return list
}

// close makes the goroutine end soon. The caller waits for it.
func (d *dueList) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
}
