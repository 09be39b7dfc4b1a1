package store

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// session runs one connection from its first SUBSCRIBE until it breaks, is given up, or
// the listener stops. up reports whether any subscription was confirmed on it.
//
// PubSub would reconnect and resubscribe by itself. Then it would be unclear to which
// SUBSCRIBE a confirmation belongs, and a command that could not be written would be
// forgotten. Therefore the first error ends the PubSub, and the next session starts
// from the wanted channels.
//
// Hooks of the client are code of the app. A hook that panics or ends the goroutine
// ends the session.
func (l *Listener) session(life context.Context) (up bool, err error) {
	return isolated(life, longGrace, func() (bool, error) { return l.connection(life) })
}

// connection is session without the protection against hooks.
func (l *Listener) connection(life context.Context) (up bool, err error) {
	ctx, cancel := context.WithCancelCause(life)
	defer cancel(nil)
	select {
	case <-l.renew: // this is already a new connection
	default:
	}
	ps := l.cfg.Client.Subscribe(ctx)

	// The first command dials. Reading starts after it, because otherwise both would
	// dial.
	if b, ok := l.subs.next(); ok {
		if err := b.send(ctx, ps); err != nil {
			_ = ps.Close()
			return false, err
		}
	}
	var writer sync.WaitGroup
	writer.Go(func() {
		_, err := isolated(ctx, longGrace, func() (any, error) { return nil, l.feed(ctx, ps) })
		cancel(err)    // before Close, so that a reconnect that PubSub tries on its own fails at once
		_ = ps.Close() // wakes the reader
	})
	up, err = l.read(ctx, ps)
	if cause := context.Cause(ctx); cause != nil {
		err = cause // the reason of the writer for closing, not the closed connection
	}
	cancel(err)
	writer.Wait()
	return up, err
}

// read passes incoming messages to the handler until the connection fails. It calls
// Receive without a timeout, because a timeout in the middle of a frame would cut the
// frame in half. Receive uses its context only for reconnects of its own. Those must
// fail at once, because they would hold a lock that Close needs.
func (l *Listener) read(ctx context.Context, ps *redis.PubSub) (up bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	for {
		received, err := ps.Receive(ctx)
		if err != nil {
			return up, fmt.Errorf("store: subscription connection: %w", err)
		}
		switch m := received.(type) {
		case *redis.Message:
			if l.subs.deliverable(m) {
				l.cfg.Handler.Message(m.Channel, m.Payload)
			}
		case *redis.Subscription:
			confirmed, again, idle := l.subs.confirm(m)
			if idle {
				l.wake.Set()
			}
			if confirmed {
				up = true
				l.logRecovery()
				l.cfg.Handler.Subscribed(m.Channel, again)
			}
		}
	}
}

// feed sends the commands for the wanted channels, one at a time: it sends the next one
// after the one before is confirmed. Requests that come in between are sent together,
// each confirmation belongs to one known command, and feed never waits for a server
// that cannot write because nothing reads. It returns the reason to give up the
// connection.
func (l *Listener) feed(ctx context.Context, ps *redis.PubSub) error {
	overdue := time.NewTimer(confirmWithin)
	defer overdue.Stop()
	for {
		b, idle := l.subs.next()
		switch {
		case len(b.names) > 0:
			if err := b.send(ctx, ps); err != nil {
				return err
			}
			overdue.Reset(confirmWithin)
		case idle:
			overdue.Stop()
		}
		select {
		case <-l.wake:
		case <-overdue.C:
			return errUnconfirmed
		case <-l.renew:
			return errRecreate
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// send writes the command, on a new connection if there is none. It does not wait for
// the confirmations.
func (b command) send(ctx context.Context, ps *redis.PubSub) error {
	ctx, cancel := context.WithTimeout(ctx, confirmWithin)
	defer cancel()
	var err error
	switch b.kind {
	case "subscribe":
		err = ps.Subscribe(ctx, b.names...)
	case "psubscribe":
		err = ps.PSubscribe(ctx, b.names...)
	default:
		err = ps.Unsubscribe(ctx, b.names...)
	}
	if err != nil {
		return fmt.Errorf("store: %s: %w", b.kind, err)
	}
	return nil
}
