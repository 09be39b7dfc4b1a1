package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// simKey is one connection's presence in one room.
type simKey struct{ room, conn string }

// simTicket is a reason for one leave: each subscriber may be told one for it.
type simTicket struct {
	from, until time.Time // until: zero while it is as good as ever
	why         string
}

// simEntry is what ought to be true of a simKey.
type simEntry struct {
	present bool
	since   time.Time // of the last change of present
	state   string
	until   time.Time // of the state; zero: no expiry
	changed time.Time // of the state
	hushed  bool      // the state is silent
	everHid bool      // a silent state was set once
	tickets []*simTicket
}

// simClient is a connection.
type simClient struct {
	id     string
	node   *simNode
	busy   bool // a call is under way
	gone   bool
	silent bool // gives no sign of life since seen
	seen   time.Time
	joined []string // rooms, in the order of joining

	meta    string // the last that was set without an error
	metas   map[string]bool
	metaBad bool // what is there may be another one of metas
}

// simFact is what holds of a simKey at one moment.
type simFact struct {
	present bool
	since   time.Time
	state   string
	stated  time.Time
	hushed  bool
}

func (s *sim) entry(k simKey) *simEntry {
	e := s.entries[k]
	if e == nil {
		e = &simEntry{}
		s.entries[k] = e
	}
	return e
}

// ttlOf is the TTL of the room's rule.
func (s *sim) ttlOf(room string) time.Duration {
	if strings.HasPrefix(room, "ttl") {
		return s.ttl
	}
	return 0
}

// lapsed reports whether silence has ended a client's entry, and when.
func (s *sim) lapsed(c *simClient, room string, now time.Time) (time.Time, bool) {
	ttl := s.ttlOf(room)
	at := c.seen.Add(ttl)
	return at, c.silent && ttl > 0 && !now.Before(at)
}

// fact says what is true. s.mu is held.
func (s *sim) fact(k simKey, now time.Time) simFact {
	e, c := s.entries[k], s.clients[k.conn]
	if e == nil {
		return simFact{}
	}
	f := simFact{present: e.present, since: e.since}
	if at, over := s.lapsed(c, k.room, now); over && e.present {
		return simFact{since: at}
	}
	if e.present {
		f.state, f.stated, f.hushed = e.state, e.changed, e.hushed
		if !e.until.IsZero() && !now.Before(e.until) {
			f.state, f.stated, f.hushed = "", e.until, false
		}
	}
	return f
}

// excuse allows for one leave. s.mu is held.
func (s *sim) excuse(k simKey, from time.Time, why string) {
	e := s.entry(k)
	e.tickets = append(e.tickets, &simTicket{from: from, why: why})
	s.leavesDue = append(s.leavesDue, simDue{k, from})
}

func (s *sim) arrive(c *simClient, room string) {
	e := s.entry(simKey{room, c.id})
	if e.present {
		return
	}
	*e = simEntry{present: true, since: time.Now(), changed: time.Now(), tickets: e.tickets, everHid: e.everHid}
	c.joined = append(c.joined, room)
	s.joinsDue = append(s.joinsDue, simDue{simKey{room, c.id}, time.Now()})
	if c.node.shaky(time.Now()) {
		e.tickets = append(e.tickets, &simTicket{from: time.Now(), why: "joined on a server about to be buried"})
	}
}

// depart ends an entry for good. s.mu is held.
func (s *sim) depart(c *simClient, room, why string) {
	k, now := simKey{room, c.id}, time.Now()
	e := s.entry(k)
	if !e.present {
		return
	}
	if _, over := s.lapsed(c, room, now); !over { // otherwise excused already
		s.excuse(k, now, why)
	}
	e.present, e.since = false, now
	for i, r := range c.joined {
		if r == room {
			c.joined = append(c.joined[:i:i], c.joined[i+1:]...)
		}
	}
}

func (s *sim) departAll(c *simClient, why string) {
	for _, room := range append([]string(nil), c.joined...) {
		s.depart(c, room, why)
	}
	c.gone = true
}

// simStream is one subscription, and what it has been told.
type simStream struct {
	s      *sim
	node   *simNode
	room   string
	name   string
	cancel context.CancelFunc

	// Guarded by sim.mu.
	live    bool // has its snapshot
	over    bool
	began   time.Time
	seen    map[string]string // connection -> state, "": none
	seqs    map[string]uint64
	used    map[*simTicket]bool
	history []string
}

func (st *simStream) run(ctx context.Context) {
	for ev, err := range st.node.p.Subscribe(ctx, st.room, SubscribeOptions{}) {
		st.s.mu.Lock()
		switch {
		case st.node.dead || st.over:
		case err != nil:
			if !st.live && !errors.Is(err, ErrUnavailable) || st.live && ctx.Err() == nil && !errors.Is(err, ErrClosed) {
				st.fail("ended with %v", err)
			}
			st.over = true
		default:
			st.take(ev)
		}
		st.s.mu.Unlock()
	}
	st.s.mu.Lock()
	st.over = true
	st.s.mu.Unlock()
}

func (st *simStream) fail(format string, args ...any) {
	st.s.fail("%s of %s: %s", st.name, st.room, fmt.Sprintf(format, args...))
	for _, line := range st.history[max(0, len(st.history)-40):] {
		st.s.trace = append(st.s.trace, "    told "+line)
	}
}

// take checks what the subscriber is told next. s.mu is held.
func (st *simStream) take(ev Event) {
	now := time.Now()
	line := fmt.Sprintf("[%v] %s %s %s %s/%d repair=%v", st.s.at(), ev.Type, ev.ConnectionID, ev.State, ev.Epoch, ev.Seq, ev.Repair)
	st.history = append(st.history, line)
	if ev.Type != EventSnapshot && !st.live {
		st.fail("first event is %s", line)
		return
	}
	if ev.Seq < st.seqs[ev.Epoch] {
		st.fail("seq went back from %d: %s", st.seqs[ev.Epoch], line)
	}
	st.seqs[ev.Epoch] = ev.Seq
	state, present := st.seen[ev.ConnectionID]
	switch ev.Type {
	case EventSnapshot:
		st.snapshot(ev, now)
	case EventJoin:
		if present {
			st.fail("join of who is present: %s", line)
		}
		st.seen[ev.ConnectionID] = ""
		st.rises(ev.ConnectionID, now)
	case EventLeave:
		if !present {
			st.fail("leave of who is absent: %s", line)
		}
		delete(st.seen, ev.ConnectionID)
		st.excused(ev.ConnectionID, now, line)
	case EventState:
		e := st.s.entry(simKey{st.room, ev.ConnectionID})
		switch {
		case !present:
			st.fail("state of who is absent: %s", line)
		case ev.State == nil && state == "" && !e.everHid:
			st.fail("state null twice: %s", line)
		}
		st.seen[ev.ConnectionID] = string(ev.State)
	}
}

func (st *simStream) snapshot(ev Event, now time.Time) {
	if st.live {
		st.fail("a second snapshot")
	}
	st.live = true
	for _, m := range ev.Snapshot.Members {
		if _, twice := st.seen[m.ID]; twice {
			st.fail("%s twice in a snapshot", m.ID)
		}
		st.history = append(st.history, "    with "+m.ID+" "+string(m.State))
		st.seen[m.ID] = string(m.State)
		if !ev.Snapshot.Stale {
			st.rises(m.ID, now)
		}
	}
}

// excused looks for a reason for a leave that has been told.
func (st *simStream) excused(conn string, now time.Time, line string) {
	e := st.s.entry(simKey{st.room, conn})
	for _, t := range e.tickets {
		if !st.used[t] && !now.Before(t.from) && (t.until.IsZero() || !now.After(t.until)) {
			st.used[t] = true
			return
		}
	}
	st.fail("%s was told to have left, without a reason: %s", conn, line)
	for _, t := range e.tickets {
		st.s.trace = append(st.s.trace, fmt.Sprintf("    reason %s from %v until %v used %v", t.why,
			t.from.Sub(st.s.start), t.until.Sub(st.s.start), st.used[t]))
	}
}

// rises checks that nobody is told to be present who left long ago.
func (st *simStream) rises(conn string, now time.Time) {
	s := st.s
	c := s.clients[conn]
	if c == nil {
		st.fail("unknown connection %q", conn)
		return
	}
	f := s.fact(simKey{st.room, conn}, now)
	if f.present {
		return
	}
	known := f.since
	for _, t := range []time.Time{c.node.sick, st.node.sick, s.sick, s.ghosts} {
		if t.After(known) {
			known = t
		}
	}
	if now.Sub(known) > s.lease+5*time.Second {
		st.fail("resurrection of %s, who left %v ago", conn, now.Sub(f.since))
	}
}

// differs says how what the subscriber was told differs from what is true.
func (st *simStream) differs(now time.Time) string {
	for conn := range st.s.clients {
		f := st.s.fact(simKey{st.room, conn}, now)
		state, present := st.seen[conn]
		switch {
		case present != f.present:
			return fmt.Sprintf("%s: told present=%v, true is %v since %v", conn, present, f.present, f.since.Sub(st.s.start))
		case present && !f.hushed && state != f.state:
			return fmt.Sprintf("%s: told state %q, true is %q since %v", conn, state, f.state, f.stated.Sub(st.s.start))
		}
	}
	return ""
}
