package sim

import (
	"github.com/meshpresence/mesh/internal/testhook"
)

// loseMessages drops, doubles and delays a part of what Redis publishes to
// some servers.
func (s *sim) loseMessages() bool {
	hit := s.some()
	part := s.rng.Float64()
	s.note("messages get lost at %d servers, %.2f", len(hit), part)
	s.setLoss(hit, func(l *simLink) { l.loss = part })
	s.disturb(s.between(0.2, 6), func() { s.setLoss(hit, func(l *simLink) { l.loss = 0 }) })
	return true
}

// loseHints does so with expired events alone, on which nothing rests.
func (s *sim) loseHints() bool {
	hit := s.some()
	s.note("hints get lost at %d servers", len(hit))
	s.setLoss(hit, func(l *simLink) { l.hintLoss = 1 })
	s.after(s.between(0.5, 8), func() { s.setLoss(hit, func(l *simLink) { l.hintLoss = 0 }) })
	return true
}

// some returns about half of the servers.
func (s *sim) some() (hit []*simNode) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.living() {
		if s.rng.IntN(2) == 0 {
			hit = append(hit, n)
		}
	}
	return hit
}

func (s *sim) setLoss(nodes []*simNode, set func(*simLink)) {
	for _, n := range nodes {
		n.link.mu.Lock()
		set(n.link)
		n.link.mu.Unlock()
	}
}

// falseHints tells of keys that have not run out.
func (s *sim) falseHints() bool {
	s.note("false hints")
	s.mu.Lock()
	var keys []string
	for _, c := range s.list() {
		for _, room := range c.joined {
			keys = append(keys, testhook.PartsOf(s.nodes[0].p).Keys.Conn(room, c.id), testhook.PartsOf(s.nodes[0].p).Keys.State(room, c.id))
		}
	}
	s.mu.Unlock()
	for _, key := range keys {
		s.mem.Mini().Publish("__keyevent@0__:expired", key)
	}
	return true
}
