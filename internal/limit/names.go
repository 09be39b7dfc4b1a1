package limit

import (
	"hash/maphash"
	"slices"
	"sync"
	"time"
)

const (
	// NewNamesEvery is the period in which Names counts new names.
	NewNamesEvery = time.Minute
	// namesRemembered is the number of new names of a period that Names remembers, and
	// also the number of names that it remembers because they were used again. A name
	// that does not fit counts as new at its next use.
	namesRemembered = 512
)

// nameSeed makes the hashes of names unpredictable, so that no client can choose two
// names that count as one.
var nameSeed = maphash.MakeSeed()

// Names counts the names that one client begins to use. It is safe for concurrent
// use, and its zero value is ready.
//
// It keeps hashes of the names, in the order of their use, and searches them one by
// one. There are few, and an idle client must not cost the memory of a map.
type Names struct {
	mu       sync.Mutex // guards the fields below
	begun    time.Time  // of the current period
	count    int        // number of new names in it
	again    int        // number of names in now that are also in old
	now, old []uint64   // names that were used in this period, and in the one before
}

// Use notes the use of a name. It returns false if the name is new and most others are
// new in this period. With a negative most it always returns true. A name is new if it
// was used neither in this period nor in the one before.
func (n *Names) Use(name string, most int, at time.Time) bool {
	if most < 0 {
		return true
	}
	hash := maphash.String(nameSeed, name)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.turn(at)
	if slices.Contains(n.now, hash) {
		return true
	}
	of := &n.again
	if !slices.Contains(n.old, hash) {
		if n.count >= most {
			return false
		}
		of = &n.count
	}
	if *of++; *of <= namesRemembered {
		n.now = append(n.now, hash)
	}
	return true
}

// turn begins a new period if the current one is over. The caller holds mu.
func (n *Names) turn(at time.Time) {
	passed := at.Sub(n.begun)
	if passed < NewNamesEvery {
		return
	}
	n.old, n.now = n.now, nil
	if passed >= 2*NewNamesEvery {
		n.old = nil
	}
	n.begun, n.count, n.again = at, 0, 0
}
