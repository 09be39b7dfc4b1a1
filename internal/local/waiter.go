package local

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// waiter is a caller that waits until a revision is written.
type waiter struct {
	rev uint64
	*waitTicket
}

// waitTicket is the channel and timer of a waiting caller. Tickets are reused because
// there are many callers and each waits only for a moment.
type waitTicket struct {
	done  chan error // of capacity 1
	limit *time.Timer
}

// ticket returns a ticket with an empty channel.
func (r *Registry) ticket() *waitTicket {
	if t, ok := r.tickets.Get().(*waitTicket); ok {
		return t
	}
	t := &waitTicket{done: make(chan error, 1), limit: time.NewTimer(time.Hour)}
	t.limit.Stop()
	return t
}

// Write is a change on its way to Redis.
type Write struct {
	e          *entry
	began      time.Time
	superseded bool
	*waitTicket
}

// Superseded reports whether this state took the place of one whose write had not begun.
// Because of the interval the earlier one is never delivered.
func (w Write) Superseded() bool { return w.superseded }

// wait returns a Write for the current revision of the entry. Conn.mu is held.
func (e *entry) wait() Write {
	w := Write{e: e, began: time.Now(), waitTicket: e.c.registry.ticket()}
	e.waiters = append(e.waiters, waiter{rev: e.rev, waitTicket: w.waitTicket})
	return w
}

// Await waits until Redis has the change. It returns ErrUnavailable if ctx ends, or
// answerTimeout after the change. The change is still written later. Await may be called
// once.
func (w Write) Await(ctx context.Context) error { return w.await(ctx, answerTimeout) }

// await is Await with another time limit.
func (w Write) await(ctx context.Context, within time.Duration) error {
	err := w.outcome(ctx, within)
	w.e.c.registry.tickets.Put(w.waitTicket) // nothing is sent on it any more
	return err
}

func (w Write) outcome(ctx context.Context, within time.Duration) error {
	select {
	case err := <-w.done:
		return err
	default:
	}
	w.limit.Reset(min(w.e.writer.waitLimit(), within) - time.Since(w.began))
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
		return fmt.Errorf("%w: %w", w.e.writer.unavailable(), err)
	}
	return w.e.writer.unavailable()
}

// giveUp removes the waiter. It returns false if the answer is there already. A state
// without a waiter is superseded by a newer one.
func (w Write) giveUp() bool {
	w.e.c.mu.Lock()
	defer w.e.c.mu.Unlock()
	i := slices.IndexFunc(w.e.waiters, func(other waiter) bool { return other.waitTicket == w.waitTicket })
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

// answer answers the waiters up to a revision. Conn.mu is held.
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

// awaitAll awaits all of them and returns the first error. After an error it does not
// block for the rest, but still collects their answers.
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
