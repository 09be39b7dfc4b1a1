package mesh

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// lifecycleState is the state of a core, which starts once and stops once.
type lifecycleState int32

const (
	stateNew lifecycleState = iota
	stateRunning
	stateStopped
)

// lifecycle holds the contexts, the goroutines and the state of a core.
type lifecycle struct {
	ctx     context.Context // ends when the core has stopped
	end     context.CancelFunc
	running context.Context // ends when the core begins to stop
	halt    context.CancelFunc
	work    sync.WaitGroup // goroutines that end with ctx

	starting     chan struct{} // a lock of capacity 1, held during start and stop
	partsStarted bool          // guarded by starting
	state        atomic.Int32  // a lifecycleState; written by start and stop
	notAccepting atomic.Bool   // a drain or stop has begun
	stopOnce     sync.Once
	stopped      chan struct{} // closed when stop has finished
	stopErr      error         // read only after stopped is closed
}

// begin begins the lifetime of everything that a core starts.
func (l *lifecycle) begin() {
	l.ctx, l.end = context.WithCancel(context.Background())
	l.running, l.halt = context.WithCancel(l.ctx)
	l.starting, l.stopped = make(chan struct{}, 1), make(chan struct{})
}

// start makes this server a member of the group. It returns when Redis has answered and
// the subscriptions are confirmed, or when ctx ends. After an error it may be called
// again.
func (n *core) start(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(n.life.running, cancel)() // stop does not wait for Redis to answer
	select {
	case n.life.starting <- struct{}{}:
		defer func() { <-n.life.starting }()
	case <-ctx.Done():
		return n.startError(ctx, ErrUnavailable)
	}
	if n.running() == stateStopped {
		return ErrClosed
	}
	if !n.life.partsStarted {
		if err := n.startParts(ctx); err != nil {
			return n.startError(ctx, err)
		}
		n.life.partsStarted = true
	}
	if err := n.awaitSubscribed(ctx); err != nil {
		return n.startError(ctx, err)
	}
	n.life.state.CompareAndSwap(int32(stateNew), int32(stateRunning))
	return nil
}

// awaitSubscribed waits until the channels of this server are subscribed.
func (n *core) awaitSubscribed(ctx context.Context) error {
	for {
		err := n.redis.listener.Ready(ctx, n.keys.ServerChannel(n.lease.Incarnation()))
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, store.ErrNotWanted): // it is reregistering: a new channel follows
			return fmt.Errorf("%w: subscription not confirmed: %w", ErrUnavailable, err)
		}
		if err := wait.For(ctx, wheelStep); err != nil {
			return fmt.Errorf("%w: subscription not confirmed: %w", ErrUnavailable, err)
		}
	}
}

// startError returns the error of a start that failed with err. A stop and a
// cancellation by the caller come first.
func (n *core) startError(ctx context.Context, err error) error {
	switch {
	case n.life.running.Err() != nil:
		return ErrClosed
	case errors.Is(ctx.Err(), context.Canceled) && !errors.Is(err, ErrIncompatible):
		return fmt.Errorf("mesh: not started: %w (%v)", errs.Ended(ctx), err) //nolint:errorlint // the end of ctx is the reason, not err
	case ctx.Err() != nil && !errors.Is(err, ErrUnavailable):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (n *core) startParts(ctx context.Context) error {
	if err := n.awaitRedis(ctx); err != nil {
		return err
	}
	n.warnAboutRedis(ctx)
	n.warnAboutRules()
	n.wheel.Start()
	n.hub.Start()
	n.listen(ctx)
	return nil
}

// warnAboutRules warns about a rule of an exact name that takes the grace or the caps of a
// pattern from its room.
func (n *core) warnAboutRules() {
	if name, pattern, more := n.access.rules.Hidden(); name != "" {
		n.opts.Logger.Warn("mesh: the rule of an exact room has neither the grace nor the caps of a pattern that matches the room",
			"room", name, "pattern", pattern, "moreRooms", more)
	}
}

// ready returns nil if start has finished and neither a drain nor stop has begun. It
// does not look at Redis, because a server also serves while Redis is away.
func (n *core) ready(context.Context) error {
	if n.life.notAccepting.Load() {
		return ErrClosed
	}
	return n.checkRunning()
}

// stopAccepting makes ready fail.
func (n *core) stopAccepting() { n.life.notAccepting.Store(true) }

func (n *core) running() lifecycleState { return lifecycleState(n.life.state.Load()) }

// stop ends the core. All entries of this server leave, in batches. Then its
// incarnation is cleaned up, and everything that start started is stopped. When ctx
// ends, stop gives up on Redis and returns as soon as nothing runs any more. The other
// servers end the remaining entries when the lease runs out. A later call waits for the
// end of the first one.
func (n *core) stop(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	ctx, cancel := n.detachFromCallback(ctx)
	defer cancel()
	n.life.stopOnce.Do(func() {
		n.stopAccepting()
		n.access.Cancel()
		n.access.joins.Cancel()
		n.calls.Cancel()
		go func() { // ends with the core; every caller of stop waits for it
			defer close(n.life.stopped)
			n.life.stopErr = n.stopParts(ctx)
		}()
	})
	select {
	case <-n.life.stopped:
		return n.life.stopErr
	case <-ctx.Done():
	}
	select {
	case <-n.life.stopped: // it had finished, or it gives up at once
		return n.life.stopErr
	case <-time.After(stopGrace):
		return fmt.Errorf("mesh: shutdown is still running: %w", ctx.Err())
	}
}

// detachFromCallback returns the context for a call that waits for callbacks. If the
// call comes from inside a callback, on its goroutine, the callback is no longer waited
// for. The context of a callback ends during a stop, so only the deadline is taken from
// a context that derives from it.
func (n *core) detachFromCallback(ctx context.Context) (context.Context, context.CancelFunc) {
	if !n.calls.Detach() {
		return ctx, func() {}
	}
	deadline, limited := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if !limited {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, deadline)
}

// stragglerTimeout is the time for which callbacks and calls to Redis may continue
// after their contexts have ended, before a shutdown with a later deadline leaves them
// behind. It is longer than the default dial timeout of the client library, 5 s: a call
// that connects to a Redis that does not answer ends by itself.
const stragglerTimeout = 6 * time.Second

// stopGrace is the time that a shutdown may take after its context has ended, until
// everything that was told to stop has ended.
const stopGrace = 250 * time.Millisecond

func (n *core) stopParts(ctx context.Context) error {
	// A running start gives up. The parts that it has started are stopped below.
	n.life.halt()
	n.life.state.Store(int32(stateStopped))
	n.life.starting <- struct{}{}
	defer func() { <-n.life.starting }()
	n.access.Close()
	n.access.joins.Close()
	var errs []error
	if n.life.partsStarted {
		err := n.local.Drain(ctx, store.CauseClosed, true)
		n.local.Stop()
		errs = append(errs, err, n.lease.Stop(ctx))
		if err == nil {
			errs = append(errs, n.lease.Resign(ctx))
		}
		n.redis.stopListening()
		n.peers.Stop()
		n.hub.Stop()
		n.kept.Stop()
		n.counts.Stop()
		n.wheel.Stop()
	}
	n.life.end()
	n.local.Stop()
	n.life.work.Wait()
	return errors.Join(append(errs, n.awaitCallbacks(ctx))...)
}

// awaitCallbacks waits for callbacks that ignore the end of their context.
func (n *core) awaitCallbacks(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stragglerTimeout)
	defer cancel()
	err := n.calls.Close(ctx)
	if err != nil {
		err = fmt.Errorf("mesh: callbacks are still running: %w", err)
	}
	return errors.Join(err, n.store.Wait(ctx))
}
