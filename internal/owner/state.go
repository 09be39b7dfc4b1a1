package owner

import (
	"context"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// state is an ephemeral state of an entry. Version rises with every change.
type state struct {
	version uint64
	rev     uint64        // the entry's with it
	data    []byte        // nil: none
	until   time.Duration // since Owner.born; 0: no expiry
	silent  bool
	awaited bool // somebody waits until it is written
	held    bool // it waits for its interval, and nobody for it
	now     bool // it does not wait for its interval
}

// flow is what an entry needs for more states than its newest.
type flow struct {
	// older are states that a newer one has followed before they were written,
	// oldest first. Each is told by itself, as long as somebody waits for it: so
	// there are never more than callers. Whoever has given up, or has been
	// answered, has his state superseded by the next. With an interval only the
	// last one is kept that may have reached Redis.
	older []state
	pace
}

// PublishState sets the connection's state in room; after expireAfter (0:
// never) it ends. ErrNotPresent where the connection is not in.
func (c *Conn) PublishState(ctx context.Context, room string, data []byte, expireAfter time.Duration, silent bool) error {
	w, err := c.SetState(room, data, expireAfter, silent)
	if err != nil {
		return err
	}
	return w.Await(ctx)
}

// ClearState ends the connection's state in room.
func (c *Conn) ClearState(ctx context.Context, room string) error {
	return c.PublishState(ctx, room, nil, 0, false)
}

// SetState is PublishState (data nil: ClearState) for callers that have
// something to do meanwhile: the state is set when it returns, and what it
// returns waits for Redis. States of one entry are written, and told, in the
// order of the calls, each of them.
func (c *Conn) SetState(room string, data []byte, expireAfter time.Duration, silent bool) (Write, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || !e.want {
		return Write{}, ErrNotPresent
	}
	s := state{data: data, silent: silent, awaited: true}
	if expireAfter > 0 {
		s.until = time.Since(c.o.born) + expireAfter
	}
	e.setState(s)
	e.armExpiry(expireAfter)
	if e.state.held {
		return e.taken(), nil
	}
	return e.wait(), nil
}

// setState puts s in the place of the newest state. Conn.mu is held.
func (e *entry) setState(s state) {
	s.version, s.rev = e.state.version+1, e.rev+1
	if e.interval > 0 {
		e.setPaced(s)
		return
	}
	if e.state.awaited && e.stateWritten < e.state.version {
		if e.flow == nil {
			e.flow = new(flow)
		}
		e.flow.older = append(e.flow.older, e.state)
	}
	e.state = s
	e.changed(asked)
}

// unwritten returns the state after a version that is to be written next: the
// oldest, or with an interval the newest; nil: there is none.
func (e *entry) unwritten(after uint64) *state {
	newest := e.state.version > after && !e.state.held
	if newest && e.interval > 0 {
		return &e.state
	}
	if e.flow != nil {
		for i := range e.flow.older {
			if s := &e.flow.older[i]; s.version > after {
				return s
			}
		}
	}
	if newest {
		return &e.state
	}
	return nil
}

// nextState returns the op that follows another one of the entry in the same
// batch: Redis takes them in order. Conn.mu is held.
func (e *entry) nextState(after *store.Op) (store.Op, bool) {
	if after.Kind != store.OpUpdate || !e.want || !e.written || after.Entry != e.id {
		return store.Op{}, false
	}
	s := e.unwritten(max(e.stateWritten, after.StateVersion))
	if s == nil || s.rev > e.built { // other changes before it are not in this batch
		return store.Op{}, false
	}
	op := store.Op{Kind: store.OpUpdate, Room: e.room, Conn: e.c.id, Entry: e.id, TTL: after.TTL}
	e.putState(&op, s)
	return op, true
}

// putState adds a state to an op; one that ran out meanwhile is none.
func (e *entry) putState(op *store.Op, s *state) {
	s.held = false
	if op.Kind == store.OpUpdate || s.data != nil { // a join without a state is none
		e.noteSent(s.version)
	}
	op.StateVersion, op.StateSilent = s.version, s.silent
	if s.data == nil {
		return
	}
	if s.until > 0 {
		if op.StateLeft = s.until - time.Since(e.c.o.born); op.StateLeft < time.Millisecond {
			op.StateLeft, op.StateSilent = 0, false
			return
		}
	}
	op.State = s.data
}

// wroteState: Redis holds the state of that op, or a newer one.
func (e *entry) wroteState(op store.Op) {
	e.stateWritten = max(e.stateWritten, op.StateVersion)
	e.dropOlder(func(s state) bool { return s.version <= e.stateWritten })
	if op.State == nil && op.StateVersion == e.state.version {
		e.state.data = nil // it had run out by the time it was written
	}
}

// reached is the revision that was brought about with all that has been
// written of what was built: short of the oldest state that has not been.
func (e *entry) reached(written uint64) uint64 {
	if s := e.unwritten(written); s != nil {
		return min(e.built, s.rev-1)
	}
	return e.built
}

// answerWritten tells those who wait for what has been written.
func (e *entry) answerWritten() { e.answer(e.reached(e.stateWritten), nil) }

// refusedTo tells those who wait for an op that Redis refused. Their states are
// superseded by the next from then on: the newest goes on being wanted.
func (e *entry) refusedTo(op store.Op, err error) {
	rev := e.reached(max(e.stateWritten, op.StateVersion))
	e.answer(rev, err)
	e.unawait(func(s state) bool { return s.rev <= rev })
}

// unawait: nobody waits any longer for the states that are meant.
func (e *entry) unawait(meant func(state) bool) {
	e.dropOlder(meant)
	if meant(e.state) {
		e.state.awaited = false
	}
}

func (e *entry) dropOlder(meant func(state) bool) {
	if e.flow == nil {
		return
	}
	if e.flow.older = slices.DeleteFunc(e.flow.older, meant); len(e.flow.older) > 0 {
		return
	}
	if e.flow.older = nil; !e.flow.began {
		e.flow = nil
	}
}
