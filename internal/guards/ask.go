package guards

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/wait"
)

// RecheckPause is the shortest time between two rechecks of one subscription. One recheck
// answers all changes that come in that time. The first recheck after a pause is at once.
const RecheckPause = 100 * time.Millisecond

// Decision is the result of Decide.
type Decision struct {
	OK bool
	By *Answer // nil: the room has no guards
	// RecheckDue says that an earlier yes stands because too many guards hang. They have
	// to be asked later.
	RecheckDue bool
}

// Question is what Decide is asked. The caller sets the exported fields.
type Question struct {
	Room string
	// Occupancy says that the question is about the numbers of the room. The guards of the
	// numbers answer it.
	Occupancy bool
	Since     time.Time // an answer that began earlier is too old; zero: none is
	Last      *Answer   // that the caller has got before; it answers while it stands

	rule         Rule
	member       Member
	meta         uint64
	reread       bool      // the versions were read after a newer answer was seen
	recheckDue   bool      // set by ask: see Decision
	recheckSince time.Time // since when; zero: nothing has changed since the earlier yes
}

// Fresh returns the question of a client's request about a room. An old answer does not
// count for it.
func Fresh(room string) Question { return Question{Room: room, Since: time.Now().Add(-freshFor)} }

// Decide reports whether the guards of a room let a connection see it. If they do not
// because one of them failed (error, panic, timeout, or too many that hang), the error
// wraps errs.Refused and says why. Other errors are errs.NotTracked,
// errs.UnknownConnection (see AddConn), and the cause of ctx.
//
// The answer is about the metadata and the rules that were in force when it was given. If
// they change while the guards are asked, the guards are asked again, until GuardTimeout
// has passed since the question.
func (c *Cache) Decide(ctx context.Context, conn string, member MemberFunc, q Question) (Decision, error) {
	asking := c.NewRetry()
	defer asking.End()
	for {
		if !c.fillIn(&q, member) {
			return Decision{}, NotTracked(q.Room)
		}
		if len(q.guards()) == 0 {
			return Decision{OK: true}, nil
		}
		a, err := c.ask(ctx, c.of(conn), &q)
		if err == nil && q.recheckDue && time.Since(q.recheckSince) < min(FailedFor, c.guardTimeout) {
			if wait.For(ctx, RecheckPause) != nil {
				return Decision{}, context.Cause(ctx)
			}
			continue
		}
		if err != nil || q.recheckDue {
			return Decision{OK: q.recheckDue, RecheckDue: q.recheckDue}, err
		}
		if q.reread = a == nil; q.reread {
			continue
		}
		if a == q.Last || a.call.Done() && !errors.Is(a.call.Err(), callbacks.ErrCanceled) {
			ok, err := c.outcome(a)
			return Decision{OK: ok, By: a}, err
		}
		if err := asking.await(ctx, a.call); err != nil {
			return Decision{}, err
		}
		q.Last = a
		if c.fillIn(&q, member); !c.stands(c.of(conn), &q) {
			if err := asking.Again(ctx); err != nil {
				return Decision{}, err
			}
		}
	}
}

// fillIn reads the rule and the metadata that a question is about. It reports whether the
// room is tracked.
func (c *Cache) fillIn(q *Question, member MemberFunc) bool {
	q.rule = c.rules.Match(q.Room)
	if q.rule.Tracked && len(q.guards()) > 0 {
		q.member, q.meta = member()
	}
	return q.rule.Tracked
}

// apart reports whether the question has other guards than those that let a connection see
// the room.
func (q *Question) apart() bool { return q.Occupancy && q.rule.ownOccupancy }

// guards returns the guards that answer the question.
func (q *Question) guards() []Func {
	if q.apart() {
		return q.rule.occupancyGuards
	}
	return q.rule.guards
}

// guardRules returns the rules of the guards.
func (q *Question) guardRules() []string {
	if q.apart() {
		return q.rule.occupancyRules
	}
	return q.rule.guardRules
}

// key returns the key of the answer in connAnswers.kept.
func (q *Question) key() string {
	if q.apart() {
		return occupancyKey(q.Room)
	}
	return q.Room
}

// occupancyKey is the key of the answer of the guards of the numbers, if these are others
// than those that let a connection see the room. No room has this name.
func occupancyKey(room string) string { return "\x00" + room }

// answeredBy reports whether a is about the same metadata and rules.
func (q *Question) answeredBy(a *Answer) bool {
	return a.meta == q.meta && a.rules == q.rule.version
}

// stands reports whether the answer for which the caller has waited answers the question.
func (c *Cache) stands(answers *connAnswers, q *Question) bool {
	if answers == nil {
		return false
	}
	answers.mu.Lock()
	defer answers.mu.Unlock()
	return q.lastStands()
}

// lastStands is stands with connAnswers.mu held.
func (q *Question) lastStands() bool {
	return q.Last != nil && !q.Last.invalid && q.Last.meta == q.meta && q.Last.rules == q.rule.version
}

// ask returns the answer to q, which may still be awaited. It starts the guards if there
// is no answer. A nil answer means that a newer one is kept, which must not be replaced by
// one about older metadata or rules: the caller reads both again and asks again.
//
// If the guards cannot be asked because too many hang, an earlier yes stands: ask sets
// q.recheckDue and returns nil. If something has changed since that yes, Decide does not
// rely on it for FailedFor, because calls that have just been cancelled may only need a
// moment to return.
func (c *Cache) ask(ctx context.Context, answers *connAnswers, q *Question) (*Answer, error) {
	if answers == nil {
		return nil, errs.UnknownConnection
	}
	a, full, err := c.askLocked(ctx, answers, q)
	if full == nil {
		return a, err
	}
	c.logBudget(full) // without the lock, because it logs
	if q.recheckDue {
		return nil, nil
	}
	c.busy.Add(1)
	return nil, c.refusal(full)
}

func (c *Cache) askLocked(ctx context.Context, answers *connAnswers, q *Question) (*Answer, *budgetError, error) {
	answers.mu.Lock()
	defer answers.mu.Unlock()
	if answers.removed {
		return nil, nil, errs.UnknownConnection
	}
	if q.lastStands() {
		return q.Last, nil, nil
	}
	key := q.key()
	old := answers.kept[key]
	if old != nil && !old.invalid && q.answeredBy(old) && (old.hanging || !old.stale() && !old.beganBefore(q.Since)) {
		return old, nil, nil // a hanging call is the only one about its question
	}
	if old != nil && !q.reread && (old.meta > q.meta || old.rules > q.rule.version) {
		return nil, nil, nil
	}
	stood := old != nil && old.wasYes()
	full := c.admit(answers, q.guardRules())
	if q.recheckDue = full != nil && stood; q.recheckDue && (old.invalid || !q.answeredBy(old)) {
		if old.recheckDue.IsZero() {
			old.recheckDue = time.Now()
		}
		q.recheckSince = old.recheckDue
	}
	if full != nil {
		return nil, full, nil
	}
	if old != nil {
		c.cancel(answers, old)
	}
	a := &Answer{meta: q.meta, rules: q.rule.version, of: q.guardRules(), stood: stood}
	c.runGuards(context.WithoutCancel(ctx), answers, a, guardRun{callbacks.Guard, c.guardTimeout, q.guards(), q.member, q.Room})
	answers.kept[key] = a
	c.evict(answers, a)
	return a, nil, nil
}

// stale reports whether the answer is a failure that has been kept for FailedFor.
func (a *Answer) stale() bool {
	return a.call.Done() && a.call.Err() != nil && time.Since(a.call.SettledAt()) >= FailedFor
}

// beganBefore reports whether the answer has settled and its run began before t.
func (a *Answer) beganBefore(t time.Time) bool { return a.call.Done() && a.asked.Before(t) }

// wasYes reports whether the last answer of the guards was yes. A run that was cancelled
// has not changed it. One that failed was a no.
func (a *Answer) wasYes() bool {
	if !a.call.Done() || errors.Is(a.call.Err(), callbacks.ErrCanceled) {
		return a.stood
	}
	return a.call.Err() == nil && a.ok
}

// outcome returns an answer that has settled.
func (c *Cache) outcome(a *Answer) (bool, error) {
	if a.call.Err() != nil {
		return false, c.refusal(a.call.Err())
	}
	return a.ok, nil
}

// refusal wraps errs.Refused around the failure of a guard. It only quotes an error that
// a guard returned for its own reasons. If it wrapped such an error, and a guard failed
// with, say, errs.NotTracked about another room, that would look like the answer about
// this room.
func (c *Cache) refusal(err error) error {
	late, thrown := errs.Has[*callbacks.TimeoutError](err), errs.Has[*callbacks.PanicError](err)
	if c.calls.IsAnswer(err) || late || thrown || errors.Is(err, errs.Closed) || errors.Is(err, errs.Unavailable) || errors.Is(err, errs.Busy) {
		return fmt.Errorf("%w: %w", errs.Refused, err)
	}
	return fmt.Errorf("%w: guard failed: %v", errs.Refused, err)
}

// guardRun holds the guards that are asked about a member and a room, the name of the
// callback and the time limit.
type guardRun struct {
	name   string
	limit  time.Duration
	guards []Func
	member Member
	room   string
}

// runGuards starts the guards of an answer. They run one after the other until one says
// no. The caller holds answers.mu.
func (c *Cache) runGuards(ctx context.Context, answers *connAnswers, a *Answer, r guardRun) {
	r.member.Metadata = bytes.Clone(r.member.Metadata) // a guard may change it
	a.asked = time.Now()
	all := func(ctx context.Context) error {
		for i, guard := range r.guards {
			if err := context.Cause(ctx); err != nil {
				return err // the hanging call is counted for the guard that ran until now
			}
			a.at.Store(int32(i))
			if ok, err := guard(ctx, r.member, r.room); err != nil || !ok {
				c.refused.Add(1)
				return err
			}
		}
		a.ok = true
		return nil
	}
	a.call = c.calls.Start(ctx, r.name, r.limit, all, callbacks.Events{
		Ended: func() { c.guardsEnded(answers, a) },
		Late: func() {
			answers.mu.Lock()
			defer answers.mu.Unlock()
			c.noteHanging(answers, a)
		},
	})
}

// joinAllowed asks the join guards of a room whether a connection may join it, with errors
// as those of Decide. They are asked each time. A room without join guards, tracked or
// not, may be joined. The end of ctx cancels them.
func (c *Cache) joinAllowed(ctx context.Context, conn string, member MemberFunc, room string) (bool, error) {
	r := c.rules.Match(room)
	if len(r.joinGuards) == 0 {
		return true, nil
	}
	answers := c.of(conn)
	if answers == nil {
		return false, errs.UnknownConnection
	}
	m, _ := member()
	a := &Answer{of: r.joinRules}
	answers.mu.Lock()
	full := c.admit(answers, r.joinRules)
	if full == nil {
		c.runGuards(ctx, answers, a, guardRun{callbacks.JoinGuard, c.joinTimeout, r.joinGuards, m, room})
	}
	answers.mu.Unlock()
	if full != nil {
		c.logBudget(full)
		c.busy.Add(1)
		return false, c.refusal(full)
	}
	<-a.call.Settled()
	if err := context.Cause(ctx); err != nil && a.call.Err() != nil {
		return false, err
	}
	return c.outcome(a)
}
