package local

import (
	"context"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// state is a state of an entry. The version rises with every change.
type state struct {
	version uint64
	rev     uint64        // of the entry with this state
	data    []byte        // nil: none
	until   time.Duration // since Registry.madeAt; 0: no expiry
	// ends are the ends of single keys, since Registry.madeAt. nil: none but until. The map
	// is shared and not changed.
	ends      map[string]time.Duration
	silent    bool
	awaited   bool // a caller waits until it is written
	paced     bool // it waits for its interval, and no caller for it
	immediate bool // it does not wait for the interval
}

// stateQueue holds the states of an entry other than its newest, and the pacing.
type stateQueue struct {
	// older are states, oldest first, that were followed by a newer one before they were
	// written. Each is delivered by itself as long as a caller waits for it, so there are
	// never more than callers. After the caller has given up or was answered, the next
	// state supersedes it. With an interval, only the last one that may have reached
	// Redis is kept.
	older []state
	pace
}

// PublishState sets the state of the connection in room. The state ends after expireAfter
// (0: never). It returns ErrNotPresent if the connection is not in the room.
func (c *Conn) PublishState(ctx context.Context, room string, data []byte, expireAfter time.Duration, silent bool) error {
	w, err := c.SetState(room, data, expireAfter, silent)
	if err != nil {
		return err
	}
	return w.Await(ctx)
}

// ClearState ends the state of the connection in room.
func (c *Conn) ClearState(ctx context.Context, room string) error {
	return c.PublishState(ctx, room, nil, 0, false)
}

// SetState is PublishState (data nil: ClearState) without the wait for Redis. The state
// is set when SetState returns, and the Write that it returns waits. The states of one
// entry are written and delivered in the order of the calls.
func (c *Conn) SetState(room string, data []byte, expireAfter time.Duration, silent bool) (Write, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || !e.wanted() {
		return Write{}, ErrNotPresent
	}
	s := state{data: data, silent: silent, awaited: true}
	if expireAfter > 0 {
		s.until = time.Since(c.registry.madeAt) + expireAfter
	}
	return e.publish(s), nil
}

// publish makes s the newest state, with a Write that waits for it. Conn.mu is held.
func (e *entry) publish(s state) (w Write) {
	superseded := e.setState(s)
	e.armExpiry()
	if e.state.paced {
		w = e.acceptPaced()
	} else {
		w = e.wait()
	}
	w.superseded = superseded
	return w
}

// setState makes s the newest state, and reports whether s supersedes the state before it
// because of the interval. Conn.mu is held.
func (e *entry) setState(s state) (superseded bool) {
	s.version, s.rev = e.state.version+1, e.rev+1
	if e.interval > 0 {
		return e.setPaced(s)
	}
	if e.state.awaited && e.stateWritten < e.state.version {
		if e.queue == nil {
			e.queue = new(stateQueue)
		}
		e.queue.older = append(e.queue.older, e.state)
	}
	e.state = s
	e.changed(asked)
	return false
}

// unwritten returns the state to write next after a version: the oldest, or with an
// interval the newest. It returns nil if there is none.
func (e *entry) unwritten(after uint64) *state {
	newest := e.state.version > after && !e.state.paced
	if newest && e.interval > 0 {
		return &e.state
	}
	if e.queue != nil {
		for i := range e.queue.older {
			if s := &e.queue.older[i]; s.version > after {
				return s
			}
		}
	}
	if newest {
		return &e.state
	}
	return nil
}

// nextState returns the op that follows another op of the entry in the same batch. Redis
// runs them in order. Conn.mu is held.
func (e *entry) nextState(after *store.Op) (store.Op, bool) {
	if after.Kind != store.OpUpdate || !e.written() || after.Entry != e.id {
		return store.Op{}, false
	}
	s := e.unwritten(max(e.stateWritten, after.StateVersion))
	if s == nil || s.rev > e.built { // changes before it are not in this batch
		return store.Op{}, false
	}
	op := store.Op{Kind: store.OpUpdate, Room: e.room, Conn: e.c.id, Entry: e.id, TTL: after.TTL}
	e.putState(&op, s)
	return op, true
}

// putState adds a state to an op. A state that has expired since counts as none.
func (e *entry) putState(op *store.Op, s *state) {
	s.paced = false
	if op.Kind == store.OpUpdate || s.data != nil { // a join without a state sends none
		e.noteSent(s.version)
	}
	op.StateVersion, op.StateSilent = s.version, s.silent
	data := s.data
	if s.ends != nil && s.version != e.state.version { // no timer ends the keys of older ones
		o, _ := s.at(time.Since(e.c.registry.madeAt))
		if data = o.JSON(); data == nil {
			op.StateSilent = false
		}
	}
	if data == nil {
		return
	}
	if s.until > 0 {
		if op.StateLeft = s.until - time.Since(e.c.registry.madeAt); op.StateLeft < time.Millisecond {
			op.StateLeft, op.StateSilent = 0, false
			return
		}
	}
	op.State = data
}

// wroteState notes that Redis holds the state of op, or a newer one.
func (e *entry) wroteState(op store.Op) {
	e.stateWritten = max(e.stateWritten, op.StateVersion)
	e.dropOlder(func(s state) bool { return s.version <= e.stateWritten })
	if op.State == nil && op.StateVersion == e.state.version {
		e.state.data = nil // it had expired when it was written
	}
}

// revisionAt returns the revision that is reached when the states up to the version
// written are in Redis. It ends before the oldest state that is not.
func (e *entry) revisionAt(written uint64) uint64 {
	if s := e.unwritten(written); s != nil {
		return min(e.built, s.rev-1)
	}
	return e.built
}

// answerWritten answers the waiters whose revision is written.
func (e *entry) answerWritten() { e.answer(e.revisionAt(e.stateWritten), nil) }

// answerRefused answers the waiters of an op that Redis refused. From then on the next
// state supersedes theirs, and the newest stays wanted.
func (e *entry) answerRefused(op store.Op, err error) {
	rev := e.revisionAt(max(e.stateWritten, op.StateVersion))
	e.answer(rev, err)
	e.unawait(func(s state) bool { return s.rev <= rev })
}

// unawait marks the states that match as no longer awaited.
func (e *entry) unawait(meant func(state) bool) {
	e.dropOlder(meant)
	if meant(e.state) {
		e.state.awaited = false
	}
}

func (e *entry) dropOlder(meant func(state) bool) {
	if e.queue == nil {
		return
	}
	if e.queue.older = slices.DeleteFunc(e.queue.older, meant); len(e.queue.older) > 0 {
		return
	}
	if e.queue.older = nil; !e.queue.began {
		e.queue = nil
	}
}
