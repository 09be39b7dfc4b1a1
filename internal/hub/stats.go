package hub

import (
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Stats are counts since the hub was made, and the present numbers of mirrors and
// sinks.
type Stats struct {
	Rooms   int // mirrors, including those that linger
	Sinks   int // subscriptions
	Stale   int // mirrors that may have missed something
	Waiting int // buffered events of all mirrors

	Events              map[store.EventType]uint64 // events applied
	Duplicates          uint64                     // events that the mirror had already applied
	Early               uint64                     // early events
	Strays              uint64                     // events of rooms without a mirror
	Unreadable          uint64                     // events that could not be decoded
	Overflows           uint64                     // times that an event buffer was full
	ListenerDisconnects uint64                     // connections of the listener that ended

	Updates         map[string]uint64 // updates by type; one update to many sinks counts once
	Delivered       uint64            // deliveries: updates counted once per sink
	Repairs         uint64            // updates that repaired a missed change
	Unconfirmed     uint64            // members that became unconfirmed
	LeftUnconfirmed uint64            // unconfirmed members that left according to their owners
	Snapshots       map[Cause]uint64  // snapshots that became the mirror, by cause
	Discarded       uint64            // snapshots that were read and could not be used
	Failures        uint64            // snapshots that could not be read
}

// counters are the sources of Stats.
type counters struct {
	joined, replaced, left, states, metas, disconnected atomic.Uint64

	joinUpdates, leaveUpdates, stateUpdates, metadataUpdates, disconnectUpdates, reconnectUpdates, delivered atomic.Uint64

	duplicates, early, strays, unreadable, overflows, listenerDisconnects atomic.Uint64

	repairs, unconfirmed, leftUnconfirmed, discarded, failures atomic.Uint64

	snapshots [numCauses]atomic.Uint64
}

// countEvent counts an applied event.
func (c *counters) countEvent(t store.EventType) {
	switch t {
	case store.Joined:
		c.joined.Add(1)
	case store.Replaced:
		c.replaced.Add(1)
	case store.Left:
		c.left.Add(1)
	case store.State:
		c.states.Add(1)
	case store.Meta:
		c.metas.Add(1)
	case store.Disconnected:
		c.disconnected.Add(1)
	}
}

// countUpdate counts an update that goes to the given number of sinks.
func (c *counters) countUpdate(u *wire.Update, sinks int) {
	switch u.Type {
	case wire.UpdateJoin:
		c.joinUpdates.Add(1)
	case wire.UpdateLeave:
		c.leaveUpdates.Add(1)
	case wire.UpdateState:
		c.stateUpdates.Add(1)
	case wire.UpdateMetadata:
		c.metadataUpdates.Add(1)
	case wire.UpdateDisconnect:
		c.disconnectUpdates.Add(1)
	case wire.UpdateReconnect:
		c.reconnectUpdates.Add(1)
	}
	c.delivered.Add(uint64(sinks))
	if u.Repair {
		c.repairs.Add(1)
	}
}

// Stats returns the counts. It locks every mirror for a moment.
func (h *Hub) Stats() Stats {
	c := &h.counters
	s := Stats{
		Events: map[store.EventType]uint64{
			store.Joined: c.joined.Load(), store.Replaced: c.replaced.Load(), store.Left: c.left.Load(),
			store.State: c.states.Load(), store.Meta: c.metas.Load(), store.Disconnected: c.disconnected.Load(),
		},
		Duplicates: c.duplicates.Load(), Early: c.early.Load(), Strays: c.strays.Load(), Unreadable: c.unreadable.Load(),
		Overflows: c.overflows.Load(), ListenerDisconnects: c.listenerDisconnects.Load(),
		Updates: map[string]uint64{
			wire.UpdateJoin: c.joinUpdates.Load(), wire.UpdateLeave: c.leaveUpdates.Load(), wire.UpdateState: c.stateUpdates.Load(),
			wire.UpdateMetadata: c.metadataUpdates.Load(), wire.UpdateDisconnect: c.disconnectUpdates.Load(),
			wire.UpdateReconnect: c.reconnectUpdates.Load(),
		},
		Delivered: c.delivered.Load(), Repairs: c.repairs.Load(), Unconfirmed: c.unconfirmed.Load(),
		LeftUnconfirmed: c.leftUnconfirmed.Load(),
		Snapshots:       make(map[Cause]uint64, numCauses), Discarded: c.discarded.Load(), Failures: c.failures.Load(),
	}
	for cause := CauseVerify; cause < numCauses; cause++ {
		if n := c.snapshots[cause].Load(); n > 0 {
			s.Snapshots[cause] = n
		}
	}
	for _, m := range h.allMirrors() {
		m.mu.Lock()
		s.Rooms++
		s.Sinks += len(m.sinks.list)
		s.Waiting += len(m.early.list) + len(m.pending.list)
		if m.stale() {
			s.Stale++
		}
		m.mu.Unlock()
	}
	return s
}
