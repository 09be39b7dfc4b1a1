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

// simServer is one server.
type simServer struct {
	s    *sim
	name string
	link *simLink
	seam *simSeam
	p    *mesh.PresenceManager
	born time.Time
	idle bool // has no connections, so that it only writes its lease

	crowded bool // has a backlog; used by the goroutine of the schedule only

	// Guarded by sim.mu.
	up, dead  bool
	cut, hang bool      // by a fault of this server only
	paused    bool      // the process stands still
	failing   bool      // some of its calls fail
	resume    func()    // ends a pause; nil if there was none
	outSince  time.Time // when it lost touch with Redis; zero if it has not
	own       bool      // and not only because all servers have
	maybeDead bool      // for so long that others may have declared it dead
	lastOut   time.Time // when it was last out of touch
	shakyTill time.Time // until then, its entries may end
}

// stalled reports whether the server may still have to notice that it stood still past
// its lease. It then lets all connections join again at their next frame, without a
// state. s.mu is held.
func (n *simServer) stalled(now time.Time) bool {
	return n.resume != nil && (n.s.active > 0 || now.Sub(n.lastOut) < 2*n.s.lease)
}

// still reports whether no code of the server runs.
func (n *simServer) still() bool { return n.dead || n.paused }

func (n *simServer) shaky(now time.Time) bool { return n.maybeDead || now.Before(n.shakyTill) }

// living returns the servers that have started and are not dead. s.mu is held.
func (s *sim) living() []*simServer {
	return slices.DeleteFunc(slices.Clone(s.servers), func(n *simServer) bool { return n.dead || !n.up })
}

// running returns the living servers whose processes run. s.mu is held.
func (s *sim) running() []*simServer {
	return slices.DeleteFunc(s.living(), func(n *simServer) bool { return n.paused })
}

// pickServer returns a random living server. s.mu is held.
func (s *sim) pickServer() *simServer {
	servers := s.living()
	if len(servers) == 0 {
		return nil
	}
	return servers[s.rng.IntN(len(servers))]
}

// startServer starts another server, in the background.
func (s *sim) startServer() {
	s.born++
	n := &simServer{s: s, name: fmt.Sprintf("server%d", s.born), born: time.Now()}
	n.link = &simLink{s: s, rng: rand.New(rand.NewPCG(uint64(s.seed), uint64(s.born))), conns: make(map[*simWire]struct{})}
	n.seam = &simSeam{s: s, rng: rand.New(rand.NewPCG(uint64(s.seed), uint64(s.born+1<<20)))}
	opts := s.mem.Options()
	opts.Dialer, opts.DialerRetries = n.link.dial, 1
	opts.ContextTimeoutEnabled = s.rng.IntN(2) == 0
	client := redis.NewClient(opts)
	of := mesh.Options{Redis: client, LeaseTTL: s.lease, Logger: s.log.of(n.name), UserID: mesh.UserIDField("userId")}
	testhook.SetSeams(&of, n.seam.of)
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
	s.users.track(n.p)
	s.mu.Lock()
	n.idle = s.fragile && len(s.servers) == 0
	s.servers = append(s.servers, n)
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

// apply applies a server's current faults. s.mu is held.
func (n *simServer) apply() {
	n.link.set(n.dead || n.cut || n.s.allCut, n.hang || n.paused || n.s.allHang, n.s.refusal)
	own := n.cut || n.hang || n.paused || n.failing
	bad := own || n.s.allCut || n.s.allHang
	now := time.Now()
	switch {
	case bad && n.outSince.IsZero():
		n.outSince = now
	case !bad && !n.outSince.IsZero():
		n.outSince, n.own, n.lastOut = time.Time{}, false, now
		if n.maybeDead {
			// After it was declared dead, and before its fence, connections may have
			// joined.
			for _, c := range n.s.list() {
				if c.server == n {
					n.s.allowLeaves(c, "joined on a server that may be declared dead")
				}
			}
			n.maybeDead, n.shakyTill = false, now.Add(2*n.s.lease)
		}
	}
	n.own = n.own || own
}

// outageUntil records that all servers are cut off from Redis until t. s.mu is held.
func (s *sim) outageUntil(t time.Time) {
	if t.After(s.lastOutage) {
		s.lastOutage = t
	}
}

// watchHealth finds the servers that are out of touch for so long that others may have
// ended their entries. s.mu is held.
func (s *sim) watchHealth(now time.Time) {
	if s.allCut || s.allHang {
		s.outageUntil(now)
	}
	for _, n := range s.living() {
		if n.outSince.IsZero() {
			continue
		}
		n.lastOut = now
		// A third of the lease may have passed before. After a failed dial, the Redis
		// client waits for up to a second before it dials again.
		spare := min(s.lease*6/10, (s.ttl+time.Second)*6/10-500*time.Millisecond) - 100*time.Millisecond
		if n.cut || n.hang || n.paused {
			spare -= time.Second
		}
		if !n.own || n.maybeDead || now.Sub(n.outSince) < spare {
			continue
		}
		n.maybeDead = true
		s.noted("%s may be declared dead", n.name)
		for _, c := range s.list() {
			if c.server == n {
				s.allowLeaves(c, "its server was out of touch")
			}
		}
	}
}

// allowLeaves allows one leave of each of a client's entries.
func (s *sim) allowLeaves(c *simClient, why string) {
	for _, room := range c.joined {
		e := s.entry(simKey{room, c.id})
		e.reasons = append(e.reasons, &simReason{from: time.Now(), text: why})
	}
}
