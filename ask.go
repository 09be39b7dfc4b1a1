package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"
)

// allowed reports whether the room's guards let the connection see it, however
// old their verdict is. If they do not because one of them failed (error, panic,
// time limit, or too many that hang), the error wraps ErrRefused and says why.
// Other errors: ErrNotTracked, ErrUnknownConnection (see remember), and ctx's
// cause.
//
// The answer holds for the metadata and rules that were in force when it was
// given. If they change while the guards are asked, the guards are asked again,
// until the time limit has passed since the question.
func (v *verdicts) allowed(ctx context.Context, conn string, member memberFunc, room string) (bool, error) {
	d, err := v.decide(ctx, conn, member, question{room: room})
	return d.ok, err
}

// decision is the answer of decide.
type decision struct {
	ok bool
	by *verdict // nil: the room has no guards
	// owed says that an earlier yes stands because too many guards hang, and that
	// they have to be asked later.
	owed bool
}

// decide is allowed for a question that says more than the room.
func (v *verdicts) decide(ctx context.Context, conn string, member memberFunc, q question) (decision, error) {
	asking := repeated{name: callbackGuard, limit: v.guardTimeout, log: v.calls.log}
	defer asking.end()
	for {
		if !v.put(&q, member) {
			return decision{}, notTracked(q.room)
		}
		if len(q.rule.guards) == 0 {
			return decision{ok: true}, nil
		}
		a, err := v.ask(ctx, v.of(conn), &q)
		if err == nil && q.owed && time.Since(q.owedAt) < min(failedFor, v.guardTimeout) {
			if !pause(ctx, recheckPause) {
				return decision{}, context.Cause(ctx)
			}
			continue
		}
		if err != nil || q.owed {
			return decision{ok: q.owed, owed: q.owed}, err
		}
		if q.reread = a == nil; q.reread {
			continue
		}
		if a == q.last || a.call.done() && !errors.Is(a.call.err, errCalledOff) {
			ok, err := a.outcome()
			return decision{ok: ok, by: a}, err
		}
		if err := asking.await(ctx, a.call); err != nil {
			return decision{}, err
		}
		q.last = a
		if v.put(&q, member); !v.stands(v.of(conn), &q) {
			if err := asking.again(ctx); err != nil {
				return decision{}, err
			}
		}
	}
}

// question is the input of ask. Callers set room and, if they wish, since and last.
// decide sets the others.
type question struct {
	room   string
	since  time.Time // a verdict that began earlier is too old; zero: none is
	rule   rule
	member Member
	meta   uint64
	last   *verdict  // that the caller has got before; it answers while it stands
	reread bool      // versions were read after a newer verdict was seen
	owed   bool      // set by ask: see decision
	owedAt time.Time // since when; zero: nothing has changed since the earlier yes
}

// put reads the rule and the metadata that a question is about. It reports
// whether the room is tracked.
func (v *verdicts) put(q *question, member memberFunc) bool {
	q.rule = v.rules.match(q.room)
	if q.rule.tracked && len(q.rule.guards) > 0 {
		q.member, q.meta = member()
	}
	return q.rule.tracked
}

// answeredBy reports whether a is about the same metadata and rules.
func (q *question) answeredBy(a *verdict) bool {
	return a.meta == q.meta && a.rules == q.rule.version
}

// stands reports whether the verdict that the caller has waited for answers the
// question.
func (v *verdicts) stands(c *connVerdicts, q *question) bool {
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return q.lastStands()
}

// lastStands is stands with connVerdicts.mu held.
func (q *question) lastStands() bool {
	return q.last != nil && !q.last.void && q.last.meta == q.meta && q.last.rules == q.rule.version
}

// ask returns the verdict that answers q, perhaps still under way, and starts
// it if there is none. A nil verdict means that q has to be put again with
// versions that are read now: a verdict for newer ones was there already, and
// must not give way to one for older ones. If the guards cannot be asked because
// too many hang, an earlier yes stands: q.owed is set and the verdict is nil.
// If something has changed, decide does not rely on that yes for failedFor: calls that
// were called off just now may only need a moment to return.
func (v *verdicts) ask(ctx context.Context, c *connVerdicts, q *question) (*verdict, error) {
	if c == nil {
		return nil, ErrUnknownConnection
	}
	a, full, err := v.askLocked(ctx, c, q)
	if full == nil {
		return a, err
	}
	v.exhausted(full) // logs, so not with the lock held
	if q.owed {
		return nil, nil
	}
	v.busy.Add(1)
	return nil, refusedBecause(full)
}

func (v *verdicts) askLocked(ctx context.Context, c *connVerdicts, q *question) (*verdict, *budgetError, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return nil, nil, ErrUnknownConnection
	}
	if q.lastStands() {
		return q.last, nil, nil
	}
	old := c.kept[q.room]
	if old != nil && !old.void && q.answeredBy(old) && (old.stray || !old.stale() && !old.began(q.since)) {
		return old, nil, nil // stray: one call per question, however long it hangs
	}
	if old != nil && !q.reread && (old.meta > q.meta || old.rules > q.rule.version) {
		return nil, nil, nil
	}
	stood := old != nil && old.wasYes()
	full := v.admit(c, q.rule.guardRules)
	if q.owed = full != nil && stood; q.owed && (old.void || !q.answeredBy(old)) {
		if old.owed.IsZero() {
			old.owed = time.Now()
		}
		q.owedAt = old.owed
	}
	if full != nil {
		return nil, full, nil
	}
	if old != nil {
		v.callOff(c, old)
	}
	a := &verdict{meta: q.meta, rules: q.rule.version, of: q.rule.guardRules, stood: stood}
	v.begin(context.WithoutCancel(ctx), c, a, run{callbackGuard, v.guardTimeout, q.rule.guards, q.member, q.room})
	c.kept[q.room] = a
	v.evict(c, a)
	return a, nil, nil
}

// stale reports whether the verdict is a failure that has been kept for failedFor.
func (a *verdict) stale() bool {
	return a.call.done() && a.call.err != nil && time.Since(a.call.at) >= failedFor
}

// began reports whether the verdict has settled and was asked for before t.
func (a *verdict) began(t time.Time) bool { return a.call.done() && a.asked.Before(t) }

// wasYes reports whether the last answer of the guards was yes. A run that was
// called off has not changed it; one that failed was a no.
func (a *verdict) wasYes() bool {
	if !a.call.done() || errors.Is(a.call.err, errCalledOff) {
		return a.stood
	}
	return a.call.err == nil && a.ok
}

// outcome is the answer of a verdict that has settled.
func (a *verdict) outcome() (bool, error) {
	if a.call.err != nil {
		return false, refusedBecause(a.call.err)
	}
	return a.ok, nil
}

// refusedBecause wraps ErrRefused around the failure of a guard. An error that a
// guard returned for reasons of its own is only quoted. If it were wrapped, a
// guard that failed with, say, ErrNotTracked about another room would pass for
// the answer about this one.
func refusedBecause(err error) error {
	_, chosen := errors.AsType[*CommandError](err)
	_, late := errors.AsType[*timeoutError](err)
	_, thrown := errors.AsType[*panicError](err)
	if chosen || late || thrown || errors.Is(err, ErrClosed) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrBusy) {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("%w: guard failed: %v", ErrRefused, err)
}

// run holds the guards that a verdict asks about a member and a room, with the
// name of the callback and the time limit.
type run struct {
	name   string
	limit  time.Duration
	guards []Guard
	member Member
	room   string
}

// begin starts a verdict's guards, one after the other until one says no. The
// caller holds c.mu.
func (v *verdicts) begin(ctx context.Context, c *connVerdicts, a *verdict, r run) {
	r.member.Metadata = bytes.Clone(r.member.Metadata) // a guard may change it
	a.asked = time.Now()
	all := func(ctx context.Context) error {
		for i, guard := range r.guards {
			if err := context.Cause(ctx); err != nil {
				return err // a stray is counted for the guard that ran until now
			}
			a.at.Store(int32(i))
			if ok, err := guard(ctx, r.member, r.room); err != nil || !ok {
				v.refused.Add(1)
				return err
			}
		}
		a.ok = true
		return nil
	}
	a.call = v.calls.start(ctx, r.name, r.limit, all, watch{
		ended: func() { v.guardsEnded(c, a) },
		late: func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			v.noteStray(c, a)
		},
	})
}

// joinAllowed asks the room's join guards whether the connection may join it,
// with errors as those of allowed. They are asked each time. A room without join
// guards, tracked or not, may be joined. The end of ctx calls them off.
func (v *verdicts) joinAllowed(ctx context.Context, conn string, member memberFunc, room string) (bool, error) {
	r := v.rules.match(room)
	if len(r.joinGuards) == 0 {
		return true, nil
	}
	c := v.of(conn)
	if c == nil {
		return false, ErrUnknownConnection
	}
	m, _ := member()
	a := &verdict{of: r.joinRules}
	c.mu.Lock()
	full := v.admit(c, r.joinRules)
	if full == nil {
		v.begin(ctx, c, a, run{callbackJoinGuard, v.joinTimeout, r.joinGuards, m, room})
	}
	c.mu.Unlock()
	if full != nil {
		v.exhausted(full)
		v.busy.Add(1)
		return false, refusedBecause(full)
	}
	<-a.call.settled
	if err := context.Cause(ctx); err != nil && a.call.err != nil {
		return false, err
	}
	return a.outcome()
}
