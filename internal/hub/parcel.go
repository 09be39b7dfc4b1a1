package hub

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// Bounds of events that wait, per mirror.
const (
	maxHeld         = 256
	maxPending      = 8192
	maxWaitingBytes = 4 << 20
)

// parcel is an event that waits.
type parcel struct {
	ev   *store.Event
	size int // of the message
	at   time.Time
}

// newParcel packs a copy of the event: most never wait, and need no memory of
// their own.
func newParcel(ev *store.Event, size int, now time.Time) parcel {
	kept := *ev
	return parcel{ev: &kept, size: size, at: now}
}

// parcels is a bounded list of events that wait.
type parcels struct {
	list  []parcel
	bytes int
}

// add reports whether there was room for the event.
func (p *parcels) add(next parcel, limit int) bool {
	if len(p.list) >= limit || p.bytes+next.size > maxWaitingBytes {
		return false
	}
	p.list = append(p.list, next)
	p.bytes += next.size
	return true
}

// take empties the list and returns what was in it.
func (p *parcels) take() []parcel {
	list := p.list
	p.clear()
	return list
}

// clear lets go of everything.
func (p *parcels) clear() { *p = parcels{} }

// numbered takes out the first event with that seq, nil if there is none.
func (p *parcels) numbered(seq uint64) *parcel {
	for i := range p.list {
		if p.list[i].ev.Seq != seq {
			continue
		}
		found := p.list[i]
		last := len(p.list) - 1
		copy(p.list[i:], p.list[i+1:])
		p.list[last] = parcel{}
		p.list = p.list[:last]
		p.bytes -= found.size
		return &found
	}
	return nil
}

// has reports whether an event with that seq waits.
func (p *parcels) has(seq uint64) bool {
	for i := range p.list {
		if p.list[i].ev.Seq == seq {
			return true
		}
	}
	return false
}

// oldest returns when the event that waits longest came; zero: none does.
func (p *parcels) oldest() time.Time {
	// Events are added as they come and taken out in any order: the first is
	// the oldest.
	if len(p.list) == 0 {
		return time.Time{}
	}
	return p.list[0].at
}
