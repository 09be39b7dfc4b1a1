package hub

import (
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Cause says why a snapshot was taken.
type Cause byte

// The causes of snapshots, in Stats by their names.
const (
	causeNone         Cause = iota
	CauseVerify             // "verify": before unconfirmed members are told to have left
	CauseFirst              // "first": of a room that was not mirrored
	CauseGap                // "gap": an event did not come
	CauseFork               // "fork": the tags show another history
	CauseEpoch              // "epoch": an event of another epoch
	CauseCompare            // "compare": Redis stands elsewhere
	CauseResubscribed       // "resubscribed": the same, at the first look after events did not come for a while
	CauseOverflow           // "overflow": events had to be dropped
	CauseGarbled            // "unreadable": an event could not be read
	CauseInconsistent       // "inconsistent": an event about someone who is absent
	causes
)

// String returns the name of the cause.
func (c Cause) String() string {
	names := [causes]string{
		"none", "verify", "first", "gap", "fork", "epoch", "compare", "resubscribed", "overflow", "unreadable", "inconsistent",
	}
	if c >= causes {
		return "unknown"
	}
	return names[c]
}

// RepairCauses returns the causes for which a room that is mirrored already is
// read again.
func RepairCauses() []Cause {
	var list []Cause
	for why := CauseVerify; why < causes; why++ {
		if why != CauseFirst {
			list = append(list, why)
		}
	}
	return list
}

// Stats counts what a hub did since it was made.
type Stats struct {
	Rooms   int // mirrors, those that linger included
	Sinks   int // subscriptions
	Stale   int // mirrors that may have missed something
	Waiting int // events that wait for others or for a snapshot

	Events     map[store.EventType]uint64 // applied
	Duplicates uint64                     // events seen before
	Held       uint64                     // events that came too early
	Strays     uint64                     // events of rooms nobody watches
	Garbled    uint64                     // events that could not be read
	Overflows  uint64                     // times that too many events waited
	Epochs     uint64                     // new epochs adopted from an event
	Lost       uint64                     // connections of the listener that ended

	Told        map[string]uint64 // updates, each to all sinks of its room, by type
	Delivered   uint64            // updates, counted once for each sink
	Repairs     uint64            // those of them that made good for missed ones
	Unconfirmed uint64            // members put in doubt
	Disowned    uint64            // those of them whose owners said that they have left
	Snapshots   map[Cause]uint64  // put to use, by cause
	Discarded   uint64            // snapshots that could not be used
	Failures    uint64            // snapshots that could not be read
	Compared    uint64            // positions compared with Redis
}

// counters is what Stats is made of.
type counters struct {
	joined, replaced, left, states, metas atomic.Uint64

	joinsTold, leavesTold, statesTold, delivered atomic.Uint64

	duplicates, held, strays, garbled, overflows, epochs, lost atomic.Uint64

	repairs, unconfirmed, disowned, discarded, failures, compared atomic.Uint64

	snapshots [causes]atomic.Uint64
}

// count counts an event.
func (c *counters) count(t store.EventType) {
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
	}
}

// tell counts an update that so many sinks are told.
func (c *counters) tell(u *wire.Update, sinks int) {
	switch u.Type {
	case wire.UpdateJoin:
		c.joinsTold.Add(1)
	case wire.UpdateLeave:
		c.leavesTold.Add(1)
	case wire.UpdateState:
		c.statesTold.Add(1)
	}
	c.delivered.Add(uint64(sinks))
	if u.Repair {
		c.repairs.Add(1)
	}
}

// Stats returns what the hub has counted. It looks at every mirror, each for a
// moment, as the regular comparison does.
func (h *Hub) Stats() Stats {
	c := &h.counters
	s := Stats{
		Events: map[store.EventType]uint64{
			store.Joined: c.joined.Load(), store.Replaced: c.replaced.Load(), store.Left: c.left.Load(),
			store.State: c.states.Load(), store.Meta: c.metas.Load(),
		},
		Duplicates: c.duplicates.Load(), Held: c.held.Load(), Strays: c.strays.Load(), Garbled: c.garbled.Load(),
		Overflows: c.overflows.Load(), Epochs: c.epochs.Load(), Lost: c.lost.Load(),
		Told: map[string]uint64{
			wire.UpdateJoin: c.joinsTold.Load(), wire.UpdateLeave: c.leavesTold.Load(), wire.UpdateState: c.statesTold.Load(),
		},
		Delivered: c.delivered.Load(), Repairs: c.repairs.Load(), Unconfirmed: c.unconfirmed.Load(),
		Disowned:  c.disowned.Load(),
		Snapshots: make(map[Cause]uint64, causes), Discarded: c.discarded.Load(), Failures: c.failures.Load(),
		Compared: c.compared.Load(),
	}
	for why := CauseVerify; why < causes; why++ {
		if n := c.snapshots[why].Load(); n > 0 {
			s.Snapshots[why] = n
		}
	}
	for _, m := range h.all() {
		m.mu.Lock()
		s.Rooms++
		s.Sinks += len(m.sinks.list)
		s.Waiting += len(m.held.list) + len(m.pending.list)
		if m.stale() {
			s.Stale++
		}
		m.mu.Unlock()
	}
	return s
}
