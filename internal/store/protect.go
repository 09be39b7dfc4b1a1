package store

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
)

var (
	// errHook is the outcome of a call that ended with a panic or runtime.Goexit.
	errHook = errors.New("a hook of the redis client panicked")
	// errHangs is the outcome of a call that was left behind.
	errHangs = errors.New("the redis client does not return")
)

// Times that a protected call may go on after the end of its context.
const (
	soon       = 100 * time.Millisecond
	eventually = 10 * time.Second // a dial or a read of the client may have to run out of time
)

// protected calls f, in which the client calls its hooks, and returns what f
// returns. Hooks are the app's code: if one panics or ends the goroutine, that
// is an error like any other of Redis. If f has not returned when patience has
// passed since the end of ctx, it is left behind.
func protected[T any](ctx context.Context, patience time.Duration, f func() (T, error)) (T, error) {
	done := make(chan result[T], 1)
	go func() { // ends with f
		r := result[T]{err: errHook}
		defer func() {
			if value := recover(); value != nil {
				r = result[T]{err: hookPanic(value)}
			}
			done <- r
		}()
		v, err := f()
		r = result[T]{v, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case r := <-done:
		return r.value, r.err
	case <-t.C:
		var none T
		return none, errHangs
	}
}

// alone is protected for what is tried again and again: while a call that was
// left behind still runs, there is no other. running belongs to that purpose.
func alone[T any](ctx context.Context, patience time.Duration, running *atomic.Bool, f func() (T, error)) (T, error) {
	if !running.CompareAndSwap(false, true) {
		var none T
		return none, errHangs
	}
	return protected(ctx, patience, func() (T, error) {
		defer running.Store(false)
		return f()
	})
}

func hookPanic(value any) error { return fmt.Errorf("%w: %s", errHook, limit.PanicText(value)) }
