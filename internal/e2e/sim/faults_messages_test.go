package sim

import (
	"github.com/meshpresence/mesh/internal/testhook"
)

// loseMessages drops, doubles and delays a fraction of the messages to some servers.
func (s *sim) loseMessages() bool {
	servers := s.someServers()
	part := s.rng.Float64()
	s.note("messages to %d servers are lost, %.2f", len(servers), part)
	s.setLoss(servers, func(l *simLink) { l.loss = part })
	s.disturb(s.between(0.2, 6), func() { s.setLoss(servers, func(l *simLink) { l.loss = 0 }) })
	return true
}

// loseHints does the same with expired events only, which no promise depends on.
func (s *sim) loseHints() bool {
	servers := s.someServers()
	s.note("expired events to %d servers are lost", len(servers))
	s.setLoss(servers, func(l *simLink) { l.hintLoss = 1 })
	s.after(s.between(0.5, 8), func() { s.setLoss(servers, func(l *simLink) { l.hintLoss = 0 }) })
	return true
}

// some returns about half of the servers.
func (s *sim) someServers() (servers []*simServer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.living() {
		if s.rng.IntN(2) == 0 {
			servers = append(servers, n)
		}
	}
	return servers
}

func (s *sim) setLoss(servers []*simServer, set func(*simLink)) {
	for _, n := range servers {
		n.link.mu.Lock()
		set(n.link)
		n.link.mu.Unlock()
	}
}

// falseHints publishes expired events of keys that exist.
func (s *sim) falseHints() bool {
	s.note("false expired events")
	s.mu.Lock()
	var keys []string
	for _, c := range s.list() {
		for _, room := range c.joined {
			keys = append(keys, testhook.PartsOf(s.servers[0].p).Keys.Conn(room, c.id), testhook.PartsOf(s.servers[0].p).Keys.State(room, c.id))
		}
	}
	s.mu.Unlock()
	for _, key := range keys {
		s.mem.Mini().Publish("__keyevent@0__:expired", key)
	}
	return true
}
