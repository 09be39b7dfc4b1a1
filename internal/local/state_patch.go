package local

import (
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/wire"
)

// PatchState is SetState with the newest state of the connection in room, into which the
// top-level keys of patch, a JSON object, are merged. null removes a key. The keys that
// patch sets end after expireAfter (0: never), and keys that it does not name keep their
// ends. If no key is left, the state ends.
//
// If the merged state is larger than limit (negative: none), nothing changes, and the
// error wraps errs.TooLarge.
func (c *Conn) PatchState(room string, patch []byte, expireAfter time.Duration, silent bool, limit int) (Write, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || !e.wanted() {
		return Write{}, ErrNotPresent
	}
	s := e.patched(patch, expireAfter)
	if limit >= 0 && len(s.data) > limit {
		return Write{}, fmt.Errorf("%w: presence state of %d bytes, limit %d", errs.TooLarge, len(s.data), limit)
	}
	s.silent, s.awaited = silent && !e.supersedesDelivery(), true
	return e.publish(s), nil
}

// patched returns the newest state with the keys of patch. Conn.mu is held.
func (e *entry) patched(patch []byte, expireAfter time.Duration) state {
	now := time.Since(e.c.registry.madeAt)
	o, ends := e.state.at(now)
	end := now + expireAfter
	if expireAfter <= 0 || end < now { // no end, or one that no server lives to see
		end = 0
	}
	for name, set := range o.Patch(wire.ParseObject(patch)) {
		if set && end > 0 {
			ends[name] = end
		} else {
			delete(ends, name)
		}
	}
	return stateOf(&o, ends)
}

// supersedesDelivery reports whether the next state takes the place of one that waits to
// be delivered. A silent patch then has to be delivered, too, because it contains the keys
// of the state before it. Conn.mu is held.
func (e *entry) supersedesDelivery() bool {
	s := &e.state
	return s.rev > 0 && !s.silent && e.stateWritten < s.version && (e.interval > 0 || !s.awaited)
}

// at returns the keys of a state at a time, and the ends of those that have one.
func (s *state) at(now time.Duration) (wire.Object, map[string]time.Duration) {
	o, ends := wire.ParseObject(s.data), make(map[string]time.Duration)
	for name := range o.Names() {
		end := s.ends[name]
		if s.ends == nil {
			end = s.until
		}
		switch {
		case end > now:
			ends[name] = end
		case end > 0:
			o.Remove(name)
		}
	}
	return o, ends
}

// stateOf returns a state with these keys and ends. Like a state as a whole, it has an end
// if each of its keys has one, and needs no others if they are all the same.
func stateOf(o *wire.Object, ends map[string]time.Duration) state {
	s := state{data: o.JSON()}
	if len(ends) == 0 {
		return s
	}
	first, last := span(ends)
	if len(ends) == o.Len() {
		s.until = last
	}
	if s.until == 0 || first < last {
		s.ends = ends
	}
	return s
}

// span returns the first and the last of the ends.
func span(ends map[string]time.Duration) (first, last time.Duration) {
	for _, end := range ends {
		if first == 0 || end < first {
			first = end
		}
		last = max(last, end)
	}
	return first, last
}

// nextEnd returns the time at which the state or a key of it ends; 0: never.
func (s *state) nextEnd() time.Duration {
	if s.ends == nil {
		return s.until
	}
	first, _ := span(s.ends)
	return first
}

// endKeys publishes the newest state without the keys whose end has come. Conn.mu is held.
func (e *entry) endKeys() {
	now := time.Since(e.c.registry.madeAt)
	if e.state.nextEnd() > now {
		e.armExpiry()
		return
	}
	o, ends := e.state.at(now)
	s := stateOf(&o, ends)
	// The end of a whole state is not paced. Ends of single keys are, because a state can
	// have many.
	s.immediate = s.data == nil
	e.setState(s)
	e.armExpiry()
}
