package lease

import (
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
)

// Stats are the counters of a Lease.
type Stats struct {
	Failures     uint64        // failed renewals
	LastRenewal  time.Duration // age of the last successful one; -1: none yet
	DeclaredDead uint64        // incarnations that this server declared dead
	CleanedUp    uint64        // entries of dead servers that this server ended
	// PlacesKept counts the entries of dead servers whose place is kept, as this server
	// found. It handed most of them over itself.
	PlacesKept uint64
	// Late counts, by delay, the entries that this server ended of the incarnations that
	// it declared dead. The delay is the time since the lease ran out.
	Late histogram.Counts
	// Trips counts the echoes that came back, by their round trip.
	Trips          histogram.Counts
	Reregistered   uint64        // new incarnations after the first
	ListenerResets uint64        // calls of OnNoEcho
	InContact      bool          // this server may declare others dead
	ContactIn      time.Duration // time until contact at the earliest; 0 does not promise InContact
	ClockSteps     uint64        // disagreements between the clock of Redis and the monotonic clock
}

// counters holds the counters behind Stats.
type counters struct {
	mu           sync.Mutex // guards the fields below
	failures     uint64
	last         time.Time
	declaredDead uint64
	cleanedUp    uint64
	placesKept   uint64
	reregistered uint64
}

// add changes the counters under the lock.
func (c *counters) add(change func(*counters)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(c)
}

// Stats returns the counters. They are not all of the same moment.
func (l *Lease) Stats() Stats {
	now := time.Now()
	_, inContact := l.contact.proof(now)
	s := Stats{
		LastRenewal:    -1,
		InContact:      inContact,
		ContactIn:      l.contact.remaining(now),
		ClockSteps:     l.contact.stepCount(),
		ListenerResets: l.echoes.resets(),
		Late:           l.cleaner.delays.Counts(),
		Trips:          l.echoes.trips.Counts(),
	}
	l.counters.add(func(c *counters) {
		s.Failures = c.failures
		s.DeclaredDead, s.CleanedUp, s.Reregistered = c.declaredDead, c.cleanedUp, c.reregistered
		s.PlacesKept = c.placesKept
		if !c.last.IsZero() {
			s.LastRenewal = now.Sub(c.last)
		}
	})
	return s
}
