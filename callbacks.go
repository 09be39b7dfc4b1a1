package mesh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
)

// The names of callbacks, beside those of guards (verdicts.go).
const (
	callbackAuthenticate  = "Authenticate"
	callbackMetadata      = "ClientMetadata"
	callbackConnection    = "OnConnection"
	callbackDisconnection = "OnDisconnection"
	callbackCommand       = "command"
	callbackForeign       = "Foreign"
	callbackEncode        = "MarshalJSON"
)

// answers are the callbacks whose errors are meant for the client: they are no
// failures of the app.
var answers = map[string]bool{callbackAuthenticate: true, callbackMetadata: true, callbackCommand: true, callbackEncode: true}

// callbackStats counts what became of the app's callbacks of one name.
type callbackStats struct {
	Calls    uint64 // started
	Errors   uint64 // returned an error that was no answer meant for the client
	Panics   uint64
	Timeouts uint64
}

// callbacks runs the app's code: guards, hooks, command handlers, encoders.
// Each call runs on a goroutine of its own that callbacks owns, recovered and
// limited in time, so that none can end the process or delay more than its own
// caller. A call that ignores its context is left behind when its time is over,
// and waited for at the end. Safe for concurrent use.
//
// A callback's name is a word for logs and counters and must be one of a fixed
// set: never anything that a client chose.
type callbacks struct {
	log    *limit.Log
	base   context.Context // ends when close is called
	cancel context.CancelFunc

	mu      sync.Mutex // guards the fields below
	closed  bool
	running int              // those apart are not counted
	inside  map[uint64]*call // by goroutine
	idle    chan struct{}    // closed when running falls to 0; nil if nothing waits
	counts  map[string]*callbackStats
}

// newCallbacks returns a runner whose callbacks' contexts end with ctx.
func newCallbacks(ctx context.Context, logger *slog.Logger) *callbacks {
	base, cancel := context.WithCancel(ctx)
	return &callbacks{
		log: limit.NewLog(logger), base: base, cancel: cancel,
		inside: make(map[uint64]*call), counts: make(map[string]*callbackStats),
	}
}

// call is one run of a callback.
type call struct {
	name    string
	settled chan struct{} // closed when err and at are final
	err     error         // read only after settled
	at      time.Time     // when it settled; read only after that
	once    sync.Once
	// cancel ends the callback's context, and with that settles the call. Nil
	// if the callback was never called.
	cancel context.CancelCauseFunc
	// giveUp settles the call without fn.
	giveUp    func(why error)
	goroutine uint64 // guarded by callbacks.mu; 0: not begun
	apart     bool   // guarded by callbacks.mu, see stepOut
}

// watch is what whoever starts a callback may want to be told of. Neither may
// block.
type watch struct {
	// ended is called once fn has returned; before the call settles if fn was
	// in time.
	ended func()
	// late is called if the call settles without fn; fn may just have
	// returned.
	late func()
}

// settle decides the outcome; only the first decision counts.
func (k *call) settle(err error) (first bool) {
	k.once.Do(func() {
		first, k.err, k.at = true, err, time.Now()
		close(k.settled)
	})
	return first
}

// done reports whether the outcome is final.
func (k *call) done() bool {
	select {
	case <-k.settled:
		return true
	default:
		return false
	}
}

// run calls fn and returns its error; a *panicError if it panicked, a
// *timeoutError if it did not return within timeout (0 or less: no limit),
// ctx's cause if that ended first, or ErrClosed after close. In the last three
// cases fn may still be running when run returns, with its context cancelled:
// what it writes must not be read then.
func (c *callbacks) run(ctx context.Context, name string, timeout time.Duration, fn func(context.Context) error) error {
	k := c.start(ctx, name, timeout, fn, watch{})
	<-k.settled
	return k.err
}

// start is run without the waiting; w's functions may be nil.
func (c *callbacks) start(ctx context.Context, name string, timeout time.Duration, fn func(context.Context) error, w watch) *call {
	k := &call{name: name, settled: make(chan struct{})}
	err := context.Cause(ctx)
	if err == nil {
		err = c.enter(name)
	}
	if err != nil {
		k.settle(err)
		return k
	}
	ctx, k.cancel = context.WithCancelCause(ctx)
	release := context.AfterFunc(c.base, func() { k.cancel(ErrClosed) })
	stopTimer := context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, stopTimer = context.WithTimeoutCause(ctx, timeout, &timeoutError{name: name, after: timeout})
	}
	k.giveUp = func(why error) {
		if c.finish(ctx, k, why) && w.late != nil {
			w.late()
		}
	}
	stopWaiting := context.AfterFunc(ctx, func() { k.giveUp(errGaveUp) })
	go func() { // enter counted it in, leave counts it out, wait waits for it
		defer c.leave(k)
		err := error(&panicError{name: name, value: errGoexit})
		defer func() {
			_ = recover() // a panic while its value was printed: err says already that there was one
			if w.ended != nil {
				w.ended()
			}
			c.finish(ctx, k, err)
			stopWaiting()
			stopTimer()
			release()
			k.cancel(nil)
		}()
		c.begin(k)
		err = invoke(ctx, name, fn)
	}()
	return k
}

// errGaveUp stands for the cause with which a callback's context ended. That
// may be an error of the app's, whose methods must not be called where a panic
// would end the process.
var errGaveUp = errors.New("mesh: the context of a callback ended")

// invoke calls fn. The errors that it returns have no methods of the app's.
func invoke(ctx context.Context, name string, fn func(context.Context) error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = newPanicError(name, v)
		}
	}()
	if err = frozen(fn(ctx), context.Cause(ctx)); err == nil {
		if ctx.Err() != nil {
			err = errGaveUp // an answer that comes too late is none
		}
	}
	return err
}

// finish settles the call and accounts for its outcome, once. A callback that
// gave up because its context ended is told as what ended the context, so that
// both ways here agree. It reports whether this was what settled the call. err
// has no methods of the app's.
func (c *callbacks) finish(ctx context.Context, k *call, err error) (first bool) {
	abandoned := false
	if cause := context.Cause(ctx); cause != nil &&
		(errors.Is(err, errGaveUp) || errors.Is(err, ctx.Err()) || errors.Is(err, cause)) {
		_, late := cause.(*timeoutError)
		err, abandoned = cause, !late
	}
	first = k.settle(err)
	if _, panicked := err.(*panicError); panicked || first && !abandoned {
		c.account(k.name, err) // a panic counts even where nobody waits any more
	}
	return first
}

// account counts and logs how a callback failed. An error that the app meant
// as an answer to the client is no failure.
func (c *callbacks) account(name string, err error) {
	if err == nil || holds[*CommandError](err) || errors.Is(err, ErrRefused) || errors.Is(err, ErrClosed) {
		return
	}
	late, isLate := errors.AsType[*timeoutError](err)
	thrown, isPanic := errors.AsType[*panicError](err)
	c.mu.Lock()
	n := c.counts[name]
	switch {
	case isLate:
		n.Timeouts++
	case isPanic:
		n.Panics++
	case answers[name] && !errors.Is(err, errNotEncoded):
	default:
		n.Errors++
	}
	c.mu.Unlock()
	switch {
	case isLate:
		c.log.As(slog.LevelWarn, name+" timeout", "mesh: callback timed out",
			slog.String("callback", name), slog.Duration("after", late.after))
	case isPanic:
		c.log.As(slog.LevelError, name+" panic", "mesh: callback panicked",
			slog.String("callback", name), slog.String("panic", fmt.Sprint(thrown.value)),
			slog.String("stack", string(thrown.stack)))
	case answers[name] && !errors.Is(err, errNotEncoded):
	default:
		c.log.As(slog.LevelWarn, name+" error", "mesh: callback failed",
			slog.String("callback", name), slog.String("error", limit.Shorten(err.Error())))
	}
}

// note counts and logs a panic of code of the app that does not run as a
// callback. It is called by a deferred function.
func (c *callbacks) note(name string, value any) {
	c.mu.Lock()
	c.of(name)
	c.mu.Unlock()
	c.account(name, &panicError{name: name, value: limit.PanicText(value), stack: debug.Stack()})
}

// of returns the counts of a name. The caller holds mu.
func (c *callbacks) of(name string) *callbackStats {
	n := c.counts[name]
	if n == nil {
		n = &callbackStats{}
		c.counts[name] = n
	}
	return n
}

// enter counts a callback in, unless no more may start.
func (c *callbacks) enter(name string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return ErrClosed
	}
	c.of(name).Calls++
	c.running++
	return nil
}

// begin notes on which goroutine a call runs.
func (c *callbacks) begin(k *call) {
	id := goroutineID()
	c.mu.Lock()
	defer c.mu.Unlock()
	k.goroutine = id
	c.inside[id] = k
}

// leave counts a callback out.
func (c *callbacks) leave(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.inside, k.goroutine)
	if !k.apart {
		c.countOut()
	}
}

// countOut is called with mu held.
func (c *callbacks) countOut() {
	c.running--
	if c.running == 0 && c.idle != nil {
		close(c.idle)
		c.idle = nil
	}
}

// stepOut reports whether it is called inside a callback, on its goroutine.
// Then nothing waits for that callback any more: what the caller is going to
// wait for would otherwise wait for the caller.
func (c *callbacks) stepOut() bool {
	id := goroutineID()
	c.mu.Lock()
	k := c.inside[id]
	if k != nil && !k.apart {
		k.apart = true
		c.countOut()
	}
	c.mu.Unlock()
	if k == nil {
		return false
	}
	k.giveUp(ErrClosed)
	return true
}

// wait returns nil once no callback is running, or ctx's cause if that ends
// first. It stops nothing.
func (c *callbacks) wait(ctx context.Context) error {
	c.mu.Lock()
	if c.running == 0 {
		c.mu.Unlock()
		return nil
	}
	if c.idle == nil {
		c.idle = make(chan struct{})
	}
	idle := c.idle
	c.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close lets no more callbacks start, cancels those under way and waits for
// them as wait does. It may be called again.
func (c *callbacks) close(ctx context.Context) error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	return c.wait(ctx)
}

// stats returns the counts of each name that has been called.
func (c *callbacks) stats() map[string]callbackStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make(map[string]callbackStats, len(c.counts))
	for name, n := range c.counts {
		all[name] = *n
	}
	return all
}
