package mesh

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// nodeState is how far a node has come: it starts once and stops once.
type nodeState int32

const (
	stateNew nodeState = iota
	stateRunning
	stateStopped
)

// start makes the node one of the servers. It returns when Redis has answered
// and the subscriptions are confirmed, or ctx ends; then it may be tried again.
func (n *node) start(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(n.begun, cancel)() // stop does not wait for Redis to answer
	select {
	case n.starting <- struct{}{}:
		defer func() { <-n.starting }()
	case <-ctx.Done():
		return n.unstarted(ctx, ErrUnavailable)
	}
	if n.running() == stateStopped {
		return ErrClosed
	}
	if !n.begunParts {
		if err := n.startParts(ctx); err != nil {
			return n.unstarted(ctx, err)
		}
		n.begunParts = true
	}
	if err := n.subscribed(ctx); err != nil {
		return n.unstarted(ctx, err)
	}
	n.state.CompareAndSwap(int32(stateNew), int32(stateRunning))
	return nil
}

// subscribed waits until this server can be spoken to.
func (n *node) subscribed(ctx context.Context) error {
	for {
		err := n.listener.Ready(ctx, n.keys.Control(n.lease.Incarnation()))
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, store.ErrNotWanted): // it is being reborn: a new channel follows
			return fmt.Errorf("%w: subscription not confirmed: %w", ErrUnavailable, err)
		}
		t := time.NewTimer(wheelStep)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w: subscription not confirmed: %w", ErrUnavailable, ctx.Err())
		}
	}
}

// unstarted returns the error of a start that failed with err: that it was
// stopped, or called off by the caller, comes first.
func (n *node) unstarted(ctx context.Context, err error) error {
	switch {
	case n.begun.Err() != nil:
		return ErrClosed
	case errors.Is(ctx.Err(), context.Canceled) && !errors.Is(err, ErrIncompatible):
		return fmt.Errorf("mesh: not started: %w (%v)", contextError(ctx), err)
	case ctx.Err() != nil && !errors.Is(err, ErrUnavailable):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func (n *node) startParts(ctx context.Context) error {
	if err := n.awaitRedis(ctx); err != nil {
		return err
	}
	n.advise(ctx)
	n.wheel.Start()
	n.hub.Start()
	n.listener.Start()
	n.listener.Add(n.keys.Control(n.lease.Incarnation()))
	if n.expiry != nil {
		n.hints.start()
		n.listener.Add(n.keys.Ended())
		n.expiry.Start(ctx)
	}
	return nil
}

// awaitRedis waits until Redis answers, checks that it can be used, and takes a
// lease. It fails at once if trying again would not help: see hopeless.
func (n *node) awaitRedis(ctx context.Context) error {
	backoff := 50 * time.Millisecond
	var why error // of the last attempt that ctx did not cut short
	for {
		err := n.tryRedis(ctx)
		if err == nil {
			return nil
		}
		if final := hopeless(err); final != nil && n.store.Confirmed(ctx, err) {
			return final
		}
		switch {
		case ctx.Err() == nil:
			why = err
			n.waiting.Warn("mesh: start waits for redis", "error", tidyError{err}) // Start may wait for ever
		case why != nil && why.Error() != err.Error():
			return n.storeError(fmt.Errorf("%w; before that: %w", err, why))
		}
		t := time.NewTimer(backoff)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return n.storeError(err)
		}
		backoff = min(2*backoff, time.Second)
	}
}

// hopeless returns what Start fails with if Redis gave an answer that will not
// change by itself, and nil if it is worth trying again.
func hopeless(err error) error {
	switch {
	case errors.Is(err, ErrInvalidOptions):
		return err
	case errors.Is(err, store.ErrForeign):
		return tidyError{fmt.Errorf("%w: %w; or use another Options.Prefix or another database, or remove those keys", ErrIncompatible, err)}
	case errors.Is(err, store.ErrMisfit):
		return tidyError{fmt.Errorf("%w: Redis: %w", ErrInvalidOptions, err)}
	case errors.Is(err, store.ErrMissing):
		return tidyError{fmt.Errorf("%w: %w; every command of the ACL in the README is needed, under its own name", ErrUnavailable, err)}
	case errors.Is(err, store.ErrForbidden):
		return tidyError{fmt.Errorf("%w: %w; check the user and password of Options.Redis, and the ACL's commands, keys and channels", ErrUnavailable, err)}
	}
	return nil
}

// tryRedis is one attempt of awaitRedis. The lease is part of it, because Redis
// may go away, or stop taking writes, between two steps.
func (n *node) tryRedis(ctx context.Context) error {
	for _, try := range []func(context.Context) error{
		n.store.Dial, n.store.CheckServer, n.checkRights, n.store.CheckFormat, n.fit, n.lease.Start,
	} {
		if try == nil {
			continue
		}
		if err := try(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkRights is that of the store, with the channel that hints need: all
// channels of a server share one connection, and one that is refused ends it.
func (n *node) checkRights(ctx context.Context) error {
	if n.expiry == nil {
		return n.store.CheckRights(ctx)
	}
	return n.store.CheckRights(ctx, n.keys.Ended())
}

// advise logs peculiarities of Redis that cost something and that Start
// nevertheless accepts.
func (n *node) advise(ctx context.Context) {
	t := n.store.Traits(ctx)
	if t.Evicts != "" {
		n.opts.Logger.Warn("mesh: redis may evict presence when its memory is full; members may be missing until the next heartbeats",
			"maxmemory_policy", t.Evicts, "remedy", "set maxmemory-policy to noeviction")
	}
	switch {
	case t.Anonymous:
		n.opts.Logger.Warn("mesh: INFO does not identify the redis process; after a failover expired events may not arrive, and leaves wait for leases")
	case t.NoRunID:
		n.opts.Logger.Info("mesh: INFO has no run_id; redis processes are told apart by process id, port, replication id and uptime")
	}
}

// ready returns nil where start has been through, and neither a drain nor stop
// has begun. It asks no part: while Redis is away a server still serves.
func (n *node) ready(context.Context) error {
	if n.retired.Load() {
		return ErrClosed
	}
	return n.usable()
}

// retire has the node not be ready any more.
func (n *node) retire() { n.retired.Store(true) }

func (n *node) running() nodeState { return nodeState(n.state.Load()) }

// stop ends the node: what it owns leaves, in batches, then its incarnation is
// cleaned up after, and everything that start started has ended. When ctx ends
// it gives up on Redis, and returns as soon as nothing runs any more; what Redis
// did not take, the other servers do when the lease runs out. A later call
// waits for the first one's end.
func (n *node) stop(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	ctx, cancel := n.outside(ctx)
	defer cancel()
	n.stopOnce.Do(func() {
		n.retire()
		n.watchers.quit()
		n.joins.quit()
		n.calls.cancel()
		go func() { // ends with the node; whoever stops waits for it
			defer close(n.stopped)
			n.stopErr = n.stopParts(ctx)
		}()
	})
	select {
	case <-n.stopped:
		return n.stopErr
	case <-ctx.Done():
	}
	select {
	case <-n.stopped: // it was through, or it gives up at once
		return n.stopErr
	case <-time.After(stopGrace):
		return fmt.Errorf("mesh: shutdown is still under way: %w", ctx.Err())
	}
}

// outside returns the context for a call that waits for callbacks. If the call
// comes from inside one, on its goroutine, nothing waits for that callback any
// more. Its context ends while the server stops, so of a context derived from
// it only the deadline counts.
func (n *node) outside(ctx context.Context) (context.Context, context.CancelFunc) {
	if !n.calls.stepOut() {
		return ctx, func() {}
	}
	deadline, limited := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if !limited {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, deadline)
}

// stragglers is the time for which callbacks, and calls of Redis, may go on after their
// contexts have ended before a shutdown without a deadline leaves them behind.
const stragglers = 5 * time.Second

// stopGrace is how long after its context's end a shutdown may take to see
// everything end that was told to.
const stopGrace = 250 * time.Millisecond

func (n *node) stopParts(ctx context.Context) error {
	// Whoever is starting gives up, and what it has started is stopped here.
	n.halt()
	n.state.Store(int32(stateStopped))
	n.starting <- struct{}{}
	defer func() { <-n.starting }()
	n.watchers.close()
	n.joins.close()
	var errs []error
	if n.begunParts {
		err := n.owner.Drain(ctx, store.CauseClosed)
		n.owner.Stop()
		errs = append(errs, err, n.lease.Stop(ctx))
		if err == nil {
			errs = append(errs, n.lease.Resign(ctx))
		}
		if n.expiry != nil {
			n.expiry.Stop()
			n.hints.stop()
		}
		n.listener.Stop()
		n.control.stop()
		n.hub.Stop()
		n.wheel.Stop()
	}
	n.end()
	n.owner.Stop()
	n.work.Wait()
	return errors.Join(append(errs, n.awaitStragglers(ctx))...)
}

// awaitStragglers waits for what ignores the end of its context.
func (n *node) awaitStragglers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stragglers)
	defer cancel()
	err := n.calls.close(ctx)
	if err != nil {
		err = fmt.Errorf("mesh: callbacks are still running: %w", err)
	}
	return errors.Join(err, n.store.Wait(ctx))
}
