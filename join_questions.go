package mesh

import (
	"context"
	"errors"
	"slices"

	"github.com/meshpresence/mesh/internal/owner"
)

// joinQuestion is one open question to the join guards about a connection and a
// room. Besides the guards, these decide about it:
//
//	takeOut   a leave, a removal, the end of the connection: no
//	letIn     RoomManager.Add, by which the app decides itself: yes
//	recheck   what the guards have read may be out of date: they are asked again
type joinQuestion struct {
	conn    *owner.Conn
	room    string
	kind    joinKind
	settled chan struct{} // closed when the question is not open any more

	// Guarded by joins.mu.
	decided fate
	stale   bool                    // the guards have to be asked again
	cancel  context.CancelCauseFunc // of the guards that are asked; nil before that

	// Of the goroutine that asks. Others may read them after settled.
	meta, rules uint64 // versions of metadata and rules that the answer is about
	err         error  // nil: yes
	owed        bool   // too many guards hang to ask them; the connection was in before
}

// joinKind is why the join guards are asked.
type joinKind byte

const (
	askedJoin    joinKind = iota // a caller wants to bring the connection in
	askedReturn                  // its entry had ended and comes back by a frame
	askedRecheck                 // it is a member
)

// fate is a decision about a question without its guards.
type fate byte

const (
	undecided fate = iota
	takenOut
	broughtIn
)

// errOutdated says that the guards have to be asked again.
var errOutdated = errors.New("mesh: answer of a join guard is out of date")

// begin registers a question.
func (w *joins) begin(q *joinQuestion) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return ErrClosed
	}
	w.register(q)
	return nil
}

// register is begin with joins.mu held.
func (w *joins) register(q *joinQuestion) {
	q.settled = make(chan struct{})
	rooms := w.open[q.conn]
	if rooms == nil {
		rooms = make(map[string][]*joinQuestion)
		w.open[q.conn] = rooms
	}
	rooms[q.room] = append(rooms[q.room], q)
}

// end closes a question.
func (w *joins) end(q *joinQuestion) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endLocked(q)
}

// endUnlessStale closes a recheck, unless another recheck has come since its last
// answer: that one began no question of its own. It returns whether the question is
// closed.
func (w *joins) endUnlessStale(q *joinQuestion) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if q.stale && !w.closed {
		q.decided, q.stale, q.cancel = undecided, false, nil
		return false
	}
	w.endLocked(q)
	return true
}

// endLocked is end with joins.mu held.
func (w *joins) endLocked(q *joinQuestion) {
	rooms := w.open[q.conn]
	rooms[q.room] = slices.DeleteFunc(rooms[q.room], func(other *joinQuestion) bool { return other == q })
	if len(rooms[q.room]) == 0 {
		delete(rooms, q.room)
	}
	if len(rooms) == 0 {
		delete(w.open, q.conn)
	}
	close(q.settled)
}

// find returns the open question of a kind, nil if there is none. joins.mu is held.
func (w *joins) find(c *owner.Conn, room string, kind joinKind) *joinQuestion {
	for _, q := range w.open[c][room] {
		if q.kind == kind {
			return q
		}
	}
	return nil
}

// awaitReturn waits until the join guards have answered about an entry that comes
// back, and returns that question; nil: there was none, or they have no answer.
func (w *joins) awaitReturn(ctx context.Context, c *owner.Conn, room string) (*joinQuestion, error) {
	w.mu.Lock()
	q := w.find(c, room, askedReturn)
	w.mu.Unlock()
	if q == nil {
		return nil, nil
	}
	select {
	case <-q.settled:
	case <-ctx.Done():
		return nil, contextError(ctx)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if q.decided != undecided || q.err != nil && !errors.Is(q.err, ErrRefused) {
		return nil, nil
	}
	return q, nil
}

// asking notes how the guards of a question are called off. It returns false if
// the question has been decided.
func (w *joins) asking(q *joinQuestion, cancel context.CancelCauseFunc) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	q.cancel, q.stale = cancel, false
	return q.decided == undecided
}

// answer returns nil for a yes, errOutdated if the guards have to be asked again,
// and otherwise why it is a no. meta is the version of the metadata in force. It
// may be called with the lock of the Conn held.
func (w *joins) answer(q *joinQuestion, meta uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case q.decided == takenOut:
		return errTakenOut
	case q.decided == broughtIn:
		return nil
	case q.stale, meta != q.meta, w.n.rules.match(q.room).version != q.rules:
		return errOutdated
	}
	return q.err
}

// settleFor makes err the answer of a question whose guards are not asked again,
// and returns it.
func (w *joins) settleFor(q *joinQuestion, err error) error {
	_, q.meta = w.n.member(q.conn.ID())()
	q.rules, q.err = w.n.rules.match(q.room).version, err
	w.mu.Lock()
	defer w.mu.Unlock()
	q.stale = false
	return err
}

// stillIn returns an error if the connection was taken out after its join, by a
// recheck for example.
func (w *joins) stillIn(q *joinQuestion) error {
	in := q.conn.In(q.room)
	w.mu.Lock()
	defer w.mu.Unlock()
	if q.decided == takenOut || !in {
		return errTakenOut
	}
	return nil
}

// takeOut decides that a connection's joins of a room do not take place.
func (w *joins) takeOut(c *owner.Conn, room string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	decide(w.open[c][room], takenOut)
}

// takeOutAll is takeOut for all rooms.
func (w *joins) takeOutAll(c *owner.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, questions := range w.open[c] {
		decide(questions, takenOut)
	}
}

// takeOutOf is takeOut for all connections.
func (w *joins) takeOutOf(room string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, rooms := range w.open {
		decide(rooms[room], takenOut)
	}
}

// letIn decides that a connection's joins of a room take place.
func (w *joins) letIn(c *owner.Conn, room string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	decide(w.open[c][room], broughtIn)
}

// recheckAll makes the guards be asked again about all open questions of a
// connection.
func (w *joins) recheckAll(c *owner.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, questions := range w.open[c] {
		for _, q := range questions {
			q.stale = true
		}
	}
}

// recheckOf makes the guards be asked again about all open questions of a room.
func (w *joins) recheckOf(room string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, rooms := range w.open {
		for _, q := range rooms[room] {
			q.stale = true
		}
	}
}

// decide settles questions without their guards, which are called off. joins.mu
// is held.
func decide(questions []*joinQuestion, how fate) {
	for _, q := range questions {
		q.decided, q.stale = how, false
		if q.cancel != nil {
			q.cancel(errCalledOff)
		}
	}
}
