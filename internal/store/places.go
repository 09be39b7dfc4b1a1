package store

import (
	"strconv"
	"strings"
)

// places bound the calls under way to one bucket.
type places struct {
	bucket int
	reads  chan struct{} // plain commands
	writes chan struct{} // scripts, but those that clients call one by one
	fences chan struct{} // those that lock the dead out
	health writes
}

func (p *places) read() place  { return place{p.reads, p.bucket, false} }
func (p *places) write() place { return place{p.writes, p.bucket, true} }
func (p *places) fence() place { return place{p.fences, p.bucket, true} }

// place is where a call waits for its turn, and what kind of call it is.
type place struct {
	slots  chan struct{}
	bucket int  // that the call is of; nowhere: none, or several
	writes bool // whether it tells if Redis takes writes there
}

// nowhere is the bucket of calls that are of no one bucket.
const nowhere = -1

// at returns the places of the bucket that a key is in: the number in its hash
// tag.
func (s *Store) at(key string) *places {
	if len(s.places) > 1 {
		_, rest, _ := strings.Cut(key, "{")
		tag, _, _ := strings.Cut(rest, "}")
		if b, err := strconv.Atoi(tag); err == nil && b >= 0 && b < len(s.places) {
			return &s.places[b]
		}
	}
	return &s.places[0]
}
