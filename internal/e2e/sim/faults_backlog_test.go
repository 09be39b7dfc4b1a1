package sim

import (
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/testhook"
)

// simBatch is the number of ops that servers of the simulation put into one call: a
// backlog of a few hundred items then takes as many calls as one of many
// thousands does.
const simBatch = 8

// backlog has a server write about hundreds of connections at once, three times:
// they join, they are compared with Redis, they disconnect. Each time takes the
// server longer than keys with a short TTL last. Subscribers must not notice, so
// that all bounds go on to hold. The crowd is in a room of its own, of which the
// model knows nothing.
func (s *sim) backlog() bool {
	n := s.well()
	if n == nil || n.crowded {
		return false
	}
	n.crowded = true
	crowd := make([]string, 200+s.rng.IntN(150))
	for i := range crowd {
		crowd[i] = fmt.Sprintf("crowd-%s-%d-%d", n.name, s.at().Milliseconds(), i)
	}
	takes := s.between(1.5, 3)
	s.note("%s has a backlog of %d, which takes %v", n.name, len(crowd), takes)
	n.edge.setCost(takes / time.Duration(len(crowd)))
	all := func(do func(id string)) {
		var wg sync.WaitGroup
		for _, id := range crowd {
			wg.Go(func() { do(id) })
		}
		wg.Wait()
	}
	s.calls.Go(func() {
		all(func(id string) {
			if n.p.Connect(s.ctx, id, nil) == nil {
				_ = n.p.Join(s.ctx, "crowd", id)
			}
		})
	})
	s.after(2*takes, func() { testhook.PartsOf(n.p).Local.Heartbeat(-1, true) })
	s.after(3*takes, func() {
		s.calls.Go(func() { all(func(id string) { _ = n.p.Disconnect(s.ctx, id) }) })
	})
	s.after(4*takes, func() {
		n.edge.setCost(0)
		n.crowded = false
	})
	return true
}

// after has something be done later, or at the end of the phase.
func (s *sim) after(d time.Duration, do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later = append(s.later, simLater{time.Now().Add(d + time.Duration(len(s.later))), do})
}
