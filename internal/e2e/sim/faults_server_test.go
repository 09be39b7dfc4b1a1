package sim

import (
	"context"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/testhook"
)

// kill ends a server without a shutdown.
func (s *sim) kill() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.killServer(s.pickServer())
}

// lateKilled holds a batch of a server in a proxy while the server dies. The batch is
// delivered before or after the server is declared dead.
func (s *sim) lateKilled() bool {
	n := s.healthy()
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
			s.killServer(n)
		}
	})
	return true
}

// experienced returns the servers but n that have run for long enough to declare
// others dead. s.mu is held.
func (s *sim) experienced(n *simServer) []*simServer {
	return slices.DeleteFunc(s.running(), func(o *simServer) bool { return o == n || time.Since(o.born) < 2*s.lease })
}

// killServer kills a server if other servers can declare it dead. n may be nil. s.mu is
// held.
func (s *sim) killServer(n *simServer) bool {
	if n == nil || len(s.experienced(n)) == 0 || time.Now().Before(s.noKills) {
		return false
	}
	s.killed = time.Now()
	s.noted("kill %s", n.name)
	n.dead = true
	n.apply()
	for _, c := range s.list() {
		if c.server == n {
			s.departAll(c, "its server was killed")
		}
	}
	if n.resume != nil {
		n.resume()
	}
	s.calls.Go(func() { // ends its goroutines; none of its data leaves the link
		ctx, cancel := context.WithCancel(s.ctx)
		cancel()
		_ = n.p.Shutdown(ctx)
	})
	return true
}

// stopServer shuts a server down.
func (s *sim) stopServer() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickServer()
	if n == nil || len(s.living()) < 2 || !n.outSince.IsZero() || s.active > 0 {
		return false
	}
	if time.Since(s.killed) < 2*s.lease && len(s.experienced(n)) == 0 {
		return false // the servers that remain may not yet declare the killed one dead
	}
	clients := slices.DeleteFunc(s.list(), func(c *simClient) bool { return c.server != n })
	if slices.ContainsFunc(clients, func(c *simClient) bool { return c.busy }) {
		return false
	}
	for _, c := range clients {
		s.departAll(c, "its server was shut down")
	}
	s.noted("stop %s", n.name)
	n.dead = true // except for its connections
	s.killed = time.Now()
	s.calls.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
		defer cancel()
		_ = n.p.Shutdown(ctx)
	})
	return true
}

// faultOn causes a fault of a server for the time d. set is called with s.mu held.
func (s *sim) faultOn(n *simServer, d time.Duration, text string, set func(on bool)) {
	s.mu.Lock()
	s.noted("%s %s for %v", n.name, text, d)
	set(true)
	n.apply()
	s.mu.Unlock()
	s.disturb(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.noted("%s %s no longer", n.name, text)
		set(false)
		n.apply()
	})
}

// healthy returns a random server if it has no fault, or nil.
func (s *sim) healthy() *simServer {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickServer()
	// Faults without a pause between would count as one long fault.
	if n == nil || time.Now().Before(s.restoring) || n.cut || n.hang || n.paused || n.failing || time.Since(n.lastOut) < s.lease {
		return nil
	}
	return n
}

// pause stops the process of a server, for a time in leases. Its clocks do not tick, it
// neither sends nor reads, frames on its sockets wait, and calls in progress continue
// when it wakes up.
func (s *sim) pause(low, high float64) bool {
	n := s.healthy()
	if n == nil || len(s.running()) < 2 {
		return false
	}
	var tick clock.Timer
	d := time.Duration(float64(s.lease) * (low + s.rng.Float64()*(high-low)))
	s.faultOn(n, d, "stands still", func(on bool) {
		n.paused = on
		if !on {
			n.resume()
			s.afterPause(n)
			return
		}
		goOn := n.seam.stop()
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

// afterPause records what a server loses when it continues: clients that do not answer
// when it asks for a sign of life, and states. s.mu is held.
func (s *sim) afterPause(n *simServer) {
	for _, c := range s.list() {
		if c.server != n {
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

// callsFail makes some calls of a server fail, carried out or not.
func (s *sim) callsFail() bool {
	n := s.healthy()
	if n == nil {
		return false
	}
	part, text := 0.1+0.7*s.rng.Float64(), simRefusals[s.rng.IntN(len(simRefusals))]
	s.faultOn(n, s.between(0.2, 2.5), "has calls fail", func(on bool) {
		n.failing = on
		n.seam.set(0, 0, text)
		if on {
			n.seam.set(part, 0, text)
		}
	})
	return true
}

// entriesRefused makes Redis refuse one entry in some batches of a server.
func (s *sim) entriesRefused() bool {
	n := s.healthy()
	if n == nil {
		return false
	}
	part := 0.1 + 0.7*s.rng.Float64()
	s.faultOn(n, s.between(0.2, 2.5), "has entries refused", func(on bool) {
		n.failing = on
		n.seam.set(0, 0, "")
		if on {
			n.seam.set(0, part, "")
		}
	})
	return true
}
