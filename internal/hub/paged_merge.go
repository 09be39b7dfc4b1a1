package hub

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// pagedMerge is a snapshot that is not the mirror yet. A room that was read in
// pages is in a state that never existed. It becomes consistent when the events up
// to its newest record have been merged into it.
type pagedMerge struct {
	began       store.Position // of the room when reading began
	pos         store.Position // of the last merged event
	highest     uint64         // seq of the newest record
	members     members
	unconfirmed map[string]struct{} // members that Redis does not have
	generation  generation
	incomplete  bool      // Redis counts more members than it has
	readAt      time.Time // when reading began
}

func newPagedMerge(snap *store.Snapshot, g generation, readAt time.Time, users bool) *pagedMerge {
	p := &pagedMerge{began: snap.Position, pos: snap.Position, generation: g, incomplete: snap.Incomplete, readAt: readAt}
	for i := range snap.Records {
		r := &snap.Records[i]
		if !users {
			r.User = ""
		}
		p.highest = max(p.highest, r.Seq)
		if old := p.members.get(r.Conn); old == nil || old.seq <= r.Seq {
			p.members.put(newMember(r), r.KeptUntil)
		}
	}
	if !snap.Paged || p.pos.None() {
		// Either the room was read in one step, or the position was deleted and the
		// records remained. Their numbers then belong to an epoch that is over.
		p.highest = min(p.highest, p.pos.Seq)
	}
	return p
}

// progress is the result of a merge.
type progress byte

const (
	waiting  progress = iota // more events are needed
	complete                 // the members are those of the room at pos
	broken                   // the events do not fit
)

// merge takes events out of the buffer until the merge is complete.
func (p *pagedMerge) merge(buf *eventBuffer) progress {
	if p.pos.Seq >= p.highest {
		return complete
	}
	if len(buf.list) == 0 {
		return waiting
	}
	epoch := p.pos.Epoch
	if epoch == "" {
		epoch = buf.list[0].ev.Epoch
	}
	for i := range buf.list {
		if buf.list[i].ev.Epoch != epoch {
			return broken // the room began a new epoch while it was read
		}
	}
	slices.SortStableFunc(buf.list, func(a, b bufferedEvent) int { return cmp.Compare(a.ev.Seq, b.ev.Seq) })
	used := 0
	defer func() { buf.drop(used) }()
	for used < len(buf.list) && p.pos.Seq < p.highest {
		ev := buf.list[used].ev
		switch {
		case ev.Seq <= p.pos.Seq:
		case follows(p.pos, ev):
			p.pos = ev.Position()
			if old := p.members.get(ev.Conn); (old == nil || old.seq < ev.Seq) && !p.members.newerThan(ev) {
				p.members.change(ev)
			}
		case ev.Seq == p.pos.Seq+1:
			return broken
		default:
			return waiting
		}
		used++
	}
	if p.pos.Seq >= p.highest {
		return complete
	}
	return waiting
}

// addUnconfirmed lists a member that Redis does not have. If its place was kept, that has
// no end there any more.
func (p *pagedMerge) addUnconfirmed(member *Member) {
	if p.unconfirmed == nil {
		p.unconfirmed = make(map[string]struct{})
	}
	p.unconfirmed[member.Conn] = struct{}{}
	p.members.put(member, math.MaxInt64)
}
