package store

import (
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/histogram"
)

// Stats are the figures of a Store since it was made.
type Stats struct {
	Calls uint64 // calls made
	// Failures counts calls that Redis refused or did not answer in time. It includes
	// calls that were never sent because no slot became free, and excludes calls whose
	// caller stopped waiting.
	Failures uint64
	// Took is the time that calls waited for their answer or until they were given up.
	Took histogram.Counts
	// CleanedUp counts ends on behalf of other owners. Each counts once, by the store
	// that succeeded, unless the answer of Redis was lost.
	CleanedUp CleanedUp
}

// CleanedUp counts the entries and states that CleanUp ended, by ground.
type CleanedUp struct {
	Expired uint64 // entries without a per-connection key
	States  uint64 // states without a key
	Dead    uint64 // entries of dead owners
	Kept    uint64 // kept places whose time was over, or that were removed
}

// cleanedUp holds the counters of CleanedUp.
type cleanedUp struct{ expired, states, dead, kept atomic.Uint64 }

func (c *cleanedUp) count(m CleanUpGround) {
	switch m {
	case GroundExpired:
		c.expired.Add(1)
	case GroundStateExpired:
		c.states.Add(1)
	case GroundDead:
		c.dead.Add(1)
	case GroundGraceOver, GroundRemoved:
		c.kept.Add(1)
	}
}

// Stats returns the current figures.
func (s *Store) Stats() Stats {
	return Stats{
		Calls: s.nCalls.Load(), Failures: s.nFailures.Load(), Took: s.took.Counts(),
		CleanedUp: CleanedUp{
			Expired: s.cleanedUp.expired.Load(), States: s.cleanedUp.states.Load(), Dead: s.cleanedUp.dead.Load(), Kept: s.cleanedUp.kept.Load(),
		},
	}
}
