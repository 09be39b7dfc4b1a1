package mesh

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/store"
)

// joins asks the join guards about this server's connections: before a join,
// before an entry that had ended comes back, and about members at a recheck. A
// question is registered while it is open, so that everything else that decides
// about the same connection and room settles it (join_questions.go).
//
// The answer of the guards counts only if it is about the metadata and rules in
// force. That is checked once more with the lock of the owner's Conn held, in the
// same step that brings the connection in or takes it out.
//
// Lock order: the owner's Conn, then joins.mu. Safe for concurrent use.
type joins struct {
	n    *node
	work sync.WaitGroup // returns and rechecks

	life context.Context // of these
	quit context.CancelFunc

	mu     sync.Mutex // guards the fields below, and those of joinQuestion that say so
	closed bool
	open   map[*owner.Conn]map[string][]*joinQuestion // by room
}

func newJoins(n *node) *joins {
	w := &joins{n: n, open: make(map[*owner.Conn]map[string][]*joinQuestion)}
	w.life, w.quit = context.WithCancel(n.life)
	return w
}

// join brings a connection into a room if the join guards allow it.
func (n *node) join(ctx context.Context, c *owner.Conn, room string) (owner.Joined, error) {
	for {
		r := n.rules.match(room)
		if len(r.joinGuards) > 0 {
			joined, err := n.joins.join(ctx, c, room)
			return joined, n.joinError(ctx, c, err)
		}
		joined, err := c.JoinIf(ctx, room, func(uint64) error {
			if n.rules.match(room).version != r.version {
				return errOutdated // a rule with a join guard may have come
			}
			return nil
		})
		if err == nil && !c.In(room) {
			err = errTakenOut
		}
		if err != errOutdated {
			return joined, n.joinError(ctx, c, err)
		}
	}
}

// joinError is storeError for a join. The connection may have been taken out of
// the room because it has ended.
func (n *node) joinError(ctx context.Context, c *owner.Conn, err error) error {
	if now, open := n.owner.Conn(c.ID()); err == errTakenOut && (!open || now != c) {
		return ErrClosed
	}
	return n.errorFor(ctx, err)
}

// add brings a connection into a room without asking the join guards.
func (n *node) add(ctx context.Context, c *owner.Conn, room string) error {
	n.joins.letIn(c, room)
	_, err := c.Join(ctx, room)
	return n.errorFor(ctx, err)
}

// leave takes a connection out of a room. Joins that wait do not take place.
func (n *node) leave(ctx context.Context, c *owner.Conn, room string) (bool, error) {
	n.joins.takeOut(c, room)
	was, err := c.Leave(ctx, room, store.CauseLeft)
	return was, n.errorFor(ctx, err)
}

// join is node.join for a room with join guards. A member that they refuse leaves.
func (w *joins) join(ctx context.Context, c *owner.Conn, room string) (owner.Joined, error) {
	q := &joinQuestion{conn: c, room: room, kind: askedJoin}
	if err := w.begin(q); err != nil {
		return owner.Joined{}, err
	}
	defer w.end(q)
	back, err := w.awaitReturn(ctx, c, room)
	if err != nil {
		return owner.Joined{}, err
	}
	if back != nil { // asked just now, about the same connection and room
		q.meta, q.rules, q.err = back.meta, back.rules, back.err
	}
	var joined owner.Joined
	err = w.ask(ctx, q, back != nil, func(answer error) error {
		if answer != nil {
			_, err := w.exclude(ctx, q, answer)
			return err
		}
		var err error
		joined, err = c.JoinIf(ctx, room, func(meta uint64) error { return w.answer(q, meta) })
		return err
	})
	if err == nil {
		err = w.stillIn(q) // it may have been taken out while Redis was asked
	}
	return joined, err
}

// exclude makes a member leave that the guards have refused. It returns whether
// it was a member, and the answer, or errOutdated if the answer does not count any
// more.
func (w *joins) exclude(ctx context.Context, q *joinQuestion, answer error) (bool, error) {
	if !errors.Is(answer, ErrRefused) || errors.Is(answer, ErrClosed) || errors.Is(answer, errTakenOut) {
		return false, answer
	}
	now := answer
	was, _ := q.conn.LeaveIf(ctx, q.room, store.CauseLeft, func(meta uint64) bool {
		now = w.answer(q, meta)
		return now == answer
	}) // if Redis does not answer, the leave is written later
	if now == errOutdated || now == nil { // nil: the app has let it in
		return false, errOutdated
	}
	return was, answer
}

// ask asks the join guards until their answer is up to date and act has acted on
// it. act gets nil for a yes, and returns errOutdated if its own check failed.
// known means that the question has an answer already.
func (w *joins) ask(ctx context.Context, q *joinQuestion, known bool, act func(answer error) error) error {
	asking := repeated{name: callbackJoinGuard, limit: w.n.verdicts.joinTimeout, log: w.n.calls.log}
	defer asking.end()
	limited := ctx
	for ; ; known = false {
		if !known {
			w.put(limited, q)
		}
		if ctx.Err() != nil {
			return contextError(ctx)
		}
		_, meta := w.n.member(q.conn.ID())()
		err := w.answer(q, meta)
		if err != errOutdated {
			err = act(err)
		}
		if err != errOutdated {
			return err
		}
		limited = asking.within(ctx)
		if err := asking.again(ctx); err != nil {
			_ = act(w.settleFor(q, err))
			return err
		}
	}
}

// put asks the guards once.
func (w *joins) put(ctx context.Context, q *joinQuestion) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if !w.asking(q, cancel) {
		return
	}
	m, version := w.n.member(q.conn.ID())()
	q.meta, q.rules, q.owed = version, w.n.rules.match(q.room).version, false
	ok, err := w.n.verdicts.joinAllowed(ctx, q.conn.ID(), func() (Member, uint64) { return m, version }, q.room)
	_, full := errors.AsType[*budgetError](err)
	switch {
	case full && q.conn.In(q.room): // it was let in before
		q.owed, err = true, nil
	case err == nil && !ok:
		err = ErrRefused
	case err != nil && errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, ErrRefused):
		err = refusedBecause(err) // the time for asking repeatedly is over
	}
	q.err = err
}

// mayReturn is owner.Config.MayReturn: it begins to ask the join guards about an
// entry that had ended. true: there are none. The lock of the Conn is held.
func (w *joins) mayReturn(c *owner.Conn, room string) bool {
	if len(w.n.rules.match(room).joinGuards) == 0 {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed || w.find(c, room, askedReturn) != nil {
		return false
	}
	q := &joinQuestion{conn: c, room: room, kind: askedReturn}
	w.register(q)
	w.work.Go(func() { w.comeBack(q) })
	return false
}

// comeBack is a sign of life of a connection. If its entry in a room had ended, it
// waits until the join guards have decided whether it is in again.
func (n *node) comeBack(ctx context.Context, c *owner.Conn, room string) error {
	c.Seen()
	_, err := n.joins.awaitReturn(ctx, c, room)
	return err
}

// comeBack brings an entry back if the join guards allow it. If they do not, the
// client gets a push, since it has made no request.
func (w *joins) comeBack(q *joinQuestion) {
	defer w.end(q)
	err := w.ask(w.life, q, false, func(answer error) error {
		if answer != nil {
			return w.stayOut(q, answer)
		}
		_, err := q.conn.Return(q.room, func(meta uint64) error { return w.answer(q, meta) })
		return err
	})
	if err == nil && q.owed {
		w.recheck(q.conn, q.room)
	}
}

// stayOut is exclude for an entry that would come back.
func (w *joins) stayOut(q *joinQuestion, answer error) error {
	if !errors.Is(answer, ErrRefused) || errors.Is(answer, ErrClosed) || errors.Is(answer, errTakenOut) {
		return answer
	}
	now := answer
	if q.conn.StayOut(q.room, func(meta uint64) bool { now = w.answer(q, meta); return now == answer }) {
		w.n.tellMembershipEnded(q.conn.ID(), q.room)
	}
	if now == errOutdated {
		return errOutdated
	}
	return answer
}

// recheck asks the join guards again about a connection that is in a room or
// about to join it. It does not wait for their answer.
func (w *joins) recheck(c *owner.Conn, room string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, q := range w.open[c][room] {
		q.stale = true
	}
	if w.closed || w.find(c, room, askedRecheck) != nil || len(w.n.rules.match(room).joinGuards) == 0 {
		return
	}
	q := &joinQuestion{conn: c, room: room, kind: askedRecheck}
	w.register(q)
	w.work.Go(func() { w.recheckMember(q) })
}

// recheckMember asks until the guards have answered. A member that they refuse
// leaves, and its client gets a push.
func (w *joins) recheckMember(q *joinQuestion) {
	for over := false; !over; over = w.endUnlessStale(q) {
		w.askAgain(q)
	}
}

// askAgain is one recheck.
func (w *joins) askAgain(q *joinQuestion) {
	for q.conn.In(q.room) {
		was := false
		err := w.ask(w.life, q, false, func(answer error) (err error) {
			if answer != nil {
				was, answer = w.exclude(w.life, q, answer)
			}
			return answer
		})
		if was && !q.conn.In(q.room) { // it may have joined again while the leave was written
			w.n.tellMembershipEnded(q.conn.ID(), q.room)
		}
		if err != nil || !q.owed || !pause(w.life, failedFor) {
			return
		}
	}
}

// pause waits. It returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// close lets no more questions begin, calls off those without a caller, and waits
// for their goroutines.
func (w *joins) close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.quit()
	w.work.Wait()
}

// errTakenOut says that a join did not take place because the connection was
// taken out of the room, or ended, while the join was waiting.
var errTakenOut = fmt.Errorf("%w: taken out of the room while the join was waiting", ErrRefused)
