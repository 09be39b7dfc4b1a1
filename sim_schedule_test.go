package mesh

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// act has one client, subscriber or administrator do something.
func (s *sim) act() {
	s.mu.Lock()
	list := s.list()
	s.mu.Unlock()
	dice := s.rng.IntN(100)
	if len(list) < 6 || dice < 6 && len(list) < 40 {
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
	case c.busy:
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
	default:
		s.noted("%s falls silent", c.id)
		c.silent, c.seen = true, time.Now()
		_ = c.node.p.Touch(c.id)
		for _, r := range c.joined {
			if ttl := s.ttlOf(r); ttl > 0 {
				s.excuse(simKey{r, c.id}, c.seen.Add(ttl-60*time.Millisecond), "silent")
			}
		}
	}
}

// call runs one of a client's calls beside the schedule. s.mu is held.
func (s *sim) call(c *simClient, what string, f func(ctx context.Context) error, fine ...error) {
	c.busy, c.seen = true, time.Now()
	s.noted("%s %s", c.id, what)
	s.calls.Go(func() {
		err := f(s.ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		c.busy = false
		if err == nil || c.node.dead {
			return
		}
		for _, ok := range append(fine, ErrUnavailable) {
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
	nodes := s.living()
	if len(nodes) == 0 {
		return
	}
	s.born++
	n := nodes[s.rng.IntN(len(nodes))]
	c := &simClient{id: fmt.Sprintf("c%03d", s.born), node: n, metas: map[string]bool{}, meta: fmt.Sprintf(`{"n":%d}`, s.born)}
	c.metas[c.meta] = true
	s.clients[c.id] = c
	room := s.rooms[s.rng.IntN(len(s.rooms))]
	s.arrive(c, room)
	s.call(c, "connects to "+n.name+" and joins "+room, func(ctx context.Context) error {
		if err := n.p.Connect(ctx, c.id, map[string]int{"n": s.bornOf(c)}); err != nil {
			return err
		}
		return n.p.Join(ctx, room, c.id)
	})
}

func (s *sim) bornOf(c *simClient) int {
	var n int
	_, _ = fmt.Sscanf(c.id, "c%d", &n)
	return n
}

func (s *sim) disconnect(c *simClient) {
	s.departAll(c, "disconnected")
	s.call(c, "disconnects", func(ctx context.Context) error { return c.node.p.Disconnect(ctx, c.id) })
}

func (s *sim) join(c *simClient, room string) {
	s.arrive(c, room)
	s.call(c, "joins "+room, func(ctx context.Context) error { return c.node.p.Join(ctx, room, c.id) })
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
		_, err := c.node.p.Leave(ctx, room, c.id)
		if err != nil && !errors.Is(err, ErrUnavailable) || !again {
			return err
		}
		return c.node.p.Join(ctx, room, c.id)
	})
}

func (s *sim) publish(c *simClient) {
	if len(c.joined) == 0 {
		return
	}
	room := c.joined[s.rng.IntN(len(c.joined))]
	now := time.Now()
	var opts StateOptions
	if s.rng.IntN(2) == 0 {
		opts.ExpireAfter = s.between(0.05, 4)
	}
	opts.Silent = s.rng.IntN(8) == 0
	s.born++
	state := fmt.Sprintf(`{"s":%d}`, s.born)
	e := s.entry(simKey{room, c.id})
	e.state, e.changed, e.until, e.hushed = state, now, time.Time{}, opts.Silent
	e.everHid = e.everHid || opts.Silent
	if opts.ExpireAfter > 0 {
		e.until = now.Add(opts.ExpireAfter)
	}
	s.call(c, fmt.Sprintf("publishes %s in %s %+v", state, room, opts), func(ctx context.Context) error {
		return c.node.p.PublishState(ctx, room, c.id, map[string]int{"s": s.number(state)}, opts)
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
	e.state, e.changed, e.hushed = "", time.Now(), false
	s.call(c, "clears its state in "+room, func(ctx context.Context) error { return c.node.p.ClearState(ctx, room, c.id) })
}

// metadata changes a client's metadata, from any server.
func (s *sim) metadata(c *simClient) {
	nodes := s.living()
	n := nodes[s.rng.IntN(len(nodes))]
	s.born++
	meta := fmt.Sprintf(`{"n":%d}`, s.born)
	number := s.born
	c.metas[meta] = true
	s.call(c, "gets metadata "+meta+" on "+n.name, func(ctx context.Context) error {
		err := n.p.Connections().SetMetadata(ctx, c.id, map[string]int{"n": number}, MetadataOptions{})
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case err != nil:
			c.metaBad = true
		case !c.node.dead && !n.dead:
			// An owner that is out of touch may be buried, and its connections'
			// metadata with it; one that hears nothing asks after ten minutes.
			deaf := c.node.link.lossy() || !c.node.bad.IsZero() || c.node.shaky(time.Now())
			c.meta, c.metaBad = meta, n != c.node && deaf
		}
		return err
	}, ErrUnknownConnection, ErrClosed, ErrConflict)
	if n != c.node {
		c.seen = time.Time{} // somebody else's call is no sign of life
	}
}

// wake ends a silence that has lasted for long enough.
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
				_, err := c.node.p.Leave(ctx, room, c.id)
				return err
			})
			return
		}
	}
	s.revive(c, now)
	s.noted("%s wakes up", c.id)
	if err := c.node.p.Touch(c.id); err != nil {
		s.fail("touch %s: %v", c.id, err)
	}
}

// revive has a client's lapsed entries begin anew.
func (s *sim) revive(c *simClient, now time.Time) {
	for _, room := range c.joined {
		if _, over := s.lapsed(c, room, now); over {
			k := simKey{room, c.id}
			e := s.entry(k)
			*e = simEntry{present: true, since: now, changed: now, tickets: e.tickets, everHid: e.everHid}
			s.joinsDue = append(s.joinsDue, simDue{k, now})
		}
	}
	c.silent, c.seen = false, now
}

func (s *sim) subscribe() {
	nodes := s.living()
	if len(nodes) == 0 || len(s.streams) > 60 {
		return
	}
	n, room := nodes[s.rng.IntN(len(nodes))], s.rooms[s.rng.IntN(len(s.rooms))]
	s.born++
	ctx, cancel := context.WithCancel(s.ctx)
	st := &simStream{
		s: s, node: n, room: room, name: fmt.Sprintf("subscriber%d on %s", s.born, n.name), cancel: cancel, began: time.Now(),
		seen: map[string]string{}, seqs: map[string]uint64{}, used: map[*simTicket]bool{},
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

// checkDue checks what has to have been told by now, where nothing stood in
// the way. s.mu is held.
func (s *sim) checkDue(now time.Time) {
	late := func(list []simDue, present bool) []simDue {
		return slices.DeleteFunc(list, func(d simDue) bool {
			bound := 1250 * time.Millisecond
			if c := s.clients[d.k.conn]; c.node.dead {
				bound += s.lease
			}
			if now.Before(d.from.Add(bound)) {
				return false
			}
			if s.active > 0 || d.from.Before(s.disturbed) {
				return true
			}
			f := s.fact(d.k, now)
			if f.present != present || now.Sub(f.since) < bound {
				return true
			}
			for _, st := range s.streams {
				if _, told := st.seen[d.k.conn]; st.room == d.k.room && st.live && !st.over && !st.node.dead && told != present {
					st.fail("not told in time: %s is present=%v since %v", d.k.conn, present, f.since.Sub(s.start))
				}
			}
			return true
		})
	}
	s.leavesDue = late(s.leavesDue, false)
	s.joinsDue = late(s.joinsDue, true)
	for _, e := range s.entries { // what has long been told is a reason no more
		for _, t := range e.tickets {
			if t.until.IsZero() && s.active == 0 && now.After(s.disturbed) && now.Sub(t.from) > s.lease+5*time.Second {
				t.until = now
			}
		}
	}
}

// compare checks that everybody knows what is true, when all is calm.
func (s *sim) compare() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.failure != "" {
		return
	}
	for _, st := range s.streams {
		if st.over || st.node.dead {
			continue
		}
		if !st.live {
			st.fail("has no snapshot since %v", st.began.Sub(s.start))
			continue
		}
		if diff := st.differs(now); diff != "" {
			st.fail("%s", diff)
		}
		if v, ok := st.node.p.n.hub.View(st.room, 0); ok {
			s.compareMembers("mirror on "+st.node.name, st.room, snapshotOf(st.room, v).Members, now)
		} else {
			st.fail("mirror is not in order")
		}
	}
	for _, n := range s.living() {
		for _, room := range s.rooms {
			members, err := n.p.Members(s.ctx, room)
			if err != nil {
				s.fail("members of %s on %s: %v", room, n.name, err)
				return
			}
			s.compareMembers("Redis", room, members, now)
		}
		for tries := 0; n.p.n.owner.Stats().Unwritten > 0; tries++ { // a refresh, perhaps
			if tries == 20 {
				s.fail("%s has something unwritten", n.name)
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func (s *sim) compareMembers(where, room string, members []Member, now time.Time) {
	got := make(map[string]Member, len(members))
	for _, m := range members {
		got[m.ID] = m
		if s.clients[m.ID] == nil {
			s.fail("%s, %s: unknown %s", where, room, m.ID)
		}
	}
	for id, c := range s.clients {
		f := s.fact(simKey{room, id}, now)
		m, present := got[id]
		switch {
		case present != f.present:
			s.fail("%s, %s: %s present=%v, true is %v since %v", where, room, id, present, f.present, f.since.Sub(s.start))
		case present && string(m.State) != f.state:
			s.fail("%s, %s: %s has state %s, true is %s", where, room, id, m.State, f.state)
		case present && c.metaBad && !c.metas[string(m.Metadata)], present && !c.metaBad && string(m.Metadata) != c.meta:
			s.fail("%s, %s: %s has metadata %s, true is %s", where, room, id, m.Metadata, c.meta)
		}
	}
}

// farewell has everybody leave, and looks at what is left in Redis.
func (s *sim) farewell() {
	s.mu.Lock()
	for _, c := range s.list() {
		s.disconnect(c)
	}
	nodes := s.living()
	for _, st := range s.streams {
		st.over = true
		st.cancel()
	}
	s.mu.Unlock()
	time.Sleep(3 * time.Second)
	for _, n := range nodes {
		ctx, cancel := context.WithTimeout(s.ctx, 30*time.Second)
		if err := n.p.Shutdown(ctx); err != nil {
			s.mu.Lock()
			s.fail("shutdown of %s: %v", n.name, err)
			s.mu.Unlock()
		}
		cancel()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.admin.Keys(s.ctx, "*").Val() {
		if key == "mesh:format" || s.admin.PTTL(s.ctx, key).Val() != -1 {
			continue
		}
		what := ""
		switch {
		case strings.Contains(key, "owned"):
			what = fmt.Sprint(s.admin.SMembers(s.ctx, key).Val())
		case strings.Contains(key, "instances"), strings.Contains(key, "dead"):
			what = fmt.Sprint(s.admin.ZRangeWithScores(s.ctx, key, 0, -1).Val())
		default:
			what = fmt.Sprint(s.admin.HGetAll(s.ctx, key).Val())
		}
		s.fail("left in Redis: %s %s", key, what)
	}
}
