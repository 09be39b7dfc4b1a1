package socket

import "sync/atomic"

// Stats counts what happened to all sockets that share it. The zero Stats is
// ready; its methods are safe for concurrent use.
type Stats struct {
	closes    [causes]atomic.Int64
	coalesced atomic.Int64
	dropped   atomic.Int64
	busy      atomic.Int64
	limited   atomic.Int64
	panics    atomic.Int64
}

// Counts is what a [Stats] has counted.
type Counts struct {
	Closes    map[Cause]int64 // connections that ended, by cause
	Coalesced int64           // states left out because a later one waited too
	Dropped   int64           // frames thrown away with the connection they waited for
	Busy      int64           // commands answered with EBUSY
	Limited   int64           // commands answered with ELIMIT
	Panics    int64           // panics recovered
}

// Counts returns the counters as they are now.
func (s *Stats) Counts() Counts {
	c := Counts{
		Closes:    make(map[Cause]int64, causes),
		Coalesced: s.coalesced.Load(),
		Dropped:   s.dropped.Load(),
		Busy:      s.busy.Load(),
		Limited:   s.limited.Load(),
		Panics:    s.panics.Load(),
	}
	for i := range s.closes {
		if n := s.closes[i].Load(); n > 0 {
			c.Closes[Cause(i)] = n
		}
	}
	return c
}
