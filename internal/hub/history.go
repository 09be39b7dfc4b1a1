package hub

import (
	"strings"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// recentTags is the number of tags that a mirror keeps to recognise duplicates.
	recentTags = 64
	// maxFloors is the number of epochs for which a mirror keeps the highest seq
	// that it showed.
	maxFloors = 8
)

// history is the position of a mirror, the tags of the events before it, and the
// numbers that updates carry.
type history struct {
	pos store.Position
	// tags are the tags of the last events up to pos, without holes. The tag of
	// event s is tags[(s-base)%recentTags].
	tags   []string
	base   uint64
	floors []floor // by last use; updates carry the last one
}

// floor is the highest seq of an epoch that was shown to subscribers.
type floor struct {
	epoch string
	seq   uint64
}

// follows reports whether the event is the one right after pos.
func follows(pos store.Position, ev *store.Event) bool {
	if pos.None() {
		return beginsEpoch(ev)
	}
	return ev.Epoch == pos.Epoch && ev.Seq == pos.Seq+1 && ev.Prev == pos.Tag
}

// beginsEpoch reports whether the event is the first of its epoch. Its seq is 1,
// unless the room had members from a lost epoch with higher numbers.
func beginsEpoch(ev *store.Event) bool { return ev.Prev == "-" }

// advance moves to the event right after pos. It copies the strings that it keeps,
// because those of an event share memory with the whole message.
func (h *history) advance(ev *store.Event) {
	h.pos.Seq, h.pos.Tag = ev.Seq, strings.Clone(ev.Tag)
	if len(h.tags) < recentTags {
		h.tags = append(h.tags, h.pos.Tag)
	} else {
		h.tags[(ev.Seq-h.base)%recentTags] = h.pos.Tag
	}
	h.raiseFloor()
}

// jump moves to any position. The tags before it are then unknown.
func (h *history) jump(p store.Position) {
	h.pos = store.Position{Epoch: strings.Clone(p.Epoch), Seq: p.Seq, Tag: strings.Clone(p.Tag)}
	h.base = p.Seq
	h.tags = append(h.tags[:0], h.pos.Tag)
	h.raiseFloor()
}

// recall returns the tag of event seq of the current epoch, if it is kept.
func (h *history) recall(seq uint64) (string, bool) {
	if seq > h.pos.Seq || h.pos.Seq-seq >= uint64(len(h.tags)) {
		return "", false
	}
	return h.tags[(seq-h.base)%recentTags], true
}

// hasLeft reports whether the mirror was in that epoch and has moved to another.
func (h *history) hasLeft(epoch string) bool {
	for i := range h.floors {
		if h.floors[i].epoch == epoch {
			return epoch != h.pos.Epoch
		}
	}
	return false
}

// raiseFloor keeps the numbers that subscribers see from falling. If Redis does not
// know the room, the numbers of the last epoch stay.
func (h *history) raiseFloor() {
	if h.pos.None() {
		return
	}
	last := len(h.floors) - 1
	if last >= 0 && h.floors[last].epoch == h.pos.Epoch {
		h.floors[last].seq = max(h.floors[last].seq, h.pos.Seq)
		return
	}
	next := floor{epoch: h.pos.Epoch, seq: h.pos.Seq}
	kept := h.floors[:0]
	for _, f := range h.floors {
		if f.epoch == next.epoch {
			next.seq = max(next.seq, f.seq)
			continue
		}
		kept = append(kept, f)
	}
	if len(kept) == maxFloors {
		kept = append(kept[:0], kept[1:]...)
	}
	h.floors = append(kept, next)
}

// shown returns the epoch and seq that updates carry.
func (h *history) shown() (epoch string, seq uint64) {
	if len(h.floors) == 0 {
		return "", 0
	}
	f := h.floors[len(h.floors)-1]
	return f.epoch, f.seq
}
