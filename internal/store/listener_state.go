package store

import (
	"sync"

	"github.com/redis/go-redis/v9"
)

// subject is the target of a subscription: a channel or a pattern of channels.
type subject struct {
	name    string
	pattern bool
}

// channelSub is the wanted and the actual state of one subject on the current
// connection. Adds are numbered, because a channel may be removed and added again: then
// the confirmation of the earlier SUBSCRIBE does not count for the later Add.
type channelSub struct {
	wanted    uint64        // number of the Add that wants it; 0: not wanted
	sent      uint64        // number of the Add of the last SUBSCRIBE; 0: not subscribed
	confirmed bool          // that SUBSCRIBE was for wanted and is confirmed
	reported  bool          // Subscribed was called for wanted, on this connection or an earlier one
	ready     chan struct{} // closed on confirmation or Remove; nil: no Ready waits
}

// channelSubs is the set of wanted subjects and its state on the current connection.
type channelSubs struct {
	mu       sync.Mutex // guards the fields below
	adds     uint64
	wanted   int // number of wanted subjects
	all      map[subject]*channelSub
	dirty    map[subject]struct{} // may need a command
	inflight map[subject]struct{} // named by the command in flight, not confirmed yet
	kind     string               // of the command in flight
	last     error                // reason for the end of the last connection
}

// command is one command: "subscribe", "psubscribe" or "unsubscribe" with names.
type command struct {
	kind  string
	names []string
}

func (s *channelSubs) init(patterns []string) {
	s.all = make(map[subject]*channelSub)
	s.dirty = make(map[subject]struct{})
	s.inflight = make(map[subject]struct{})
	for _, p := range patterns {
		s.want(subject{p, true})
	}
}

func (s *channelSubs) add(channels []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range channels {
		s.want(subject{c, false})
	}
}

func (s *channelSubs) want(k subject) {
	e := s.all[k]
	if e == nil {
		e = &channelSub{}
		s.all[k] = e
	}
	if e.wanted != 0 {
		return
	}
	s.adds++
	s.wanted++
	e.wanted, e.confirmed, e.reported = s.adds, false, false
	s.dirty[k] = struct{}{}
}

func (s *channelSubs) remove(channels []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range channels {
		k := subject{c, false}
		e := s.all[k]
		if e == nil || e.wanted == 0 {
			continue
		}
		s.wanted--
		e.wanted, e.confirmed, e.reported = 0, false, false
		e.wakeReady()
		s.dirty[k] = struct{}{}
	}
}

// wakeReady wakes the callers that wait in Ready.
func (e *channelSub) wakeReady() {
	if e.ready != nil {
		close(e.ready)
		e.ready = nil
	}
}

// next returns the next command to send, and marks it as in flight. idle is true if no
// other command was in flight.
func (s *channelSubs) next() (b command, idle bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.inflight) > 0 {
		return command{}, false
	}
	for _, kind := range []string{"subscribe", "psubscribe", "unsubscribe"} {
		b.kind = kind
		for k := range s.dirty {
			e := s.all[k]
			switch s.needs(k, e) {
			case kind:
				b.names = append(b.names, k.name)
				s.inflight[k] = struct{}{}
				delete(s.dirty, k)
				if e.wanted != 0 {
					e.sent = e.wanted
				}
			case "":
				s.confirmSent(k, e)
			}
			if len(b.names) == maxNames {
				break
			}
		}
		if len(b.names) > 0 {
			s.kind = kind
			break
		}
	}
	return b, true
}

// needs returns the kind of command that k needs to be as wanted.
func (s *channelSubs) needs(k subject, e *channelSub) string {
	switch {
	case e.wanted == e.sent:
		return ""
	case e.wanted == 0:
		return "unsubscribe" // patterns are never removed
	case k.pattern:
		return "psubscribe"
	default:
		// This is also sent if the subscription of an earlier Add still exists: Redis
		// confirms a second SUBSCRIBE like the first, and no message is missed in
		// between.
		return "subscribe"
	}
}

// confirmSent records that k needs no command, and forgets k if it is not wanted.
func (s *channelSubs) confirmSent(k subject, e *channelSub) {
	delete(s.dirty, k)
	if e.wanted == 0 {
		delete(s.all, k)
	}
}

// confirm processes a confirmation by Redis. report means that the handler must be
// called, idle that no command is in flight any more.
func (s *channelSubs) confirm(m *redis.Subscription) (report, again, idle bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := subject{m.Channel, m.Kind == "psubscribe" || m.Kind == "punsubscribe"}
	if m.Kind == s.kind {
		delete(s.inflight, k)
	}
	if e := s.all[k]; e != nil {
		switch m.Kind {
		case "subscribe", "psubscribe":
			// If the subject was removed since this SUBSCRIBE was sent, next sends the
			// command that it needs now.
			if report = e.wanted != 0 && e.wanted == e.sent; report {
				again = e.reported
				e.confirmed, e.reported = true, true
				e.wakeReady()
			}
		case "unsubscribe", "punsubscribe":
			e.sent, e.confirmed = 0, false
			s.dirty[k] = struct{}{} // next forgets it, or subscribes again
		}
	}
	return report, again, len(s.inflight) == 0
}

// deliverable reports whether to pass m to the handler: its subject is wanted and its
// subscription is confirmed.
func (s *channelSubs) deliverable(m *redis.Message) bool {
	k := subject{m.Channel, false}
	if m.Pattern != "" {
		k = subject{m.Pattern, true}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.all[k]
	return e != nil && e.confirmed
}

// reset forgets the state of the connection, which ended with err.
func (s *channelSubs) reset(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = err
	clear(s.inflight)
	for k, e := range s.all {
		e.sent, e.confirmed = 0, false
		s.dirty[k] = struct{}{}
	}
}

func (s *channelSubs) anyWanted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wanted > 0
}

// waiting returns nil if name (a channel or a pattern) is confirmed. Otherwise it
// returns a channel to wait for before asking again.
func (s *channelSubs) waiting(name string) (<-chan struct{}, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.all[subject{name, false}]
	if e == nil {
		e = s.all[subject{name, true}]
	}
	switch {
	case e == nil, e.wanted == 0:
		return nil, ErrNotWanted
	case e.confirmed:
		return nil, nil
	case e.ready == nil:
		e.ready = make(chan struct{})
	}
	return e.ready, nil
}

func (s *channelSubs) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}
