package sim

import (
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
	unsure  bool      // the state may have ended with a stall of its server
	tickets []*simTicket
}

// simClient is a connection.
type simClient struct {
	id     string
	node   *simNode
	socket bool // its joins are answered as those of sockets are
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
	unsure  bool // or there is no state
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

// has reports whether a state is the true one.
func (f simFact) has(state string) bool { return state == f.state || f.unsure && state == "" }

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
		f.state, f.stated, f.hushed, f.unsure = e.state, e.changed, e.hushed, e.unsure
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
