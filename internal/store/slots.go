package store

import (
	"strconv"
	"strings"
)

// slots limit the calls under way to one bucket.
type slots struct {
	bucket int
	reads  chan struct{} // plain commands
	writes chan struct{} // scripts, except those that clients cause one by one
	fences chan struct{} // calls that fence dead incarnations
	health writes
}

func (p *slots) read() slotRef  { return slotRef{p.reads, p.bucket, false} }
func (p *slots) write() slotRef { return slotRef{p.writes, p.bucket, true} }
func (p *slots) fence() slotRef { return slotRef{p.fences, p.bucket, true} }

// slotRef is the slot that a call waits for, and the kind of the call.
type slotRef struct {
	slots  chan struct{}
	bucket int  // bucket of the call; nowhere: none, or several
	writes bool // its outcome shows whether Redis takes writes there
}

// nowhere is the bucket of calls that do not belong to one bucket.
const nowhere = -1

// at returns the slots of the bucket of a key, which is the number in its hash tag.
func (s *Store) at(key string) *slots {
	if len(s.slots) > 1 {
		_, rest, _ := strings.Cut(key, "{")
		tag, _, _ := strings.Cut(rest, "}")
		if b, err := strconv.Atoi(tag); err == nil && b >= 0 && b < len(s.slots) {
			return &s.slots[b]
		}
	}
	return &s.slots[0]
}
