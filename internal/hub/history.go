package hub

import (
	"strings"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// recentTags is how many events back a mirror knows a repeated one.
	recentTags = 64
	// keptFloors is for how many epochs a mirror remembers how far it has
	// counted to its subscribers.
	keptFloors = 8
)

// history is where a mirror stands, how it came there, and what it has
// numbered updates with.
type history struct {
	pos store.Position
	// tags are those of the last events up to pos, without a hole: the tag of
	// event s is tags[(s-base)%recentTags].
	tags   []string
	base   uint64
	floors []floor // by last use; the last one is what updates carry
}

// floor is the highest seq that was shown to subscribers in an epoch.
type floor struct {
	epoch string
	seq   uint64
}

// follows reports whether the event is the one right after pos.
func follows(pos store.Position, ev *store.Event) bool {
	if pos.None() {
		return begins(ev)
	}
	return ev.Epoch == pos.Epoch && ev.Seq == pos.Seq+1 && ev.Prev == pos.Tag
}

// begins reports whether the event is the first of its epoch. Its number is 1,
// unless the room had members whose numbers are of an epoch that was lost.
func begins(ev *store.Event) bool { return ev.Prev == "-" }

// advance moves on to the event right after pos. It copies what it keeps: an
// event's strings share memory with the whole message.
func (h *history) advance(ev *store.Event) {
	h.pos.Seq, h.pos.Tag = ev.Seq, strings.Clone(ev.Tag)
	if len(h.tags) < recentTags {
		h.tags = append(h.tags, h.pos.Tag)
	} else {
		h.tags[(ev.Seq-h.base)%recentTags] = h.pos.Tag
	}
	h.raise()
}

// jump moves to any position; what came before it is not known.
func (h *history) jump(p store.Position) {
	h.pos = store.Position{Epoch: strings.Clone(p.Epoch), Seq: p.Seq, Tag: strings.Clone(p.Tag)}
	h.base = p.Seq
	h.tags = append(h.tags[:0], h.pos.Tag)
	h.raise()
}

// recall returns the tag of event seq of this epoch, if it is remembered.
func (h *history) recall(seq uint64) (string, bool) {
	if seq > h.pos.Seq || h.pos.Seq-seq >= uint64(len(h.tags)) {
		return "", false
	}
	return h.tags[(seq-h.base)%recentTags], true
}

// left reports whether the mirror has been in that epoch and gone on to
// another.
func (h *history) left(epoch string) bool {
	for i := range h.floors {
		if h.floors[i].epoch == epoch {
			return epoch != h.pos.Epoch
		}
	}
	return false
}

// raise keeps the numbers that subscribers see from falling. A room that
// Redis knows nothing of keeps the last epoch's.
func (h *history) raise() {
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
	if len(kept) == keptFloors {
		kept = append(kept[:0], kept[1:]...)
	}
	h.floors = append(kept, next)
}

// shown returns the epoch and seq that subscribers are told.
func (h *history) shown() (epoch string, seq uint64) {
	if len(h.floors) == 0 {
		return "", 0
	}
	f := h.floors[len(h.floors)-1]
	return f.epoch, f.seq
}
