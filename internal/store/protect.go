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
	// errHook is the result of a call that ended with a panic or runtime.Goexit.
	errHook = errors.New("a hook of the redis client panicked")
	// errHangs is the result of a call that was abandoned.
	errHangs = errors.New("the redis client does not return")
)

// The grace periods of isolated calls after the end of their context.
const (
	shortGrace = 100 * time.Millisecond
	longGrace  = 10 * time.Second // enough for a dial or read timeout of the client
)

// isolated calls f, in which the client runs its hooks, and returns the result of f.
// Hooks are code of the app: if one panics or ends the goroutine, isolated returns an
// error. If f does not return within grace after the end of ctx, isolated abandons it.
func isolated[T any](ctx context.Context, grace time.Duration, f func() (T, error)) (T, error) {
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
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case r := <-done:
		return r.value, r.err
	case <-t.C:
		var none T
		return none, errHangs
	}
}

// exclusive is isolated for periodic calls: it fails as long as an earlier call that
// was abandoned still runs. Each purpose has its own running flag.
func exclusive[T any](ctx context.Context, grace time.Duration, running *atomic.Bool, f func() (T, error)) (T, error) {
	if !running.CompareAndSwap(false, true) {
		var none T
		return none, errHangs
	}
	return isolated(ctx, grace, func() (T, error) {
		defer running.Store(false)
		return f()
	})
}

func hookPanic(value any) error { return fmt.Errorf("%w: %s", errHook, limit.PanicText(value)) }
