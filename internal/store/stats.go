package store

import (
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/histogram"
)

// Stats is what a Store has done since it was made.
type Stats struct {
	Calls uint64 // made
	// Failures are calls that Redis did not answer in time, or refused; those
	// included that were never made, for want of a place, and not those whose
	// caller stopped waiting.
	Failures uint64
	// Took is how long calls waited for their answer, or until they were given up.
	Took histogram.Counts
	// Reaped counts what was ended for others: once for all stores that tried,
	// unless Redis's answer was lost.
	Reaped Reaped
}

// Reaped counts entries, and states, that Reap ended, by the ground.
type Reaped struct {
	Expired uint64 // entries whose key was gone
	States  uint64 // states whose key was gone
	Dead    uint64 // entries whose owner was dead
}

// reaped is what Reaped is made of.
type reaped struct{ expired, states, dead atomic.Uint64 }

func (r *reaped) count(m ReapMode) {
	switch m {
	case ReapExpired:
		r.expired.Add(1)
	case ReapState:
		r.states.Add(1)
	case ReapDead:
		r.dead.Add(1)
	case ReapCleared: // nobody asks for it
	}
}

// Stats returns what has been counted.
func (s *Store) Stats() Stats {
	return Stats{
		Calls: s.nCalls.Load(), Failures: s.nFailures.Load(), Took: s.took.Counts(),
		Reaped: Reaped{Expired: s.reaped.expired.Load(), States: s.reaped.states.Load(), Dead: s.reaped.dead.Load()},
	}
}
