package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"
)

// allowed reports whether the room's guards let the connection see it. Where
// they do not because one of them failed (error, panic, time limit, or too
// many that hang), the error wraps ErrRefused and says why. Other errors:
// ErrNotTracked, ErrUnknownConnection (see remember), and ctx's cause.
//
// The answer holds for the metadata and rules that were in force when it was
// given: where they changed while the guards were thinking, they are asked
// again, until the time limit has passed since the question.
func (v *verdicts) allowed(ctx context.Context, conn string, member memberFunc, room string) (bool, error) {
	var last *verdict
	patience := waiting{limit: v.guardTimeout}
	defer patience.end()
	for reread := false; ; {
		r := v.rules.match(room)
		if !r.tracked {
			return false, ErrNotTracked
		}
		if len(r.guards) == 0 {
			return true, nil
		}
		m, version := member()
		a, err := v.ask(ctx, v.of(conn), question{room: room, rule: r, member: m, meta: version, last: last, sure: reread})
		if err != nil {
			return false, err
		}
		if reread = a == nil; reread {
			continue
		}
		if a == last || a.call.done() && !errors.Is(a.call.err, errCalledOff) {
			return a.outcome()
		}
		if err := patience.await(ctx, a.call); err != nil {
			return false, err
		}
		last = a
	}
}

// waiting is one asker's waiting for verdicts, limit long in all.
type waiting struct {
	limit  time.Duration
	ctx    context.Context // nil until there was something to wait for
	cancel context.CancelFunc
}

// await returns nil once the call has settled, the cause of ctx if that ended
// first, and a refusal if the time did.
func (w *waiting) await(ctx context.Context, k *call) error {
	if w.ctx == nil {
		w.ctx, w.cancel = context.WithTimeoutCause(ctx, w.limit, &timeoutError{callbackGuard, w.limit})
	}
	select {
	case <-k.settled:
		return nil
	case <-w.ctx.Done():
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return refusedBecause(context.Cause(w.ctx))
}

func (w *waiting) end() {
	if w.cancel != nil {
		w.cancel()
	}
}

// question is what ask needs to know.
type question struct {
	room   string
	rule   rule
	member Member
	meta   uint64
	last   *verdict // that the asker has waited for
	sure   bool     // versions were read after a newer verdict was seen
}

// answeredBy reports whether a is about the same metadata and rules.
func (q *question) answeredBy(a *verdict) bool {
	return a.meta == q.meta && a.rules == q.rule.version
}

// ask returns the verdict that answers q, perhaps still under way, and starts
// it if there is none. A nil verdict asks for q to be put again with versions
// read anew: a verdict for newer ones was there already, and must not give way
// to one for older ones.
func (v *verdicts) ask(ctx context.Context, c *connVerdicts, q question) (*verdict, error) {
	if c == nil {
		return nil, ErrUnknownConnection
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return nil, ErrUnknownConnection
	}
	if q.last != nil && !q.last.dropped && q.answeredBy(q.last) {
		return q.last, nil
	}
	old := c.kept[q.room]
	if old != nil && q.answeredBy(old) && (old.stray || !old.stale()) {
		return old, nil // stray: one goroutine per question, however long it hangs
	}
	if old != nil && !q.sure && (old.meta > q.meta || old.rules > q.rule.version) {
		return nil, nil
	}
	if old != nil {
		v.callOff(c, old)
		delete(c.kept, q.room)
	}
	if err := v.admit(c); err != nil {
		return nil, err
	}
	a := v.begin(context.WithoutCancel(ctx), c, callbackGuard, v.guardTimeout, q.rule.guards, q.member, q.room)
	a.meta, a.rules = q.meta, q.rule.version
	c.kept[q.room] = a
	v.evict(c, a)
	return a, nil
}

// stale reports whether the verdict is a failure that has had its time.
func (a *verdict) stale() bool {
	return a.call.done() && a.call.err != nil && time.Since(a.call.at) >= failedFor
}

// outcome is the answer of a verdict that has settled.
func (a *verdict) outcome() (bool, error) {
	if a.call.err != nil {
		return false, refusedBecause(a.call.err)
	}
	return a.ok, nil
}

// refusedBecause wraps ErrRefused around the failure of a guard. What a guard
// returned for reasons of its own is only quoted: were it wrapped, a guard
// that failed with, say, ErrNotTracked about another room would pass for the
// answer about this one.
func refusedBecause(err error) error {
	_, chosen := errors.AsType[*CommandError](err)
	_, late := errors.AsType[*timeoutError](err)
	_, thrown := errors.AsType[*panicError](err)
	if chosen || late || thrown || errors.Is(err, ErrClosed) || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrBusy) {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return fmt.Errorf("%w: guard failed: %v", ErrRefused, err)
}

// admit refuses to start another guard where too many hang. The caller holds
// c.mu.
func (v *verdicts) admit(c *connVerdicts) error {
	if c.strays < straysPerConn && v.strays.Load() < straysAll {
		return nil
	}
	v.busy.Add(1)
	return refusedBecause(fmt.Errorf("%w: too many guards hang", ErrBusy))
}

// begin starts the guards, one after the other until one says no. The caller
// holds c.mu.
func (v *verdicts) begin(ctx context.Context, c *connVerdicts, name string, limit time.Duration, guards []Guard, m Member, room string) *verdict {
	a := &verdict{}
	m.Metadata = bytes.Clone(m.Metadata) // a guard may do with it as it likes
	run := func(ctx context.Context) error {
		for _, guard := range guards {
			if ok, err := guard(ctx, m, room); err != nil || !ok {
				v.refused.Add(1)
				return err
			}
		}
		a.ok = true
		return nil
	}
	a.call = v.calls.start(ctx, name, limit, run, watch{
		ended: func() { v.guardsEnded(c, a) },
		late: func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			v.noteStray(c, a)
		},
	})
	return a
}

// joinAllowed reports whether the room's join guards let the connection join
// it, with errors as allowed has them. They are asked each time; a room
// without any, tracked or not, may be joined.
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
	c.mu.Lock()
	err := v.admit(c)
	var a *verdict
	if err == nil {
		a = v.begin(ctx, c, callbackJoinGuard, v.joinTimeout, r.joinGuards, m, room)
	}
	c.mu.Unlock()
	if err != nil {
		return false, err
	}
	<-a.call.settled
	if err := context.Cause(ctx); err != nil && a.call.err != nil {
		return false, err
	}
	return a.outcome()
}
