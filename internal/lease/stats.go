package lease

import (
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
)

// Stats is what a Lease has done so far.
type Stats struct {
	Renewals    uint64        // that succeeded
	Failures    uint64        // renewals that failed
	LastRenewal time.Duration // age of the last success; -1: none yet
	Buried      uint64        // incarnations that this server declared dead
	Reaped      uint64        // entries of the dead that this server ended
	// Late is how long after the lease of a server that this one declared dead
	// had run out each of its entries was ended, if this server did that, too.
	Late histogram.Counts
	// Trips is how long beats took from here to Redis and back over the listener.
	Trips      histogram.Counts
	Reborn     uint64        // new incarnations after the first
	Deaf       uint64        // calls of OnDeaf
	Patient    bool          // may judge others now
	PatientIn  time.Duration // at the earliest; 0 does not promise Patient
	ClockSteps uint64        // disagreements between Redis's clock and the monotonic one
}

// tally holds the counters behind Stats.
type tally struct {
	mu       sync.Mutex // guards the fields below
	renewals uint64
	failures uint64
	last     time.Time
	buried   uint64
	reaped   uint64
	reborn   uint64
}

// add changes the counters under the lock.
func (t *tally) add(change func(*tally)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(t)
}

// Stats returns the counters. They are not of one single moment.
func (l *Lease) Stats() Stats {
	now := time.Now()
	_, patient := l.patience.judge(now)
	s := Stats{
		LastRenewal: -1,
		Patient:     patient,
		PatientIn:   l.patience.left(now),
		ClockSteps:  l.patience.stepCount(),
		Deaf:        l.beats.deafCount(),
		Late:        l.reaper.late.Counts(),
		Trips:       l.beats.trips.Counts(),
	}
	l.tally.add(func(t *tally) {
		s.Renewals, s.Failures = t.renewals, t.failures
		s.Buried, s.Reaped, s.Reborn = t.buried, t.reaped, t.reborn
		if !t.last.IsZero() {
			s.LastRenewal = now.Sub(t.last)
		}
	})
	return s
}
