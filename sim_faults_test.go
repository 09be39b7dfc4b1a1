package mesh

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// simFault is something that can go wrong.
type simFault struct {
	name  string
	calm  bool // bounds hold all the same
	begin func(s *sim)
}

func simFaultList() []simFault {
	return []simFault{
		{"kill", true, (*sim).kill},
		{"start", true, (*sim).startNode},
		{"stop", true, (*sim).stopNode},
		{"scriptflush", true, func(s *sim) { s.admin.ScriptFlush(s.ctx) }},
		{"lose", true, (*sim).loseReplies},
		{"hints", true, (*sim).falseHints},
		{"cutshort", false, func(s *sim) { s.partition(true, 0.1, 0.9) }},
		{"cutlong", false, func(s *sim) { s.partition(true, 2, 8) }},
		{"hangshort", false, func(s *sim) { s.partition(false, 0.1, 0.9) }},
		{"hanglong", false, func(s *sim) { s.partition(false, 3, 10) }},
		{"overdue", false, (*sim).overdue},
		{"cutall", false, (*sim).cutAll},
		{"hangall", false, (*sim).hangAll},
		{"error", false, (*sim).errors},
		{"flushall", false, (*sim).flushAll},
		{"restart", false, (*sim).restart},
		{"rollback", false, (*sim).rollback},
		{"clock", false, (*sim).stepClock},
		{"loss", false, (*sim).loseMessages},
		{"hold", false, (*sim).holdJoin},
		{"flap", false, (*sim).flap},
	}
}

// pickFaults chooses what may go wrong in this run: each seed something else,
// so that one fault does not always hide another.
func (s *sim) pickFaults() []simFault {
	all := simFaultList()
	calm := s.rng.IntN(4) == 0
	var menu []simFault
	for _, f := range all {
		chosen := s.rng.IntN(3) == 0
		switch {
		case *simFaults != "":
			chosen = slices.Contains(strings.Split(*simFaults, ","), f.name)
		case calm:
			chosen = f.calm
		}
		if chosen {
			menu = append(menu, f)
		}
	}
	return menu
}

// disturb notes that bounds do not hold until a while after undo, which is
// called after d (nil: at once).
func (s *sim) disturb(d time.Duration, undo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if undo == nil {
		s.calmAfter(d)
		return
	}
	s.active++
	s.later = append(s.later, simLater{time.Now().Add(d + time.Duration(len(s.later))), func() {
		undo()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.active--
		s.calmAfter(s.recovery())
	}})
}

// recovery is how long everything may take to be as it should after a fault:
// patience, a burial, the comparison every ten seconds.
func (s *sim) recovery() time.Duration { return 3*s.lease + 15*time.Second }

func (s *sim) calmAfter(d time.Duration) {
	if at := time.Now().Add(d); at.After(s.disturbed) {
		s.disturbed = at
	}
}

// apply brings a server's faults about. s.mu is held.
func (n *simNode) apply() {
	n.link.set(n.dead || n.cut || n.s.allCut, n.hang || n.s.allHang)
	bad := n.cut || n.hang || n.s.allCut || n.s.allHang
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
	n.own = n.own || n.cut || n.hang
}

// watchHealth notes who has been out of touch for so long that others may
// have ended its entries. s.mu is held.
func (s *sim) watchHealth(now time.Time) {
	if s.allCut || s.allHang {
		s.sick = now
	}
	for _, n := range s.living() {
		if n.bad.IsZero() {
			continue
		}
		n.sick = now
		// A third of it may have passed before, and once nobody could dial the
		// client library waits for up to a second before it tries again.
		spare := min(s.lease*6/10, (s.ttl+time.Second)*6/10-500*time.Millisecond) - 100*time.Millisecond
		if n.cut {
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

// pickNode returns a living server. s.mu is held.
func (s *sim) pickNode() *simNode {
	nodes := s.living()
	if len(nodes) == 0 {
		return nil
	}
	return nodes[s.rng.IntN(len(nodes))]
}

// kill ends a server without goodbye.
func (s *sim) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickNode()
	others := slices.DeleteFunc(s.living(), func(o *simNode) bool { return o == n || time.Since(o.born) < 2*s.lease })
	if n == nil || len(others) == 0 {
		return
	}
	s.noted("kill %s", n.name)
	n.dead = true
	n.apply()
	for _, c := range s.list() {
		if c.node == n {
			s.departAll(c, "its server was killed")
		}
	}
	s.calls.Go(func() { // its goroutines end; nothing of it gets out
		ctx, cancel := context.WithCancel(s.ctx)
		cancel()
		_ = n.p.Shutdown(ctx)
	})
}

// stopNode shuts a server down in order.
func (s *sim) stopNode() {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickNode()
	if n == nil || len(s.living()) < 2 || !n.bad.IsZero() || s.active > 0 {
		return
	}
	of := slices.DeleteFunc(s.list(), func(c *simClient) bool { return c.node != n })
	if slices.ContainsFunc(of, func(c *simClient) bool { return c.busy }) {
		return
	}
	for _, c := range of {
		s.departAll(c, "its server was shut down")
	}
	s.noted("stop %s", n.name)
	n.dead = true // but for its connections
	s.calls.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
		defer cancel()
		_ = n.p.Shutdown(ctx)
	})
}

func (s *sim) partition(cut bool, low, high float64) {
	s.outOfTouch(s.between(low, high), cut)
}

// overdue keeps a server out of touch until its keys with a TTL have run out
// and others have ended its entries, but not for so long that it is buried.
func (s *sim) overdue() {
	d := s.ttl + 1400*time.Millisecond
	if d > s.lease*2/3 {
		d = s.between(1, 2)
	}
	s.outOfTouch(d, false)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.later = append(s.later, simLater{time.Now().Add(d - 350*time.Millisecond - time.Duration(len(s.later))), s.falseHints})
}

func (s *sim) outOfTouch(d time.Duration, cut bool) {
	s.mu.Lock()
	n := s.pickNode()
	if n == nil || n.cut || n.hang {
		s.mu.Unlock()
		return
	}
	s.noted("%s out of touch for %v, cut %v", n.name, d, cut)
	n.cut, n.hang = cut, !cut
	n.apply()
	s.mu.Unlock()
	s.disturb(d, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.noted("%s in touch", n.name)
		n.cut, n.hang = false, false
		n.apply()
	})
}

// setAll cuts all servers off, or lets them back.
func (s *sim) setAll(cut bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.allCut = cut
	s.sick = time.Now()
	for _, n := range s.nodes {
		n.apply()
	}
	s.noted("all cut off: %v", cut)
}

func (s *sim) cutAll() {
	if s.allCut {
		return
	}
	s.setAll(true)
	s.disturb(s.between(0.1, 3*s.lease.Seconds()), func() { s.setAll(false) })
}

func (s *sim) hangAll() {
	if s.allHang {
		return
	}
	set := func(hang bool) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.allHang, s.sick = hang, time.Now()
		for _, n := range s.nodes {
			n.apply()
		}
		s.noted("all hang: %v", hang)
	}
	set(true)
	s.disturb(s.between(0.1, 3*s.lease.Seconds()), func() { set(false) })
}

func (s *sim) errors() {
	text := []string{
		"OOM command not allowed when used memory > 'maxmemory'.", "TRYAGAIN Multiple keys request during rehashing of slot",
		"LOADING Redis is loading the dataset in memory", "READONLY You can't write against a read only replica.",
	}[s.rng.IntN(4)]
	s.note("redis says %s", text)
	s.mem.SetError(text)
	s.disturb(s.between(0.1, 2*s.lease.Seconds()), func() {
		s.mem.SetError("")
		s.mu.Lock()
		s.sick = time.Now()
		s.mu.Unlock()
	})
}

// lost notes that Redis lost data: metadata that another server set may be
// among it.
func (s *sim) lost(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noted("%s", what)
	s.sick = time.Now()
	for _, c := range s.clients {
		c.metaBad = true
	}
}

func (s *sim) flushAll() {
	s.mem.FlushAll()
	s.lost("flushall")
	s.disturb(s.recovery(), nil)
}

func (s *sim) restart() {
	if err := s.mem.Restart(); err != nil {
		panic(err)
	}
	s.lost("restart")
	s.disturb(s.recovery(), nil)
}

// stepClock sets Redis's clock. Two steps that cancel each other out between
// two renewals are not noticed by who made none in between.
func (s *sim) stepClock() {
	if time.Since(s.stepped) < 2*s.lease {
		return
	}
	s.stepped = time.Now()
	d := 30 * time.Second
	if s.rng.IntN(2) == 0 {
		d = -d
	}
	s.note("redis's clock steps by %v", d)
	s.mem.Advance(d)
	wait := s.recovery()
	if d < 0 {
		wait -= d // leases of the dead last longer by it
	}
	s.mu.Lock()
	s.sick = time.Now().Add(max(0, -d))
	s.mu.Unlock()
	s.disturb(wait, nil)
}

func (s *sim) loseMessages() {
	s.mu.Lock()
	var hit []*simNode
	for _, n := range s.living() {
		if s.rng.IntN(2) == 0 {
			hit = append(hit, n)
		}
	}
	part := s.rng.Float64()
	s.noted("messages get lost at %d servers, %.2f", len(hit), part)
	s.mu.Unlock()
	set := func(loss float64) {
		for _, n := range hit {
			n.link.mu.Lock()
			n.link.loss = loss
			n.link.mu.Unlock()
		}
	}
	set(part)
	s.disturb(s.between(0.2, 6), func() { set(0) })
}

func (s *sim) loseReplies() {
	s.mu.Lock()
	n := s.pickNode()
	s.mu.Unlock()
	if n == nil {
		return
	}
	n.link.mu.Lock()
	defer n.link.mu.Unlock()
	n.link.lose = 1 + s.rng.IntN(2)
}

// holdJoin has the next join of a server sit in a proxy. Its lane waits for up
// to 1.8 s for the answer: the keys of a TTL below that run out meanwhile.
func (s *sim) holdJoin() {
	if s.ttl < 3*time.Second {
		return
	}
	s.mu.Lock()
	n := s.pickNode()
	s.mu.Unlock()
	if n == nil {
		return
	}
	d := s.between(0.5, 12)
	n.link.mu.Lock()
	n.link.hold = d
	n.link.mu.Unlock()
	s.disturb(d+5*time.Second, func() {
		n.link.mu.Lock()
		n.link.hold = 0
		n.link.mu.Unlock()
	})
}

func (s *sim) flap() {
	s.note("connections are cut once")
	s.mu.Lock()
	nodes := s.living()
	s.mu.Unlock()
	for _, n := range nodes {
		if s.rng.IntN(2) == 0 {
			n.link.flap()
		}
	}
	s.disturb(s.recovery(), nil)
}

// falseHints tells of keys that have not run out.
func (s *sim) falseHints() {
	s.note("false hints")
	s.mu.Lock()
	var keys []string
	for _, c := range s.list() {
		for _, room := range c.joined {
			keys = append(keys, s.nodes[0].p.n.keys.Conn(room, c.id), s.nodes[0].p.n.keys.State(room, c.id))
		}
	}
	s.mu.Unlock()
	for _, key := range keys {
		s.mem.Mini().Publish("__keyevent@0__:expired", key)
	}
}

var simDump = redis.NewScript(`
local out = {}
for _, k in ipairs(redis.call('KEYS', '*')) do
  local t = redis.call('TYPE', k)['ok']
  local v = {}
  if t == 'string' then v = { redis.call('GET', k) }
  elseif t == 'hash' then v = redis.call('HGETALL', k)
  elseif t == 'set' then v = redis.call('SMEMBERS', k)
  elseif t == 'zset' then v = redis.call('ZRANGE', k, 0, -1, 'WITHSCORES') end
  out[#out + 1] = { k, t, redis.call('PTTL', k), v }
end
return out`)

// rollback is a failover to a replica that lagged by some seconds.
func (s *sim) rollback() {
	if s.allCut || s.active > 0 {
		return
	}
	keys, err := simDump.Run(s.ctx, s.admin, nil).Slice()
	if err != nil {
		s.note("no copy: %v", err)
		return
	}
	taken := time.Now()
	behind, away := s.between(0, 5), s.between(0.01, 2)
	s.note("a copy for a failover in %v", behind)
	s.disturb(behind, func() {
		if s.allCut {
			return
		}
		s.setAll(true)
		cut := time.Now()
		s.disturb(away, func() {
			s.restore(keys, taken, cut)
			s.mem.NewRunID()
			s.setAll(false)
		})
	})
}

// restore makes Redis hold what a copy holds. Who was not present when Redis
// went away may come back as a ghost, and be told to have left once more.
func (s *sim) restore(keys []any, taken, cut time.Time) {
	s.mem.FlushAll()
	old := time.Since(taken).Milliseconds()
	pipe := s.admin.Pipeline()
	for _, row := range keys {
		f := row.([]any)
		key, kind, ttl, values := f[0].(string), f[1].(string), f[2].(int64), f[3].([]any)
		if ttl >= 0 && ttl <= old {
			continue
		}
		switch kind {
		case "string":
			pipe.Set(s.ctx, key, values[0], 0)
		case "hash":
			pipe.HSet(s.ctx, key, values...)
		case "set":
			pipe.SAdd(s.ctx, key, values...)
		case "zset":
			for i := 0; i < len(values); i += 2 {
				score, _ := strconv.ParseFloat(values[i+1].(string), 64)
				pipe.ZAdd(s.ctx, key, redis.Z{Member: values[i], Score: score})
			}
		}
		if ttl > 0 {
			pipe.PExpire(s.ctx, key, time.Duration(ttl-old)*time.Millisecond)
		}
	}
	if _, err := pipe.Exec(s.ctx); err != nil {
		s.note("restore: %v", err)
	}
	s.lost("rolled back by " + time.Since(taken).String())
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ghosts = time.Now().Add(s.recovery())
	for k := range s.entries {
		if f := s.fact(k, time.Now()); !f.present || f.since.After(cut) {
			e := s.entry(k)
			e.tickets = append(e.tickets, &simTicket{from: time.Now(), why: "a ghost"})
		}
	}
}
