package sim

import (
	"time"
)

// partition cuts a server off from Redis, or makes the link hang.
func (s *sim) partition(cut bool, low, high float64) bool {
	return s.outOfTouch(s.between(low, high), cut)
}

// overdue keeps a server out of touch until its keys with a TTL have run out and others
// have ended its entries, but not until it is declared dead.
func (s *sim) overdue() bool {
	d := s.ttl + 1400*time.Millisecond
	if d > s.lease*2/3 {
		d = s.between(1, 2)
	}
	if !s.outOfTouch(d, false) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later = append(s.later, simLater{time.Now().Add(d - 350*time.Millisecond - time.Duration(len(s.later))), func() { s.falseHints() }})
	return true
}

func (s *sim) outOfTouch(d time.Duration, cut bool) bool {
	n := s.healthy()
	if n == nil {
		return false
	}
	text := "is out of touch, hanging,"
	if cut {
		text = "is out of touch, cut off,"
	}
	s.faultOn(n, d, text, func(on bool) { n.cut, n.hang = on && cut, on && !cut })
	return true
}

// setAll cuts all servers off from Redis, or connects them again.
func (s *sim) setAll(cut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.allCut = cut
	s.outageUntil(time.Now())
	for _, n := range s.servers {
		n.apply()
	}
	s.noted("all cut off: %v", cut)
}

func (s *sim) cutAll() bool {
	if s.allCut || time.Now().Before(s.restoring) {
		return false
	}
	s.setAll(true)
	s.disturb(s.between(0.1, 3*s.lease.Seconds()), func() { s.setAll(false) })
	return true
}

func (s *sim) hangAll() bool {
	if s.allHang || time.Now().Before(s.restoring) {
		return false
	}
	set := func(hang bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.allHang = hang
		s.outageUntil(time.Now())
		for _, n := range s.servers {
			n.apply()
		}
		s.noted("all hang: %v", hang)
	}
	set(true)
	s.disturb(s.between(0.1, 3*s.lease.Seconds()), func() { set(false) })
	return true
}

// loseReplies cuts a server's connection after a script has run and before its reply
// arrives.
func (s *sim) loseReplies() bool {
	s.mu.Lock()
	n := s.pickServer()
	s.mu.Unlock()
	if n == nil {
		return false
	}
	n.link.mu.Lock()
	defer n.link.mu.Unlock()
	n.link.lose = 1 + s.rng.IntN(2)
	return true
}

// holdWrite makes a proxy hold the next batch of a server, whatever happens to the
// connection. The writer waits for up to 1.8 s for the answer. Keys with a TTL below
// that would run out.
func (s *sim) holdWrite() bool {
	if s.ttl < 3*time.Second {
		return false
	}
	s.mu.Lock()
	n := s.pickServer()
	s.mu.Unlock()
	if n == nil {
		return false
	}
	d := s.between(0.5, 12)
	kinds := []string{"J", "J", "U", "L", "K"}
	n.link.setHold(d, kinds[s.rng.IntN(len(kinds))])
	s.disturb(d+5*time.Second, func() { n.link.setHold(0, "") })
	return true
}

// flap closes the connections of some servers once.
func (s *sim) flap() bool {
	s.note("connections are cut once")
	s.mu.Lock()
	s.outageUntil(time.Now()) // members stay unconfirmed for longer
	servers := s.living()
	s.mu.Unlock()
	for _, n := range servers {
		if s.rng.IntN(2) == 0 {
			n.link.flap()
		}
	}
	s.disturb(s.recovery(), nil)
	return true
}
