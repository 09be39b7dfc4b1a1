package owner

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// waiter is a caller that waits for a revision to be written.
type waiter struct {
	rev  uint64
	done chan error // buffered
}

// wait adds a waiter for the entry as it should be now. Conn.mu is held.
func (e *entry) wait() chan error {
	w := waiter{rev: e.rev, done: make(chan error, 1)}
	e.waiters = append(e.waiters, w)
	return w.done
}

// await blocks until what was asked for is in Redis. After ctx or answerWithin
// the caller hears that Redis is away; the entry goes on being written.
func (e *entry) await(ctx context.Context, done chan error) error {
	return Write{e: e, done: done, began: time.Now()}.Await(ctx)
}

// Write is something that has been asked for, on its way to Redis.
type Write struct {
	e     *entry
	done  chan error
	began time.Time
}

// Await blocks until Redis has it. After ctx, or answerWithin from when it was
// asked for, the caller hears that Redis is away; it goes on being written. It
// may be called once.
func (w Write) Await(ctx context.Context) error {
	select {
	case err := <-w.done:
		return err
	default:
	}
	t := time.NewTimer(w.e.lane.patience() - time.Since(w.began))
	defer t.Stop()
	select {
	case err := <-w.done:
		return err
	case <-t.C:
	case <-ctx.Done():
	}
	w.giveUp()
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return ErrUnavailable
}

// giveUp waits no longer. A state that somebody waited for is not told any more
// once there is a newer one.
func (w Write) giveUp() {
	w.e.c.mu.Lock()
	defer w.e.c.mu.Unlock()
	i := slices.IndexFunc(w.e.waiters, func(other waiter) bool { return other.done == w.done })
	if i < 0 {
		return // answered just now
	}
	rev := w.e.waiters[i].rev
	w.e.waiters = slices.Delete(w.e.waiters, i, i+1)
	if !slices.ContainsFunc(w.e.waiters, func(other waiter) bool { return other.rev == rev }) {
		w.e.unawait(func(s state) bool { return s.rev == rev })
	}
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

// awaited is an entry and a waiter of it.
type awaited struct {
	e    *entry
	done chan error
}

// awaitAll awaits every one of them, and returns the last error. After the
// first one nobody waits any longer for the rest, but none is left behind.
func awaitAll(ctx context.Context, all []awaited) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failed error
	for _, a := range all {
		if err := a.e.await(ctx, a.done); err != nil {
			failed = err
			cancel()
		}
	}
	return failed
}
