package sim

import (
	"strings"
	"time"
)

// simKey identifies an entry by its room and connection.
type simKey struct{ room, conn string }

// simReason is a reason for a leave. Each subscriber may receive one leave for it.
type simReason struct {
	from, until time.Time // until is zero while the reason has not ended
	text        string
}

// simEntry is the true entry of a simKey.
type simEntry struct {
	present        bool
	since          time.Time // last change of present
	state          string
	until          time.Time // end of the state; zero without expiry
	changed        time.Time // last change of the state
	silentState    bool      // the state is silent
	hadSilentState bool      // a silent state was set before
	unsure         bool      // the state may have ended when its server stalled
	reasons        []*simReason
}

// simClient is a connection.
type simClient struct {
	id     string
	server *simServer
	socket bool // joins are answered like those of sockets
	busy   bool // a call is in progress
	gone   bool
	silent bool // no sign of life since seen
	seen   time.Time
	joined []string // rooms, in the order of the joins

	meta    string          // the last metadata that were set without an error
	metas   map[string]bool // all metadata so far
	metaBad bool            // any element of metas may be stored
}

// simFact is the true state of a simKey at one moment.
type simFact struct {
	present     bool
	since       time.Time
	state       string
	stated      time.Time
	silentState bool
	unsure      bool // the state may have ended
}

func (s *sim) entry(k simKey) *simEntry {
	e := s.entries[k]
	if e == nil {
		e = &simEntry{}
		s.entries[k] = e
	}
	return e
}

// ttlOf returns the TTL of the room's rule.
func (s *sim) ttlOf(room string) time.Duration {
	if strings.HasPrefix(room, "ttl") {
		return s.ttl
	}
	return 0
}

// lapsed reports whether silence has ended a client's entry, and returns the time.
func (s *sim) lapsed(c *simClient, room string, now time.Time) (time.Time, bool) {
	ttl := s.ttlOf(room)
	at := c.seen.Add(ttl)
	return at, c.silent && ttl > 0 && !now.Before(at)
}

// has reports whether a state is true.
func (f simFact) has(state string) bool { return state == f.state || f.unsure && state == "" }

// fact returns the truth. s.mu is held.
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
		f.state, f.stated, f.silentState, f.unsure = e.state, e.changed, e.silentState, e.unsure
		if !e.until.IsZero() && !now.Before(e.until) {
			f.state, f.stated, f.silentState = "", e.until, false
		}
	}
	return f
}

// allowLeave allows one leave per subscriber, which is also due. s.mu is held.
func (s *sim) allowLeave(k simKey, from time.Time, why string) {
	e := s.entry(k)
	e.reasons = append(e.reasons, &simReason{from: from, text: why})
	s.leavesDue = append(s.leavesDue, simDue{k, from})
}

func (s *sim) arrive(c *simClient, room string) {
	e := s.entry(simKey{room, c.id})
	if e.present {
		return
	}
	*e = simEntry{present: true, since: time.Now(), changed: time.Now(), reasons: e.reasons, hadSilentState: e.hadSilentState}
	c.joined = append(c.joined, room)
	s.joinsDue = append(s.joinsDue, simDue{simKey{room, c.id}, time.Now()})
	if c.server.shaky(time.Now()) {
		e.reasons = append(e.reasons, &simReason{from: time.Now(), text: "joined on a server that may be declared dead"})
	}
}

// depart ends an entry. s.mu is held.
func (s *sim) depart(c *simClient, room, why string) {
	k, now := simKey{room, c.id}, time.Now()
	e := s.entry(k)
	if !e.present {
		return
	}
	if _, over := s.lapsed(c, room, now); !over { // otherwise the leave is allowed already
		s.allowLeave(k, now, why)
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
