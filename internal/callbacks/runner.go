package callbacks

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/limit"
)

// Config is the configuration of a Runner.
type Config struct {
	Logger *slog.Logger
	// IsAnswer reports whether an error is an answer that the app has chosen for the
	// client, and not a failure. Defaults to none.
	IsAnswer func(error) bool
	// Typed returns copies of the errors that err wraps and that carry data of the app.
	// Defaults to none.
	Typed func(err error) []error
	// Known are sentinel errors that are looked for in the errors of callbacks, besides
	// those of package errs and the standard library.
	Known []error
}

// Runner runs callbacks. It is safe for concurrent use.
//
// The name of a callback goes to logs and counters. It must be one of a fixed set, and
// never a text that a client chose.
type Runner struct {
	isAnswer func(error) bool
	freezer  freezer
	log      *limit.Log
	base     context.Context // ends when Close or Cancel is called
	cancel   context.CancelFunc

	mu      sync.Mutex // guards the fields below
	closed  bool
	running int              // without detached calls
	inside  map[uint64]*Call // by goroutine
	idle    chan struct{}    // closed when running falls to 0; nil if nothing waits
	counts  map[string]*Counts
}

// New returns a Runner. The contexts of its callbacks end with ctx.
func New(ctx context.Context, c Config) *Runner {
	base, cancel := context.WithCancel(ctx)
	return &Runner{
		isAnswer: c.IsAnswer,
		freezer:  freezer{known: append(slices.Clip(knownErrors), c.Known...), typed: c.Typed},
		log:      limit.NewLog(c.Logger), base: base, cancel: cancel,
		inside: make(map[uint64]*Call), counts: make(map[string]*Counts),
	}
}

// Log returns the log of the callbacks, for other lines about them.
func (r *Runner) Log() *limit.Log { return r.log }

// Run calls fn and returns its error. It returns a *PanicError if fn panicked, a
// *TimeoutError if fn did not return within timeout (0 or less: no limit), the cause of
// ctx if ctx ended first, or errs.Closed after Close. In the last three cases fn may still
// be running when Run returns, with its context cancelled. The caller must not read then
// what fn writes.
func (r *Runner) Run(ctx context.Context, name string, timeout time.Duration, fn func(context.Context) error) error {
	k := r.Start(ctx, name, timeout, fn, Events{})
	<-k.settled
	return k.err
}

// Start is Run without the waiting.
func (r *Runner) Start(ctx context.Context, name string, timeout time.Duration, fn func(context.Context) error, events Events) *Call {
	k := &Call{name: name, settled: make(chan struct{})}
	err := context.Cause(ctx)
	if err == nil {
		err = r.enter(name)
	}
	if err != nil {
		k.settle(err, nil)
		return k
	}
	ctx, k.cancel = context.WithCancelCause(ctx)
	release := context.AfterFunc(r.base, func() { k.cancel(errs.Closed) })
	stopTimer := context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, stopTimer = context.WithTimeoutCause(ctx, timeout, &TimeoutError{Name: name, After: timeout})
	}
	k.giveUp = func(why error) {
		if r.finish(ctx, k, why) && events.Late != nil {
			events.Late()
		}
	}
	stopWaiting := context.AfterFunc(ctx, func() { k.giveUp(errContextEnded) })
	go func() { // enter counts it, leave discounts it, and Wait waits for it
		defer r.leave(k)
		err := error(&PanicError{Name: name, Value: errGoexit})
		defer func() {
			_ = recover() // printing the value of a panic has panicked; err says already that fn did
			if events.Ended != nil {
				events.Ended()
			}
			r.finish(ctx, k, err)
			stopWaiting()
			stopTimer()
			release()
			k.cancel(nil)
		}()
		r.begin(k)
		err = r.invoke(ctx, name, fn)
	}()
	return k
}

// invoke calls fn and freezes its error.
func (r *Runner) invoke(ctx context.Context, name string, fn func(context.Context) error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = newPanicError(name, v)
		}
	}()
	if err = r.freezer.freeze(fn(ctx), context.Cause(ctx)); err == nil {
		if ctx.Err() != nil {
			err = errContextEnded // the answer is too late
		}
	}
	return err
}

// finish settles the call, once, with err, which must be frozen. It reports whether it was
// this call of finish that settled the callback. The outcome is counted before the
// callback is settled, and logged after that, because logging may take time. If the
// callback gave up because its context ended, the outcome is what ended the context. So it
// does not matter which of the two was first.
func (r *Runner) finish(ctx context.Context, k *Call, err error) (first bool) {
	abandoned := false
	if cause := context.Cause(ctx); cause != nil &&
		(errors.Is(err, errContextEnded) || errors.Is(err, ctx.Err()) || errors.Is(err, cause)) {
		_, late := cause.(*TimeoutError)
		err, abandoned = cause, !late
	}
	_, panicked := err.(*PanicError)
	counts := panicked || !abandoned
	first = k.settle(err, func() {
		if counts {
			r.count(k.name, err)
		}
	})
	if panicked && !first {
		r.count(k.name, err) // a panic counts even if no caller waits any more
	}
	if panicked || first && counts {
		r.logFailure(k.name, err)
	}
	return first
}

// enter counts a callback that starts. It returns an error if the Runner is closed.
func (r *Runner) enter(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errs.Closed
	}
	r.countsOf(name).Calls++
	r.running++
	return nil
}

// begin notes on which goroutine a call runs.
func (r *Runner) begin(k *Call) {
	id := goroutineID()
	r.mu.Lock()
	defer r.mu.Unlock()
	k.goroutine = id
	r.inside[id] = k
}

// leave discounts a callback that has returned.
func (r *Runner) leave(k *Call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.inside, k.goroutine)
	if !k.detached {
		r.discount()
	}
}

// discount is called with mu held.
func (r *Runner) discount() {
	r.running--
	if r.running == 0 && r.idle != nil {
		close(r.idle)
		r.idle = nil
	}
}

// Detach reports whether it is called inside a callback, on its goroutine. If it is,
// Wait does not wait for that callback any more. The caller is about to wait for the end
// of all callbacks, and would otherwise wait for itself.
func (r *Runner) Detach() bool {
	id := goroutineID()
	r.mu.Lock()
	k := r.inside[id]
	if k != nil && !k.detached {
		k.detached = true
		r.discount()
	}
	r.mu.Unlock()
	if k == nil {
		return false
	}
	k.giveUp(errs.Closed)
	return true
}

// Wait returns nil once no callback is running, or the cause of ctx if ctx ends first. It
// stops nothing.
func (r *Runner) Wait(ctx context.Context) error {
	r.mu.Lock()
	if r.running == 0 {
		r.mu.Unlock()
		return nil
	}
	if r.idle == nil {
		r.idle = make(chan struct{})
	}
	idle := r.idle
	r.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Cancel cancels the contexts of all callbacks, also of those that start later.
func (r *Runner) Cancel() { r.cancel() }

// Close lets no more callbacks start, cancels those that run, and waits for them as Wait
// does. It may be called again.
func (r *Runner) Close(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	return r.Wait(ctx)
}
