package guards

import (
	"context"
	"errors"
	"slices"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/local"
)

// joinQuestion is one open question to the join guards about a connection and a room.
// Besides the guards, these decide about it:
//
//	takeOut   no: a leave, a removal, or the end of the connection
//	letIn     yes: the app itself adds the connection
//	recheck   the guards are asked again, because what they have read may have changed
type joinQuestion struct {
	conn *local.Conn
	room string
	kind joinKind
	done chan struct{} // closed when the question is not open any more

	// Guarded by Joins.mu.
	decided override
	stale   bool                    // the guards have to be asked again
	cancel  context.CancelCauseFunc // of the guards; nil before they are asked

	// Of the goroutine that asks. Others may read them when done is closed.
	meta, rules uint64 // versions of metadata and rules that the answer is about
	err         error  // the answer; nil: yes
	recheckDue  bool   // too many guards hang; the connection was in before
}

// joinKind is the reason why the join guards are asked.
type joinKind byte

const (
	askedJoin    joinKind = iota // a caller wants to bring the connection in
	askedReturn                  // a frame brings its entry back, which had ended
	askedRecheck                 // the connection is a member
)

// override is a decision that overrides the guards.
type override byte

const (
	undecided override = iota
	takenOut
	letIn
)

// errOutdated says that the guards have to be asked again.
var errOutdated = errors.New("mesh: answer of a join guard is out of date")

// begin registers a question.
func (j *Joins) begin(q *joinQuestion) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed {
		return errs.Closed
	}
	j.register(q)
	return nil
}

// register is begin with Joins.mu held.
func (j *Joins) register(q *joinQuestion) {
	q.done = make(chan struct{})
	rooms := j.open[q.conn]
	if rooms == nil {
		rooms = make(map[string][]*joinQuestion)
		j.open[q.conn] = rooms
	}
	rooms[q.room] = append(rooms[q.room], q)
}

// unregister closes a question.
func (j *Joins) unregister(q *joinQuestion) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.endLocked(q)
}

// unregisterUnlessStale closes a recheck, unless another recheck has come since its last
// answer, which has not begun a question of its own. It reports whether the question is
// closed.
func (j *Joins) unregisterUnlessStale(q *joinQuestion) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if q.stale && !j.closed {
		q.decided, q.stale, q.cancel = undecided, false, nil
		return false
	}
	j.endLocked(q)
	return true
}

// endLocked is unregister with Joins.mu held.
func (j *Joins) endLocked(q *joinQuestion) {
	rooms := j.open[q.conn]
	rooms[q.room] = slices.DeleteFunc(rooms[q.room], func(other *joinQuestion) bool { return other == q })
	if len(rooms[q.room]) == 0 {
		delete(rooms, q.room)
	}
	if len(rooms) == 0 {
		delete(j.open, q.conn)
	}
	close(q.done)
}

// find returns the open question of a kind, or nil. Joins.mu is held.
func (j *Joins) find(c *local.Conn, room string, kind joinKind) *joinQuestion {
	for _, q := range j.open[c][room] {
		if q.kind == kind {
			return q
		}
	}
	return nil
}

// AwaitReturn waits until the join guards have answered about an entry that comes back, if
// there is one.
func (j *Joins) AwaitReturn(ctx context.Context, c *local.Conn, room string) error {
	_, err := j.awaitReturn(ctx, c, room)
	return err
}

// awaitReturn is AwaitReturn that returns the question, or nil if there was none or it has
// no answer.
func (j *Joins) awaitReturn(ctx context.Context, c *local.Conn, room string) (*joinQuestion, error) {
	j.mu.Lock()
	q := j.find(c, room, askedReturn)
	j.mu.Unlock()
	if q == nil {
		return nil, nil
	}
	select {
	case <-q.done:
	case <-ctx.Done():
		return nil, errs.Ended(ctx)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if q.decided != undecided || q.err != nil && !errors.Is(q.err, errs.Refused) {
		return nil, nil
	}
	return q, nil
}

// asking notes how to cancel the guards of a question. It returns false if the question
// has been decided.
func (j *Joins) asking(q *joinQuestion, cancel context.CancelCauseFunc) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	q.cancel, q.stale = cancel, false
	return q.decided == undecided
}

// answer returns nil for a yes, errOutdated if the guards have to be asked again, and
// otherwise the reason for the no. meta is the version of the metadata in force. answer may
// be called with the lock of the local.Conn held.
func (j *Joins) answer(q *joinQuestion, meta uint64) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	switch {
	case q.decided == takenOut:
		return errTakenOut
	case q.decided == letIn:
		return nil
	case q.stale, meta != q.meta, j.cfg.Rules.Match(q.room).version != q.rules:
		return errOutdated
	}
	return q.err
}

// answerWith makes err the answer of a question, and returns it. The guards are not asked
// again.
func (j *Joins) answerWith(q *joinQuestion, err error) error {
	_, q.meta = j.cfg.Member(q.conn.ID())()
	q.rules, q.err = j.cfg.Rules.Match(q.room).version, err
	j.mu.Lock()
	defer j.mu.Unlock()
	q.stale = false
	return err
}

// stillIn returns an error if the connection was taken out after its join, for example by
// a recheck.
func (j *Joins) stillIn(q *joinQuestion) error {
	in := q.conn.In(q.room)
	j.mu.Lock()
	defer j.mu.Unlock()
	if q.decided == takenOut || !in {
		return errTakenOut
	}
	return nil
}

// takeOut decides that the joins of a connection in a room do not take place.
func (j *Joins) takeOut(c *local.Conn, room string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	apply(j.open[c][room], takenOut)
}

// TakeOutAll decides that no join of a connection takes place.
func (j *Joins) TakeOutAll(c *local.Conn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, questions := range j.open[c] {
		apply(questions, takenOut)
	}
}

// TakeOutOf decides that no join in a room takes place.
func (j *Joins) TakeOutOf(room string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, rooms := range j.open {
		apply(rooms[room], takenOut)
	}
}

// letIn decides that the joins of a connection in a room take place.
func (j *Joins) letIn(c *local.Conn, room string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	apply(j.open[c][room], letIn)
}

// RecheckAll makes the answers to all open questions of a connection outdated.
func (j *Joins) RecheckAll(c *local.Conn) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, questions := range j.open[c] {
		for _, q := range questions {
			q.stale = true
		}
	}
}

// RecheckOf makes the answers to all open questions of a room outdated.
func (j *Joins) RecheckOf(room string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, rooms := range j.open {
		for _, q := range rooms[room] {
			q.stale = true
		}
	}
}

// apply decides questions and cancels their guards. Joins.mu is held.
func apply(questions []*joinQuestion, how override) {
	for _, q := range questions {
		q.decided, q.stale = how, false
		if q.cancel != nil {
			q.cancel(callbacks.ErrCanceled)
		}
	}
}

// Open returns the number of connections with open questions.
func (j *Joins) Open() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.open)
}
