package local

import (
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/store"
)

type counters struct {
	batches, ops, retries, rejoined, reconciles, orphans atomic.Uint64
	full, replaced, returned                             atomic.Uint64
	superseded                                           atomic.Uint64
	leaves                                               [256]atomic.Uint64 // by store.Cause
	late                                                 *histogram.Histogram
}

// Stats are counts since the start and current sizes.
type Stats struct {
	Connections, Entries, Rooms   int
	Unwritten                     int // entries and connections whose last change is not in Redis yet
	Batches, Ops, Retries         uint64
	Rejoined, Reconciles, Orphans uint64
	LeftAsked, LeftClosed         uint64
	LeftSilent                    uint64
	// Kept is the number of places that Redis keeps for connections of this server, as far
	// as the server knows. It forgets a place at the latest when the place ends.
	Kept int
	// Full counts the joins that found a room full, Replaced those that took the place of
	// another connection, and Returned those that took a kept place.
	Full, Replaced, Returned uint64
	Superseded               uint64 // states left out because a newer one came within the interval
	// Late counts, by delay, the entries that this server ended because of their silence.
	// The delay is the time from the end of the TTL until Redis had the leave.
	Late histogram.Counts
}

// Stats returns the current counts. It takes each lock only for a moment, however many
// entries there are.
func (r *Registry) Stats() Stats {
	s := Stats{
		Batches: r.stats.batches.Load(), Ops: r.stats.ops.Load(), Retries: r.stats.retries.Load(),
		Rejoined: r.stats.rejoined.Load(), Reconciles: r.stats.reconciles.Load(), Orphans: r.stats.orphans.Load(),
		LeftAsked:  r.stats.leaves[store.CauseLeft].Load() + r.stats.leaves[store.CauseRemoved].Load(),
		LeftClosed: r.stats.leaves[store.CauseClosed].Load() + r.stats.leaves[store.CauseLost].Load(),
		LeftSilent: r.stats.leaves[store.CauseSilent].Load(),
		Superseded: r.stats.superseded.Load(),
		Kept:       r.handed.size(),
		Full:       r.stats.full.Load(), Replaced: r.stats.replaced.Load(), Returned: r.stats.returned.Load(),
		Late: r.stats.late.Counts(),
	}
	r.mu.RLock()
	s.Connections = len(r.conns)
	r.mu.RUnlock()
	r.roomsMu.RLock()
	s.Rooms, s.Entries = r.inUse, r.entries
	r.roomsMu.RUnlock()
	for _, w := range r.writers {
		s.Unwritten += w.unwritten()
	}
	return s
}
