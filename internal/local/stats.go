package local

import (
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/store"
)

type counters struct {
	batches, ops, retries, rejoined, reconciles, orphans atomic.Uint64
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
	Superseded                    uint64 // states left out because a newer one came within the interval
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
		LeftAsked:  r.stats.leaves[store.CauseLeft].Load(),
		LeftClosed: r.stats.leaves[store.CauseClosed].Load(),
		LeftSilent: r.stats.leaves[store.CauseSilent].Load(),
		Superseded: r.stats.superseded.Load(),
		Late:       r.stats.late.Counts(),
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
