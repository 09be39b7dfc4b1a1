package owner

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// waiter is a caller that waits for a revision to be written.
type waiter struct {
	rev uint64
	*ticket
}

// ticket is what a caller waits with. There are many callers, and each waits
// for a moment: tickets are used again.
type ticket struct {
	done  chan error // of capacity 1
	limit *time.Timer
}

// ticket returns one on which nothing is to come yet.
func (o *Owner) ticket() *ticket {
	if t, ok := o.tickets.Get().(*ticket); ok {
		return t
	}
	t := &ticket{done: make(chan error, 1), limit: time.NewTimer(time.Hour)}
	t.limit.Stop()
	return t
}

// Write is something that has been asked for, on its way to Redis.
type Write struct {
	e     *entry
	began time.Time
	*ticket
}

// wait returns what waits for the entry as it should be now. Conn.mu is held.
func (e *entry) wait() Write {
	w := Write{e: e, began: time.Now(), ticket: e.c.o.ticket()}
	e.waiters = append(e.waiters, waiter{rev: e.rev, ticket: w.ticket})
	return w
}

// Await blocks until Redis has it. After ctx, or answerWithin from when it was
// asked for, the caller hears that Redis is away; it goes on being written. It
// may be called once.
func (w Write) Await(ctx context.Context) error {
	err := w.await(ctx)
	w.e.c.o.tickets.Put(w.ticket) // nothing comes on it any more
	return err
}

func (w Write) await(ctx context.Context) error {
	select {
	case err := <-w.done:
		return err
	default:
	}
	w.limit.Reset(w.e.lane.patience() - time.Since(w.began))
	defer w.limit.Stop()
	select {
	case err := <-w.done:
		return err
	case <-w.limit.C:
	case <-ctx.Done():
	}
	if !w.giveUp() {
		return <-w.done // answered just now
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return ErrUnavailable
}

// giveUp waits no longer; false: the answer is there. A state that somebody
// waited for is not told any more once there is a newer one.
func (w Write) giveUp() bool {
	w.e.c.mu.Lock()
	defer w.e.c.mu.Unlock()
	i := slices.IndexFunc(w.e.waiters, func(other waiter) bool { return other.ticket == w.ticket })
	if i < 0 {
		return false
	}
	rev := w.e.waiters[i].rev
	w.e.waiters = slices.Delete(w.e.waiters, i, i+1)
	if !slices.ContainsFunc(w.e.waiters, func(other waiter) bool { return other.rev == rev }) {
		w.e.unawait(func(s state) bool { return s.rev == rev })
	}
	return true
}

// answer tells the waiters up to a revision. Conn.mu is held.
func (e *entry) answer(rev uint64, err error) {
	kept := e.waiters[:0]
	for _, w := range e.waiters {
		if w.rev > rev {
			kept = append(kept, w)
			continue
		}
		w.done <- err
	}
	clear(e.waiters[len(kept):])
	if e.waiters = kept; len(kept) == 0 {
		e.waiters = nil
	}
}

// awaitAll awaits every one of them, and returns the first error. After it
// nothing waits any longer for the rest, but none is left behind.
func awaitAll(ctx context.Context, all []Write) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error
	for _, w := range all {
		if err := w.Await(ctx); err != nil && failed == nil {
			failed = err
			cancel()
		}
	}
	return failed
}
