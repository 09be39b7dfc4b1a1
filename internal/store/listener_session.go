package store

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// session runs one connection from its first SUBSCRIBE until it breaks, is
// given up, or the listener stops. It says whether any subscription was
// confirmed on it.
//
// PubSub would reconnect and resubscribe by itself; then nobody could say
// which SUBSCRIBE a confirmation belongs to, and a command whose writing
// failed would be forgotten. So the first error ends the PubSub, and the next
// session starts from what is wanted.
//
// The hooks of the client are the app's code: one that panics or ends the
// goroutine ends the session.
func (l *Listener) session(life context.Context) (up bool, err error) {
	return protected(life, eventually, func() (bool, error) { return l.connection(life) })
}

// connection is session without the care for panics.
func (l *Listener) connection(life context.Context) (up bool, err error) {
	ctx, cancel := context.WithCancelCause(life)
	defer cancel(nil)
	drain(l.renew) // this is a new connection
	ps := l.cfg.Client.Subscribe(ctx)

	// The first command dials. Reading starts after it, or both would.
	if b, ok := l.subs.next(); ok {
		if err := b.send(ctx, ps); err != nil {
			_ = ps.Close()
			return false, err
		}
	}
	var writer sync.WaitGroup
	writer.Go(func() {
		_, err := protected(ctx, eventually, func() (any, error) { return nil, l.feed(ctx, ps) })
		cancel(err)    // before Close, so that a reconnect that PubSub tries on its own fails at once
		_ = ps.Close() // wakes the reader
	})
	up, err = l.read(ctx, ps)
	if cause := context.Cause(ctx); cause != nil {
		err = cause // why the writer closed it, not that it is closed
	}
	cancel(err)
	writer.Wait()
	return up, err
}

// read hands what arrives to the handler until the connection fails. It
// blocks in Receive without a timeout: one that ran out in the middle of a
// frame would cut it in half.
func (l *Listener) read(ctx context.Context, ps *redis.PubSub) (up bool, err error) {
	for {
		received, err := ps.Receive(ctx)
		if err != nil {
			return up, fmt.Errorf("store: subscription connection: %w", err)
		}
		switch m := received.(type) {
		case *redis.Message:
			if l.subs.live(m) {
				l.cfg.Handler.Message(m.Channel, m.Payload)
			}
		case *redis.Subscription:
			confirmed, again, idle := l.subs.confirm(m)
			if idle {
				poke(l.wake)
			}
			if confirmed {
				up = true
				l.recovered()
				l.cfg.Handler.Subscribed(m.Channel, again)
			}
		}
	}
}

// feed sends what the wanted channels ask for, one command at a time: the
// next goes out when the one before is confirmed. So what is asked for in the
// meantime goes together, each confirmation belongs to one known command, and
// a server that cannot write (because we do not read) is never waited for. It
// returns the reason to give the connection up.
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

// send writes the command. It does not wait for its confirmations.
func (b batch) send(ctx context.Context, ps *redis.PubSub) error {
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

// drain takes the token out of a channel of capacity 1.
func drain(c <-chan struct{}) {
	select {
	case <-c:
	default:
	}
}
