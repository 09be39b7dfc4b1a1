package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/testhook"
)

// simNode is one server.
type simNode struct {
	s    *sim
	name string
	link *simLink
	edge *simEdge
	p    *mesh.PresenceManager
	born time.Time
	idle bool // has no connections, so that it writes nothing but its lease

	crowded bool // it has a backlog; of the goroutine of the schedule

	// Guarded by sim.mu.
	up, dead  bool
	cut, hang bool      // by a fault of its own
	paused    bool      // its process stands still
	failing   bool      // its calls fail, some of them
	resume    func()    // ends a pause; nil: there was none
	bad       time.Time // since when it is out of touch, zero: it is not
	own       bool      // and not only because all are
	buried    bool      // so long that others may have buried it
	sick      time.Time // when it was last out of touch
	shakyTill time.Time
}

// stalled reports whether the server may still have to find out that it stood
// still past its lease: it then has everybody join anew at their next frame,
// with no state. s.mu is held.
func (n *simNode) stalled(now time.Time) bool {
	return n.resume != nil && (n.s.active > 0 || now.Sub(n.sick) < 2*n.s.lease)
}

// still reports whether nothing of the server runs.
func (n *simNode) still() bool { return n.dead || n.paused }

func (n *simNode) shaky(now time.Time) bool { return n.buried || now.Before(n.shakyTill) }

// living returns the servers that take part. s.mu is held.
func (s *sim) living() []*simNode {
	return slices.DeleteFunc(slices.Clone(s.nodes), func(n *simNode) bool { return n.dead || !n.up })
}

// running returns the servers whose processes run. s.mu is held.
func (s *sim) running() []*simNode {
	return slices.DeleteFunc(s.living(), func(n *simNode) bool { return n.paused })
}

// pickNode returns a living server. s.mu is held.
func (s *sim) pickNode() *simNode {
	nodes := s.living()
	if len(nodes) == 0 {
		return nil
	}
	return nodes[s.rng.IntN(len(nodes))]
}

// startNode starts another server, in the background.
func (s *sim) startNode() {
	s.born++
	n := &simNode{s: s, name: fmt.Sprintf("server%d", s.born), born: time.Now()}
	n.link = &simLink{s: s, rng: rand.New(rand.NewPCG(uint64(s.seed), uint64(s.born))), conns: make(map[*simWire]struct{})}
	n.edge = &simEdge{s: s, rng: rand.New(rand.NewPCG(uint64(s.seed), uint64(s.born+1<<20)))}
	opts := s.mem.Options()
	opts.Dialer, opts.DialerRetries = n.link.dial, 1
	opts.ContextTimeoutEnabled = s.rng.IntN(2) == 0
	client := redis.NewClient(opts)
	of := mesh.Options{Redis: client, LeaseTTL: s.lease, Logger: s.log.of(n.name)}
	testhook.SetSeams(&of, n.edge.of)
	var err error
	n.p, err = mesh.NewPresenceManager(of)
	if err != nil {
		panic(err)
	}
	for pattern, ttl := range map[string]time.Duration{"^plain": 0, "^ttl": s.ttl} {
		if err := n.p.TrackPresence(mesh.Regexp(regexp.MustCompile(pattern)), mesh.PresenceOptions{TTL: ttl}); err != nil {
			panic(err)
		}
	}
	s.mu.Lock()
	n.idle = s.fragile && len(s.nodes) == 0
	s.nodes = append(s.nodes, n)
	n.apply()
	s.noted("start %s", n.name)
	s.mu.Unlock()
	s.calls.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, 3*time.Minute)
		defer cancel()
		err := n.p.Start(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		n.born = time.Now()
		if n.up = err == nil; err != nil && !n.dead {
			s.fail("%s does not start: %v", n.name, err)
		}
	})
}

// apply brings a server's faults about. s.mu is held.
func (n *simNode) apply() {
	n.link.set(n.dead || n.cut || n.s.allCut, n.hang || n.paused || n.s.allHang, n.s.refusal)
	own := n.cut || n.hang || n.paused || n.failing
	bad := own || n.s.allCut || n.s.allHang
	now := time.Now()
	switch {
	case bad && n.bad.IsZero():
		n.bad = now
	case !bad && !n.bad.IsZero():
		n.bad, n.own, n.sick = time.Time{}, false, now
		if n.buried {
			// Between its burial and its fence it may have joined somebody.
			for _, c := range n.s.list() {
				if c.node == n {
					n.s.excuseAll(c, "joined on a server about to be buried")
				}
			}
			n.buried, n.shakyTill = false, now.Add(2*n.s.lease)
		}
	}
	n.own = n.own || own
}

// sickUntil notes until when all servers are without Redis. s.mu is held.
func (s *sim) sickUntil(t time.Time) {
	if t.After(s.sick) {
		s.sick = t
	}
}

// watchHealth notes who has been out of touch for so long that others may
// have ended its entries. s.mu is held.
func (s *sim) watchHealth(now time.Time) {
	if s.allCut || s.allHang {
		s.sickUntil(now)
	}
	for _, n := range s.living() {
		if n.bad.IsZero() {
			continue
		}
		n.sick = now
		// A third of it may have passed before, and once nobody could dial the
		// client library waits for up to a second before it tries again.
		spare := min(s.lease*6/10, (s.ttl+time.Second)*6/10-500*time.Millisecond) - 100*time.Millisecond
		if n.cut || n.hang || n.paused {
			spare -= time.Second
		}
		if !n.own || n.buried || now.Sub(n.bad) < spare {
			continue
		}
		n.buried = true
		s.noted("%s may be buried", n.name)
		for _, c := range s.list() {
			if c.node == n {
				s.excuseAll(c, "its server was out of touch")
			}
		}
	}
}

// excuseAll allows for a leave of each of a client's entries.
func (s *sim) excuseAll(c *simClient, why string) {
	for _, room := range c.joined {
		e := s.entry(simKey{room, c.id})
		e.tickets = append(e.tickets, &simTicket{from: time.Now(), why: why})
	}
}
