package occupancy

// HandleSubscribed is called when Redis has confirmed the subscription to a room's
// channel. again says that it had been confirmed before, so that events may have been
// missed since.
func (rs *Rooms) HandleSubscribed(room string, again bool) {
	r := rs.room(room)
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.confirmed = true
	r.failures, r.retryAt = 0, 0
	r.serial++
	r.urgent = true
	if again {
		r.missed(rs.now())
	}
	r.settle()
}

// HandleEvent handles one message of a room's channel. It does not look at the payload,
// and locks the room only for the first event after a reading.
func (rs *Rooms) HandleEvent(room, _ string) {
	r := rs.room(room)
	if r == nil || r.dirty.Load() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirty.Store(true)
	r.settle()
}

// HandleDisconnect is called when the listener's connection has ended. Until their
// subscriptions are confirmed again and they have been read, rooms keep their last
// numbers.
func (rs *Rooms) HandleDisconnect() {
	now := rs.now()
	for _, r := range rs.all() {
		r.mu.Lock()
		r.confirmed = false
		r.missed(now)
		r.settle()
		r.mu.Unlock()
	}
}

// Resync reads every room again, because anything may have been missed. Call it whenever
// the hub compares its mirrors for such a reason, and if Redis does not answer.
func (rs *Rooms) Resync() {
	now := rs.now()
	for _, r := range rs.all() {
		r.mu.Lock()
		r.missed(now)
		r.settle()
		r.mu.Unlock()
	}
}

// ApplyRules takes in changes of the intervals of rooms.
func (rs *Rooms) ApplyRules(rooms []string) {
	for _, name := range rooms {
		if r := rs.room(name); r != nil {
			r.mu.Lock()
			r.settle()
			r.mu.Unlock()
		}
	}
}

// Rooms returns the names of all rooms, including those that linger.
func (rs *Rooms) Rooms() []string {
	rs.mu.RLock()
	defer rs.mu.RUnlock()
	names := make([]string, 0, len(rs.byName))
	for name := range rs.byName {
		names = append(names, name)
	}
	return names
}

// Watching reports whether there is any room.
func (rs *Rooms) Watching() bool {
	rs.mu.RLock()
	defer rs.mu.RUnlock()
	return len(rs.byName) > 0
}

// Watches reports whether the room is one of these.
func (rs *Rooms) Watches(room string) bool { return rs.room(room) != nil }
