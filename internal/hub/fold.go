package hub

import (
	"cmp"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// fold is a snapshot on its way to become the mirror. One that was read in
// pages shows a room as it never was: it becomes true once the events up to
// its newest record have been merged in.
type fold struct {
	began  store.Position // where the room stood when reading began
	pos    store.Position // how far events have been merged in
	high   uint64         // seq of the newest record
	roster roster
	kept   map[string]struct{} // in roster, though Redis does not have them
	era    era
	lost   bool      // Redis counts members that it does not have
	readAt time.Time // when reading began
}

func newFold(snap *store.Snapshot, e era, readAt time.Time) *fold {
	f := &fold{began: snap.Position, pos: snap.Position, era: e, lost: snap.Lost, readAt: readAt}
	for i := range snap.Records {
		r := &snap.Records[i]
		f.high = max(f.high, r.Seq)
		if old := f.roster.get(r.Conn); old == nil || old.seq <= r.Seq {
			f.roster.put(newMember(r))
		}
	}
	if !snap.Paged || f.pos.None() {
		// Read in one moment; or somebody took the position away and left the
		// records, whose numbers are of an epoch that is no more.
		f.high = min(f.high, f.pos.Seq)
	}
	return f
}

// progress is what merging came to.
type progress byte

const (
	waiting  progress = iota // for events that have not come yet
	complete                 // the fold shows the room at pos
	broken                   // what came does not fit
)

// merge takes events out of p until the fold is complete.
func (f *fold) merge(p *parcels) progress {
	if f.pos.Seq >= f.high {
		return complete
	}
	if len(p.list) == 0 {
		return waiting
	}
	epoch := f.pos.Epoch
	if epoch == "" {
		epoch = p.list[0].ev.Epoch
	}
	for i := range p.list {
		if p.list[i].ev.Epoch != epoch {
			return broken // the room began anew while it was read
		}
	}
	slices.SortStableFunc(p.list, func(a, b parcel) int { return cmp.Compare(a.ev.Seq, b.ev.Seq) })
	used := 0
	defer func() { p.drop(used) }()
	for used < len(p.list) && f.pos.Seq < f.high {
		ev := p.list[used].ev
		switch {
		case ev.Seq <= f.pos.Seq:
		case follows(f.pos, ev):
			f.pos = ev.Position()
			if old := f.roster.get(ev.Conn); (old == nil || old.seq < ev.Seq) && !f.roster.outlives(ev) {
				f.roster.change(ev)
			}
		case ev.Seq == f.pos.Seq+1:
			return broken
		default:
			return waiting
		}
		used++
	}
	if f.pos.Seq >= f.high {
		return complete
	}
	return waiting
}

// drop forgets the first n events.
func (p *parcels) drop(n int) {
	for i := range n {
		p.bytes -= p.list[i].size
	}
	p.list = slices.Delete(p.list, 0, n)
}
