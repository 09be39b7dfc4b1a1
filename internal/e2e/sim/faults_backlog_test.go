package sim

import (
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/testhook"
)

// simBatch is the number of ops in one call of a simulated server. With this limit, a
// backlog of a few hundred items takes as many calls as one of many thousands without
// it.
const simBatch = 8

// backlog makes a server write about hundreds of connections at once, three times: they
// join, are reconciled, and disconnect. Each time takes longer than keys with a short
// TTL last. Subscribers must not notice, so all time limits hold. The connections are
// in a room of their own, which the model does not cover.
func (s *sim) backlog() bool {
	n := s.healthy()
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
	n.seam.setCost(takes / time.Duration(len(crowd)))
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
		n.seam.setCost(0)
		n.crowded = false
	})
	return true
}

// after calls do later, or at the end of the phase.
func (s *sim) after(d time.Duration, do func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later = append(s.later, simLater{time.Now().Add(d + time.Duration(len(s.later))), do})
}
