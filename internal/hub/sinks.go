package hub

import "github.com/meshpresence/mesh/internal/wire"

// Sink is a subscriber. Its dynamic type must be comparable (a pointer).
type Sink interface {
	// Deliver is called for each update of a watched room, in order per room, from
	// any goroutine. It must not block and must not call the hub, because the mirror
	// is locked. To end the subscription, call Hub.Unwatch from another goroutine.
	// After Unwatch has returned, Deliver is not called again.
	Deliver(u *wire.Update)
}

// sinks are the sinks of a mirror.
type sinks struct {
	list []Sink
	at   map[Sink]int // index in list
}

// has reports whether a sink is there.
func (s *sinks) has(sink Sink) bool {
	_, ok := s.at[sink]
	return ok
}

// add adds a sink. It returns false if the sink was there already.
func (s *sinks) add(sink Sink) bool {
	if _, ok := s.at[sink]; ok {
		return false
	}
	if s.at == nil {
		s.at = make(map[Sink]int)
	}
	s.at[sink] = len(s.list)
	s.list = append(s.list, sink)
	return true
}

// remove removes a sink. It returns false if the sink was not there.
func (s *sinks) remove(sink Sink) bool {
	i, ok := s.at[sink]
	if !ok {
		return false
	}
	last := len(s.list) - 1
	s.list[i] = s.list[last]
	s.at[s.list[i]] = i
	s.list[last] = nil
	s.list = s.list[:last]
	delete(s.at, sink)
	return true
}
