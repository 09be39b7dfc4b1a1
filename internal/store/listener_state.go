package store

import (
	"sync"

	"github.com/redis/go-redis/v9"
)

// subject is what can be subscribed to: a channel, or a pattern of channels.
type subject struct {
	name    string
	pattern bool
}

// subscription is what is wanted of one subject, and what was done for it on
// the present connection. Adds are numbered, so that the confirmation of a
// SUBSCRIBE sent for an earlier Add (removed and added again since) is not
// taken for one of the later.
type subscription struct {
	wanted    uint64        // number of the Add that wants it; 0: nobody does
	sent      uint64        // number of the Add that SUBSCRIBE was last sent for; 0: not subscribed
	confirmed bool          // that SUBSCRIBE was for wanted, and is confirmed
	reported  bool          // Subscribed was called for wanted, on this connection or one before
	ready     chan struct{} // closed on confirmation or Remove; nil: nobody waits
}

// subscriptions is the wanted set and its state on the present connection.
type subscriptions struct {
	mu     sync.Mutex // guards all below
	adds   uint64
	wanted int // entries that are wanted
	all    map[subject]*subscription
	dirty  map[subject]struct{} // may need a command
	flying map[subject]struct{} // named by the command in flight, not confirmed yet
	kind   string               // of the command in flight
	last   error                // why the connection before this one ended
}

// batch is one command: "subscribe", "psubscribe" or "unsubscribe" of names.
type batch struct {
	kind  string
	names []string
}

func (s *subscriptions) init(patterns []string) {
	s.all = make(map[subject]*subscription)
	s.dirty = make(map[subject]struct{})
	s.flying = make(map[subject]struct{})
	for _, p := range patterns {
		s.want(subject{p, true})
	}
}

func (s *subscriptions) add(channels []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range channels {
		s.want(subject{c, false})
	}
}

func (s *subscriptions) want(k subject) {
	e := s.all[k]
	if e == nil {
		e = &subscription{}
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

func (s *subscriptions) remove(channels []string) {
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
		e.release()
		s.dirty[k] = struct{}{}
	}
}

// release wakes who waits in Ready.
func (e *subscription) release() {
	if e.ready != nil {
		close(e.ready)
		e.ready = nil
	}
}

// next returns the next command to send, and notes it as in flight; idle says
// that none was in flight before.
func (s *subscriptions) next() (b batch, idle bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.flying) > 0 {
		return batch{}, false
	}
	for _, kind := range []string{"subscribe", "psubscribe", "unsubscribe"} {
		b.kind = kind
		for k := range s.dirty {
			e := s.all[k]
			switch s.needs(k, e) {
			case kind:
				b.names = append(b.names, k.name)
				s.flying[k] = struct{}{}
				delete(s.dirty, k)
				if e.wanted != 0 {
					e.sent = e.wanted
				}
			case "":
				s.settle(k, e)
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

// needs names the command that brings k to where it is wanted.
func (s *subscriptions) needs(k subject, e *subscription) string {
	switch {
	case e.wanted == e.sent:
		return ""
	case e.wanted == 0:
		return "unsubscribe" // patterns are never removed
	case k.pattern:
		return "psubscribe"
	default:
		// Also where an earlier Add's subscription still stands: Redis
		// confirms a second SUBSCRIBE like the first, and nothing is missed
		// in between.
		return "subscribe"
	}
}

// settle forgets that k may need a command, and k itself if nobody wants it.
func (s *subscriptions) settle(k subject, e *subscription) {
	delete(s.dirty, k)
	if e.wanted == 0 {
		delete(s.all, k)
	}
}

// confirm takes note of what Redis answered. It says whether the handler must
// hear of it, and whether nothing is in flight any more.
func (s *subscriptions) confirm(m *redis.Subscription) (report, again, idle bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := subject{m.Channel, m.Kind == "psubscribe" || m.Kind == "punsubscribe"}
	if m.Kind == s.kind {
		delete(s.flying, k)
	}
	if e := s.all[k]; e != nil {
		switch m.Kind {
		case "subscribe", "psubscribe":
			// Not so where it was removed, or removed and added again, since
			// this SUBSCRIBE was sent: then next sends what is needed.
			if report = e.wanted != 0 && e.wanted == e.sent; report {
				again = e.reported
				e.confirmed, e.reported = true, true
				e.release()
			}
		case "unsubscribe", "punsubscribe":
			e.sent, e.confirmed = 0, false
			s.dirty[k] = struct{}{} // forgotten there, or subscribed to anew
		}
	}
	return report, again, len(s.flying) == 0
}

// live reports whether the handler is to hear m: it is wanted, and the
// subscription that it came by is confirmed.
func (s *subscriptions) live(m *redis.Message) bool {
	k := subject{m.Channel, false}
	if m.Pattern != "" {
		k = subject{m.Pattern, true}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.all[k]
	return e != nil && e.confirmed
}

// reset forgets the connection, which ended because of err.
func (s *subscriptions) reset(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = err
	clear(s.flying)
	for k, e := range s.all {
		e.sent, e.confirmed = 0, false
		s.dirty[k] = struct{}{}
	}
}

func (s *subscriptions) anyWanted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wanted > 0
}

// waiting returns nil if name (a channel or a pattern) is confirmed, else what
// to wait for before asking again.
func (s *subscriptions) waiting(name string) (<-chan struct{}, error) {
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

func (s *subscriptions) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}
