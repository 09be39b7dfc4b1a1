package kept

import (
	"slices"
	"sync"

	"github.com/meshpresence/mesh/internal/store"
)

// PerUser limits the places that are kept for one user at once. It counts the places of
// which it is told, those of the ended connections of one server. It is safe for
// concurrent use.
type PerUser struct {
	limit int // negative: none

	mu     sync.Mutex                   // guards the fields below
	places map[string][]store.KeptPlace // by user, oldest first
	sweep  int                          // number of users at which those without places are forgotten
}

// minSweep is the number of users that are remembered before any is looked at again.
const minSweep = 1024

// NewPerUser returns a PerUser. A negative limit means no limit.
func NewPerUser(limit int) *PerUser {
	return &PerUser{limit: limit, places: make(map[string][]store.KeptPlace), sweep: minSweep}
}

// Add notes a place, at a time on the clock of Redis (unix ms). It returns the oldest
// place of the user if there are too many. The caller ends that one. A place that is added
// again counts once.
func (p *PerUser) Add(user string, place store.KeptPlace, now int64) (oldest store.KeptPlace, over bool) {
	if p.limit < 0 || user == "" {
		return store.KeptPlace{}, false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.places) >= p.sweep {
		p.forget(now)
	}
	list := p.places[user][:0]
	for _, other := range p.places[user] {
		// A user has at most one place in a room.
		if other.Until > now && other.Room != place.Room {
			list = append(list, other)
		}
	}
	list = append(list, place)
	if len(list) > p.limit {
		oldest, over = list[0], true
		list = list[1:]
	}
	p.places[user] = list
	return oldest, over
}

// forget forgets the users without a place. p.mu is held.
func (p *PerUser) forget(now int64) {
	for user, list := range p.places {
		if !slices.ContainsFunc(list, func(p store.KeptPlace) bool { return p.Until > now }) {
			delete(p.places, user)
		}
	}
	p.sweep = max(minSweep, 2*len(p.places))
}
