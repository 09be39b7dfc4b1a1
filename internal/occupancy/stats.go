package occupancy

import "sync/atomic"

// Stats are the present numbers of rooms and watches, and counts since Rooms was made.
type Stats struct {
	Rooms   int // rooms, including those that linger
	Watches int // pairs of a watcher and a room
	Stale   int // watched rooms whose numbers may lack changes

	Calls     uint64 // calls to Redis
	Failures  uint64 // calls that failed
	Readings  uint64 // rooms in all calls
	Pushes    uint64 // pushes; one push to many watchers counts once
	Delivered uint64 // pushes, counted once per watcher
}

// counters are the sources of Stats.
type counters struct {
	calls, failures, readings, pushes, delivered atomic.Uint64
}

// Stats returns the counts. It locks every room for a moment.
func (rs *Rooms) Stats() Stats {
	c := &rs.counters
	s := Stats{
		Calls: c.calls.Load(), Failures: c.failures.Load(), Readings: c.readings.Load(),
		Pushes: c.pushes.Load(), Delivered: c.delivered.Load(),
	}
	for _, r := range rs.all() {
		r.mu.Lock()
		s.Rooms++
		s.Watches += len(r.watchers)
		if r.stale && len(r.watchers) > 0 {
			s.Stale++
		}
		r.mu.Unlock()
	}
	return s
}
