package sim

import (
	"context"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/testhook"
)

// kill ends a server without goodbye.
func (s *sim) kill() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.killNode(s.pickNode())
}

// lateKilled has a batch of a server sit in a proxy while the server dies, and
// come out before or after it is buried.
func (s *sim) lateKilled() bool {
	n := s.well()
	if n == nil {
		return false
	}
	kinds := []string{"J", "U", "U", "L", "K"}
	n.link.setHold(time.Duration(s.rng.Int64N(int64(s.lease)*2)), kinds[s.rng.IntN(len(kinds))])
	s.disturb(s.between(0.2, 0.9), func() {
		n.link.setHold(0, "")
		s.mu.Lock()
		defer s.mu.Unlock()
		if !n.dead {
			s.killNode(n)
		}
	})
	return true
}

// experienced returns the servers but n that have run for long enough to declare
// others dead. s.mu is held.
func (s *sim) experienced(n *simNode) []*simNode {
	return slices.DeleteFunc(s.running(), func(o *simNode) bool { return o == n || time.Since(o.born) < 2*s.lease })
}

// killNode kills a server, nil: none, if others will bury it. s.mu is held.
func (s *sim) killNode(n *simNode) bool {
	if n == nil || len(s.experienced(n)) == 0 || time.Now().Before(s.noKills) {
		return false
	}
	s.killed = time.Now()
	s.noted("kill %s", n.name)
	n.dead = true
	n.apply()
	for _, c := range s.list() {
		if c.node == n {
			s.departAll(c, "its server was killed")
		}
	}
	if n.resume != nil {
		n.resume()
	}
	s.calls.Go(func() { // its goroutines end; nothing of it gets out
		ctx, cancel := context.WithCancel(s.ctx)
		cancel()
		_ = n.p.Shutdown(ctx)
	})
	return true
}

// stopNode shuts a server down in order.
func (s *sim) stopNode() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickNode()
	if n == nil || len(s.living()) < 2 || !n.bad.IsZero() || s.active > 0 {
		return false
	}
	if time.Since(s.killed) < 2*s.lease && len(s.experienced(n)) == 0 {
		return false // the servers that remain may not yet declare the killed one dead
	}
	of := slices.DeleteFunc(s.list(), func(c *simClient) bool { return c.node != n })
	if slices.ContainsFunc(of, func(c *simClient) bool { return c.busy }) {
		return false
	}
	for _, c := range of {
		s.departAll(c, "its server was shut down")
	}
	s.noted("stop %s", n.name)
	n.dead = true // but for its connections
	s.killed = time.Now()
	s.calls.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
		defer cancel()
		_ = n.p.Shutdown(ctx)
	})
	return true
}

// while has something be wrong with a server for as long as d. set is called
// with s.mu held.
func (s *sim) while(n *simNode, d time.Duration, what string, set func(on bool)) {
	s.mu.Lock()
	s.noted("%s %s for %v", n.name, what, d)
	set(true)
	n.apply()
	s.mu.Unlock()
	s.disturb(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.noted("%s %s no more", n.name, what)
		set(false)
		n.apply()
	})
}

// well returns a server with which nothing is wrong; nil: none is picked.
func (s *sim) well() *simNode {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickNode()
	// One after the other without a breath between would be one long one.
	if n == nil || time.Now().Before(s.restoring) || n.cut || n.hang || n.paused || n.failing || time.Since(n.sick) < s.lease {
		return nil
	}
	return n
}

// pause has a server's process stand still, for so many leases: its clocks do
// not tick, it neither sends nor reads, its sockets' frames wait, and what it
// was about to do it does on waking.
func (s *sim) pause(low, high float64) bool {
	n := s.well()
	if n == nil || len(s.running()) < 2 {
		return false
	}
	var tick clock.Timer
	d := time.Duration(float64(s.lease) * (low + s.rng.Float64()*(high-low)))
	s.while(n, d, "stands still", func(on bool) {
		n.paused = on
		if !on {
			n.resume()
			s.afterPause(n)
			return
		}
		goOn := n.edge.stop()
		wheel := make(chan struct{})
		testhook.PartsOf(n.p).Wheel.Schedule(&tick, 0, func() { <-wheel })
		var once bool
		n.resume = func() {
			if !once {
				once = true
				goOn()
				close(wheel)
			}
		}
	})
	return true
}

// afterPause notes what a server that stood still has to do without: sockets
// that give no sign of life when it asks for one, and states. s.mu is held.
func (s *sim) afterPause(n *simNode) {
	for _, c := range s.list() {
		if c.node != n {
			continue
		}
		for _, room := range c.joined {
			s.entry(simKey{room, c.id}).unsure = true
		}
		if c.silent {
			s.disconnect(c)
		}
	}
}

// callsFail has some calls of a server fail, executed or not.
func (s *sim) callsFail() bool {
	n := s.well()
	if n == nil {
		return false
	}
	part, text := 0.1+0.7*s.rng.Float64(), simRefusals[s.rng.IntN(len(simRefusals))]
	s.while(n, s.between(0.2, 2.5), "has calls fail", func(on bool) {
		n.failing = on
		n.edge.set(0, 0, text)
		if on {
			n.edge.set(part, 0, text)
		}
	})
	return true
}

// entriesRefused has Redis refuse one entry of some of a server's batches.
func (s *sim) entriesRefused() bool {
	n := s.well()
	if n == nil {
		return false
	}
	part := 0.1 + 0.7*s.rng.Float64()
	s.while(n, s.between(0.2, 2.5), "has entries refused", func(on bool) {
		n.failing = on
		n.edge.set(0, 0, "")
		if on {
			n.edge.set(0, part, "")
		}
	})
	return true
}
