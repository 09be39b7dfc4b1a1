package guards

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// JoinConfig is the configuration of Joins. All fields are required.
type JoinConfig struct {
	Cache *Cache
	Rules *RuleSet
	// Context ends when the server has stopped.
	Context context.Context
	// Conn returns a connection of this server.
	Conn func(id string) (*local.Conn, bool)
	// Member returns the function that returns a connection as guards see it.
	Member func(conn string) MemberFunc
	// OnTakenOut is called when a join guard has taken a connection out of a room without
	// a request of its client.
	OnTakenOut func(conn, room string)
	// ToError turns an error of package local or store into one for the app, which has
	// waited with ctx.
	ToError func(ctx context.Context, err error) error
}

// Joins asks the join guards about the connections of this server: before a join, before
// an entry that had ended comes back, and about members at a recheck. A question is
// registered while it is open, so that everything else that decides about the same
// connection and room settles it (join_questions.go).
//
// The answer of the guards counts only if it is about the metadata and rules in force.
// This is checked once more with the lock of the local.Conn held, in the same step that
// brings the connection in or takes it out.
//
// Lock order: local.Conn, then Joins.mu. Joins is safe for concurrent use.
type Joins struct {
	cfg  JoinConfig
	work sync.WaitGroup // returns and rechecks

	life context.Context // of these
	quit context.CancelFunc

	mu     sync.Mutex // guards the fields below, and those of joinQuestion that say so
	closed bool
	open   map[*local.Conn]map[string][]*joinQuestion // by room
}

// NewJoins returns Joins without open questions.
func NewJoins(c JoinConfig) *Joins {
	j := &Joins{cfg: c, open: make(map[*local.Conn]map[string][]*joinQuestion)}
	j.life, j.quit = context.WithCancel(c.Context)
	return j
}

// Request is what a join asks for, beside its room.
type Request struct {
	// Replaces is the connection whose place to take, if it has the same user. Empty:
	// none.
	Replaces string
	// Within returns the time to wait for Redis. It is called when the guards have
	// answered.
	Within func() time.Duration
}

// options returns the options of the join that accept allows.
func (r Request) options(accept func(meta uint64) error) local.JoinOptions {
	return local.JoinOptions{Within: r.Within(), Accept: accept, Replaces: r.Replaces}
}

// Join brings a connection into a room if the join guards allow it.
func (j *Joins) Join(ctx context.Context, c *local.Conn, room string, req Request) (local.Joined, error) {
	for {
		r := j.cfg.Rules.Match(room)
		if len(r.joinGuards) > 0 {
			joined, err := j.joinGuarded(ctx, c, room, req)
			return joined, j.joinError(ctx, c, err)
		}
		joined, err := c.JoinIf(ctx, room, req.options(func(uint64) error {
			if j.cfg.Rules.Match(room).version != r.version {
				return errOutdated // there may be a rule with a join guard now
			}
			return nil
		}))
		if err == nil && !c.In(room) {
			err = errTakenOut
		}
		if err != errOutdated {
			return joined, j.joinError(ctx, c, err)
		}
	}
}

// joinError is ToError for a join. If the connection was taken out of the room because it
// has ended, the error is errs.Closed.
func (j *Joins) joinError(ctx context.Context, c *local.Conn, err error) error {
	if now, open := j.cfg.Conn(c.ID()); err == errTakenOut && (!open || now != c) {
		return errs.Closed
	}
	return j.cfg.ToError(ctx, err)
}

// Add brings a connection into a room without asking the join guards, and beyond its caps
// if overCap says so.
func (j *Joins) Add(ctx context.Context, c *local.Conn, room string, overCap bool) (local.Joined, error) {
	j.letIn(c, room)
	joined, err := c.JoinIf(ctx, room, local.JoinOptions{OverCap: overCap})
	return joined, j.cfg.ToError(ctx, err)
}

// Leave takes a connection out of a room. Joins that wait do not take place. cause is
// store.CauseLeft or store.CauseRemoved.
func (j *Joins) Leave(ctx context.Context, c *local.Conn, room string, cause store.Cause) (bool, error) {
	j.takeOut(c, room)
	was, err := c.Leave(ctx, room, cause)
	return was, j.cfg.ToError(ctx, err)
}

// joinGuarded is Join for a room with join guards. A member that they refuse leaves.
func (j *Joins) joinGuarded(ctx context.Context, c *local.Conn, room string, req Request) (local.Joined, error) {
	q := &joinQuestion{conn: c, room: room, kind: askedJoin}
	if err := j.begin(q); err != nil {
		return local.Joined{}, err
	}
	defer j.unregister(q)
	back, err := j.awaitReturn(ctx, c, room)
	if err != nil {
		return local.Joined{}, err
	}
	if back != nil { // just answered, about the same connection and room
		q.meta, q.rules, q.err = back.meta, back.rules, back.err
	}
	var joined local.Joined
	err = j.ask(ctx, q, back != nil, func(answer error) error {
		if answer != nil {
			_, err := j.exclude(ctx, q, answer)
			return err
		}
		var err error
		joined, err = c.JoinIf(ctx, room, req.options(func(meta uint64) error { return j.answer(q, meta) }))
		return err
	})
	if err == nil {
		err = j.stillIn(q) // it may have been taken out while Redis was asked
	}
	return joined, err
}

// exclude takes a member that the guards have refused out of the room. It reports whether
// the connection was a member. It returns the answer, or errOutdated if the answer does
// not count any more.
func (j *Joins) exclude(ctx context.Context, q *joinQuestion, answer error) (bool, error) {
	if !takesOut(answer) {
		return false, answer
	}
	now := answer
	was, _ := q.conn.LeaveIf(ctx, q.room, store.CauseRemoved, func(meta uint64) bool {
		now = j.answer(q, meta)
		return now == answer
	}) // if Redis does not answer, the leave is written later
	if now == errOutdated || now == nil { // nil: the app has let it in
		return false, errOutdated
	}
	return was, answer
}

// takesOut reports whether an answer means that a member has to leave.
func takesOut(answer error) bool {
	return errors.Is(answer, errs.Refused) && !errors.Is(answer, errs.Closed) && !errors.Is(answer, errTakenOut)
}

// ask asks the join guards until their answer is up to date and act has acted on it. act
// gets nil for a yes. It returns errOutdated if its own check has failed. known says that
// the question has an answer already.
func (j *Joins) ask(ctx context.Context, q *joinQuestion, known bool, act func(answer error) error) error {
	asking := Retry{name: callbacks.JoinGuard, limit: j.cfg.Cache.joinTimeout, cache: j.cfg.Cache}
	defer asking.End()
	limited := ctx
	for ; ; known = false {
		if !known {
			j.askOnce(limited, q)
		}
		if ctx.Err() != nil {
			return errs.Ended(ctx)
		}
		_, meta := j.cfg.Member(q.conn.ID())()
		err := j.answer(q, meta)
		if err != errOutdated {
			err = act(err)
		}
		if err != errOutdated {
			return err
		}
		limited = asking.within(ctx) //nolint:fatcontext // of ctx, not of the one before
		if err := asking.Again(ctx); err != nil {
			_ = act(j.answerWith(q, err))
			return err
		}
	}
}

// askOnce asks the guards once.
func (j *Joins) askOnce(ctx context.Context, q *joinQuestion) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if !j.asking(q, cancel) {
		return
	}
	m, version := j.cfg.Member(q.conn.ID())()
	q.meta, q.rules, q.recheckDue = version, j.cfg.Rules.Match(q.room).version, false
	ok, err := j.cfg.Cache.joinAllowed(ctx, q.conn.ID(), func() (Member, uint64) { return m, version }, q.room)
	_, full := errors.AsType[*budgetError](err)
	switch {
	case full && q.conn.In(q.room): // it was let in before
		q.recheckDue, err = true, nil
	case err == nil && !ok:
		err = errs.Refused
	case err != nil && errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, errs.Refused):
		err = j.cfg.Cache.refusal(err) // the time for asking repeatedly is over
	}
	q.err = err
}

// MayReturn begins to ask the join guards about an entry that had ended and would come
// back. It returns true if there are none. The caller holds the lock of the local.Conn:
// see local.Config.MayReturn.
func (j *Joins) MayReturn(c *local.Conn, room string) bool {
	if len(j.cfg.Rules.Match(room).joinGuards) == 0 {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.closed || j.find(c, room, askedReturn) != nil {
		return false
	}
	q := &joinQuestion{conn: c, room: room, kind: askedReturn}
	j.register(q)
	j.work.Go(func() { j.comeBack(q) })
	return false
}

// Touch is a sign of life of a connection. If its entry in a room had ended, Touch waits
// until the join guards have decided whether it comes back.
func (j *Joins) Touch(ctx context.Context, c *local.Conn, room string) error {
	c.Touched()
	return j.AwaitReturn(ctx, c, room)
}

// comeBack brings an entry back if the join guards allow it. If they do not, OnTakenOut is
// called, because the client has made no request.
func (j *Joins) comeBack(q *joinQuestion) {
	defer j.unregister(q)
	err := j.ask(j.life, q, false, func(answer error) error {
		if answer != nil {
			return j.keepOut(q, answer)
		}
		_, err := q.conn.Return(q.room, func(meta uint64) error { return j.answer(q, meta) })
		return err
	})
	if err == nil && q.recheckDue {
		j.Recheck(q.conn, q.room)
	}
}

// keepOut is exclude for an entry that would come back.
func (j *Joins) keepOut(q *joinQuestion, answer error) error {
	if !takesOut(answer) {
		return answer
	}
	now := answer
	if q.conn.StayOut(q.room, func(meta uint64) bool { now = j.answer(q, meta); return now == answer }) {
		j.cfg.OnTakenOut(q.conn.ID(), q.room)
	}
	if now == errOutdated {
		return errOutdated
	}
	return answer
}

// Recheck asks the join guards again about a connection that is in a room or about to join
// it. It does not wait for their answer.
func (j *Joins) Recheck(c *local.Conn, room string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, q := range j.open[c][room] {
		q.stale = true
	}
	if j.closed || j.find(c, room, askedRecheck) != nil || len(j.cfg.Rules.Match(room).joinGuards) == 0 {
		return
	}
	q := &joinQuestion{conn: c, room: room, kind: askedRecheck}
	j.register(q)
	j.work.Go(func() { j.recheckMember(q) })
}

// recheckMember asks until the guards have answered. A member that they refuse leaves.
func (j *Joins) recheckMember(q *joinQuestion) {
	for over := false; !over; over = j.unregisterUnlessStale(q) {
		j.askAgain(q)
	}
}

// askAgain asks the guards about a member. It asks again while too many of them hang.
func (j *Joins) askAgain(q *joinQuestion) {
	for q.conn.In(q.room) {
		was := false
		err := j.ask(j.life, q, false, func(answer error) (err error) {
			if answer != nil {
				was, answer = j.exclude(j.life, q, answer)
			}
			return answer
		})
		if was && !q.conn.In(q.room) { // it may have joined again while the leave was written
			j.cfg.OnTakenOut(q.conn.ID(), q.room)
		}
		if err != nil || !q.recheckDue || wait.For(j.life, FailedFor) != nil {
			return
		}
	}
}

// Cancel cancels the guards that are asked without a caller.
func (j *Joins) Cancel() { j.quit() }

// Close lets no more questions begin, cancels those without a caller, and waits for their
// goroutines.
func (j *Joins) Close() {
	j.mu.Lock()
	j.closed = true
	j.mu.Unlock()
	j.quit()
	j.work.Wait()
}

// errTakenOut says that a join did not take place because the connection was taken out of
// the room, or ended, while the join waited.
var errTakenOut = fmt.Errorf("%w: taken out of the room while the join was waiting", errs.Refused)
