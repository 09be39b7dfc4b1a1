package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/testhook"
)

// act lets one client, subscriber or administrator do something.
func (s *sim) act() {
	s.mu.Lock()
	list := s.list()
	s.mu.Unlock()
	dice := s.rng.IntN(100)
	if len(list) < 6 || dice < 6 && len(list) < s.maxClients {
		s.connect()
		return
	}
	c := list[s.rng.IntN(len(list))]
	room := s.rooms[s.rng.IntN(len(s.rooms))]
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case dice < 12:
		s.subscribe()
	case dice < 15:
		s.unsubscribe()
	case c.busy || c.server.paused:
	case c.silent:
		s.wake(c)
	case dice < 20:
		s.disconnect(c)
	case dice < 48:
		s.join(c, room)
	case dice < 60:
		s.leave(c)
	case dice < 78:
		s.publish(c)
	case dice < 82:
		s.clearState(c)
	case dice < 90:
		s.metadata(c)
	case c.server.stalled(time.Now()):
	default:
		s.noted("%s falls silent", c.id)
		c.silent, c.seen = true, time.Now()
		_ = c.server.p.Touch(c.id)
		for _, r := range c.joined {
			if ttl := s.ttlOf(r); ttl > 0 {
				s.allowLeave(simKey{r, c.id}, c.seen.Add(ttl-60*time.Millisecond), "silent")
			}
		}
	}
}

// call runs a client's call in the background. fine lists the errors that are allowed.
// s.mu is held.
func (s *sim) call(c *simClient, what string, f func(ctx context.Context) error, fine ...error) {
	c.busy, c.seen = true, time.Now()
	s.noted("%s %s", c.id, what)
	s.calls.Go(func() {
		err := f(s.ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		c.busy = false
		if err == nil || c.server.dead {
			return
		}
		for _, ok := range append(fine, mesh.ErrUnavailable) {
			if errors.Is(err, ok) {
				s.noted("%s %s: %v", c.id, what, err)
				return
			}
		}
		s.fail("%s %s: %v", c.id, what, err)
	})
}

func (s *sim) connect() {
	s.mu.Lock()
	defer s.mu.Unlock()
	servers := slices.DeleteFunc(s.running(), func(n *simServer) bool { return n.idle })
	if len(servers) == 0 {
		return
	}
	s.born++
	n := servers[s.rng.IntN(len(servers))]
	c := &simClient{id: fmt.Sprintf("c%03d", s.born), server: n, metas: map[string]bool{}, meta: fmt.Sprintf(`{"n":%d}`, s.born), socket: s.born%2 == 0}
	c.metas[c.meta] = true
	s.clients[c.id] = c
	room := s.rooms[s.rng.IntN(len(s.rooms))]
	s.arrive(c, room)
	s.call(c, "connects to "+n.name+" and joins "+room, func(ctx context.Context) error {
		if err := n.p.Connect(ctx, c.id, map[string]int{"n": s.bornOf(c)}); err != nil {
			return err
		}
		return s.enter(ctx, c, room)
	})
}

// simAnswered is the time limit for an answer to a client.
const simAnswered = 2100 * time.Millisecond

// enter joins a room. A client with a socket gets a success even while Redis is away.
// After an error it must not be joined later, because the client would not try again.
func (s *sim) enter(ctx context.Context, c *simClient, room string) error {
	if !c.socket {
		return c.server.p.Join(ctx, room, c.id)
	}
	own, ok := testhook.PartsOf(c.server.p).Local.Conn(c.id)
	if !ok {
		return mesh.ErrUnknownConnection
	}
	own.Touched()
	began := time.Now()
	joined, err := testhook.JoinAsClient(ctx, c.server.p, own, room)
	took := time.Since(began)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case c.server.dead:
	case err != nil:
		s.fail("%s joins %s and gets the error %v", c.id, room, err)
	case took > simAnswered && c.server.resume == nil:
		s.fail("%s joins %s and gets its answer after %v", c.id, room, took)
	case joined.Kept:
		s.counts["kept joins"]++
	}
	return err
}

func (s *sim) bornOf(c *simClient) int {
	var n int
	_, _ = fmt.Sscanf(c.id, "c%d", &n)
	return n
}

func (s *sim) disconnect(c *simClient) {
	s.departAll(c, "disconnected")
	s.call(c, "disconnects", func(ctx context.Context) error { return c.server.p.Disconnect(ctx, c.id) })
}

func (s *sim) join(c *simClient, room string) {
	s.arrive(c, room)
	s.call(c, "joins "+room, func(ctx context.Context) error { return s.enter(ctx, c, room) })
}

func (s *sim) leave(c *simClient) {
	if len(c.joined) == 0 {
		return
	}
	room := c.joined[s.rng.IntN(len(c.joined))]
	again := s.rng.IntN(4) == 0
	s.depart(c, room, "left")
	if again {
		s.arrive(c, room)
	}
	s.call(c, fmt.Sprintf("leaves %s, again %v", room, again), func(ctx context.Context) error {
		_, err := c.server.p.Leave(ctx, room, c.id)
		if err != nil && !errors.Is(err, mesh.ErrUnavailable) || !again {
			return err
		}
		return s.enter(ctx, c, room)
	})
}

func (s *sim) publish(c *simClient) {
	if len(c.joined) == 0 {
		return
	}
	room := c.joined[s.rng.IntN(len(c.joined))]
	now := time.Now()
	var opts mesh.StateOptions
	if s.rng.IntN(2) == 0 {
		opts.ExpireAfter = s.between(0.05, 4)
	}
	opts.Silent = s.rng.IntN(8) == 0
	s.born++
	state := fmt.Sprintf(`{"s":%d}`, s.born)
	e := s.entry(simKey{room, c.id})
	e.state, e.changed, e.until, e.silentState, e.unsure = state, now, time.Time{}, opts.Silent, c.server.stalled(now)
	e.hadSilentState = e.hadSilentState || opts.Silent
	if opts.ExpireAfter > 0 {
		e.until = now.Add(opts.ExpireAfter)
	}
	s.call(c, fmt.Sprintf("publishes %s in %s %+v", state, room, opts), func(ctx context.Context) error {
		return c.server.p.PublishState(ctx, room, c.id, map[string]int{"s": s.number(state)}, opts)
	})
}

func (s *sim) number(state string) (n int) {
	_, _ = fmt.Sscanf(state, `{"s":%d}`, &n)
	return n
}

func (s *sim) clearState(c *simClient) {
	if len(c.joined) == 0 {
		return
	}
	room := c.joined[s.rng.IntN(len(c.joined))]
	e := s.entry(simKey{room, c.id})
	e.state, e.changed, e.silentState = "", time.Now(), false
	s.call(c, "clears its state in "+room, func(ctx context.Context) error { return c.server.p.ClearState(ctx, room, c.id) })
}

// metadata changes a client's metadata, on any server.
func (s *sim) metadata(c *simClient) {
	servers := s.running()
	n := servers[s.rng.IntN(len(servers))]
	s.born++
	meta := fmt.Sprintf(`{"n":%d}`, s.born)
	number := s.born
	c.metas[meta] = true
	seen := c.seen
	s.call(c, "gets metadata "+meta+" on "+n.name, func(ctx context.Context) error {
		err := n.p.Connections().SetMetadata(ctx, c.id, map[string]int{"n": number}, mesh.MetadataOptions{})
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case err != nil:
			c.metaBad = true
		case !c.server.dead && !n.dead:
			// An owner that is out of touch may be declared dead, and the metadata of
			// its connections end with it. An owner that does not receive events only
			// asks after ten minutes.
			unsure := c.server.link.lossy() || !c.server.outSince.IsZero() || c.server.shaky(time.Now()) || time.Now().Before(s.disturbed)
			c.meta, c.metaBad = meta, n != c.server && unsure
		}
		return err
	}, mesh.ErrUnknownConnection, mesh.ErrClosed, mesh.ErrConflict)
	c.seen = seen // a call of the app is no sign of life
}

// wake ends a silence that is longer than the TTL.
func (s *sim) wake(c *simClient) {
	now := time.Now()
	if now.Before(c.seen.Add(s.ttl + 1500*time.Millisecond)) {
		return
	}
	switch s.rng.IntN(4) {
	case 0:
		s.disconnect(c)
		return
	case 1:
		room := s.rooms[s.rng.IntN(len(s.rooms))]
		if slices.Contains(c.joined, room) {
			s.depart(c, room, "left in silence")
			s.revive(c, now)
			s.call(c, "wakes up leaving "+room, func(ctx context.Context) error {
				_, err := c.server.p.Leave(ctx, room, c.id)
				return err
			})
			return
		}
	}
	s.revive(c, now)
	s.noted("%s wakes up", c.id)
	if err := c.server.p.Touch(c.id); err != nil {
		s.fail("touch %s: %v", c.id, err)
	}
}

// revive returns a client's entries that ended by silence.
func (s *sim) revive(c *simClient, now time.Time) {
	for _, room := range c.joined {
		if _, over := s.lapsed(c, room, now); over {
			k := simKey{room, c.id}
			e := s.entry(k)
			*e = simEntry{present: true, since: now, changed: now, reasons: e.reasons, hadSilentState: e.hadSilentState}
			s.joinsDue = append(s.joinsDue, simDue{k, now})
		}
	}
	c.silent, c.seen = false, now
}

func (s *sim) subscribe() {
	servers := s.running()
	if len(servers) == 0 || len(s.streams) > 60 {
		return
	}
	n, room := servers[s.rng.IntN(len(servers))], s.rooms[s.rng.IntN(len(s.rooms))]
	s.born++
	ctx, cancel := context.WithCancel(s.ctx)
	st := &simStream{
		s: s, server: n, room: room, name: fmt.Sprintf("subscriber%d on %s", s.born, n.name), cancel: cancel, began: time.Now(),
		seen: map[string]string{}, seqs: map[string]uint64{}, used: map[*simReason]bool{}, early: s.born%3 > 0,
	}
	s.streams = append(s.streams, st)
	s.noted("%s begins in %s", st.name, room)
	s.calls.Go(func() { st.run(ctx) })
}

func (s *sim) unsubscribe() {
	if len(s.streams) == 0 {
		return
	}
	i := s.rng.IntN(len(s.streams))
	st := s.streams[i]
	st.over = true
	st.cancel()
	s.streams = slices.Delete(s.streams, i, i+1)
}
