package mesh

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/wire"
)

// subscribePresence answers through its outlet, so that the answer is queued
// before the first update.
func subscribePresence(ctx context.Context, c *Connection, req wire.Request, room string) (any, error) {
	n := c.s.n
	if err := c.admitRoom(room); err != nil {
		return nil, err
	}
	out := &socketOutlet{c: c, req: req, room: room}
	s := &subscription{room: room, viewer: c.id, out: out, most: n.opts.Limits.QueueBytes}
	old, err := c.subscribe(s)
	if err != nil {
		return nil, err
	}
	out.replaces = old
	err = n.watchers.watch(ctx, s)
	if old != nil && (err == nil || !errors.Is(err, ErrUnavailable)) {
		n.watchers.unwatch(old)
	}
	if err == nil || out.told(s) {
		return nil, nil
	}
	c.unsubscribe(s, old)
	if refused(err) {
		n.refusedTo(c.id, room, err) // others of this connection, by PresenceManager.Subscribe
		return wire.Snapshot{}, nil
	}
	return nil, err
}

func unsubscribePresence(_ context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	c.mu.Lock()
	s := c.subs[room]
	delete(c.subs, room)
	c.mu.Unlock()
	if s == nil {
		return false, nil
	}
	c.s.n.watchers.unwatch(s)
	return true, nil
}

// subscribe notes a subscription; a second one to the same room takes the
// place of the first, which is returned.
func (c *Connection) subscribe(s *subscription) (old *subscription, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old = c.subs[s.room]
	limit := c.s.n.opts.Limits.SubscriptionsPerConnection
	if old == nil && over(len(c.subs)+1, limit) {
		return nil, fmt.Errorf("%w: %d subscriptions per connection", ErrLimit, limit)
	}
	if c.subs == nil {
		c.subs = make(map[string]*subscription)
	}
	c.subs[s.room] = s
	return old, nil
}

// unsubscribe takes back what subscribe did: the old one stands again, if it
// still goes on.
func (c *Connection) unsubscribe(s, old *subscription) {
	c.mu.Lock()
	ours := c.subs[s.room] == s
	if ours && old != nil {
		c.subs[s.room] = old
	} else if ours {
		delete(c.subs, s.room)
	}
	c.mu.Unlock()
	// Asked only now: a subscription's lock is never taken with c.mu held.
	if ours && old != nil && old.isOver() {
		c.forgetSub(s.room, old.out)
	}
}

// socketOutlet sends a subscription's events to a socket: first the answer to
// the request, then updates.
type socketOutlet struct {
	c        *Connection
	req      wire.Request
	room     string
	replaces *subscription // of the same connection and room; silent once this one begins
	answered bool          // guarded by subscription.mu, as all of an outlet's calls are
}

func (o *socketOutlet) snapshot(v hub.View) {
	o.answered = true
	if o.replaces != nil {
		o.replaces.silence()
	}
	o.c.reply(o.req, wire.EncodedView{Success: true, Present: v.Present, States: v.States(), Extent: extentOf(v.Listing)}, nil)
}

// told reports whether the request has been answered. That may be so although
// the watching failed: metadata that changed while the guard was asked had it
// asked anew, and its no came both ways.
func (o *socketOutlet) told(s *subscription) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return o.answered
}

func (o *socketOutlet) update(u *wire.Update) {
	_ = o.c.sock.SendUpdate(u) // fails where the connection ends
}

func (o *socketOutlet) ended(err error) {
	switch {
	case errors.Is(err, errHeldTooMuch):
		o.c.s.n.slow.Add(1)
		o.c.sock.Close(websocket.CloseTryAgainLater, "too much happened while a guard was asked")
		return
	case errors.Is(err, ErrClosed):
		return // the socket is closed too
	case !o.answered:
		o.answered = true
		o.c.reply(o.req, wire.Snapshot{}, nil)
	default:
		if f, err := wire.Push(wire.PushPresenceEnded, wire.Ended{RoomName: o.room}); err == nil {
			_ = o.c.sock.Send(f)
		}
	}
	o.c.forgetSub(o.room, o)
}

// forgetSub drops a subscription that ended by itself. It takes Connection.mu
// with a subscription's lock held; the other way round does not occur.
func (c *Connection) forgetSub(room string, out outlet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.subs[room]; s != nil && s.out == out {
		delete(c.subs, room)
	}
}

// SubscribeOptions say on whose behalf a subscription is made.
type SubscribeOptions struct {
	// Viewer is the id of a connection of this server whose guards decide
	// about the subscription, at its start and again whenever its metadata or
	// the rules change. Defaults to empty: the app itself, whom no guard is
	// asked about.
	Viewer string
}

// eventsHeld is how many events a subscription may lag behind, and bytesHeld
// how many bytes of metadata and states in them.
const (
	eventsHeld = 16384
	bytesHeld  = 16 << 20
)

// Subscribe watches a room: the iterator yields a snapshot first, then every
// later event in order. It ends when the loop is left, and otherwise with an
// error as its last pair that says why: that of ctx, [ErrNotTracked],
// [ErrRefused] (also later, when a guard changed its mind), [ErrUnknownConnection],
// [ErrUnavailable] where Redis did not answer at the start (later it is waited
// for, and what was missed comes as events with Repair), [ErrSlowConsumer] after
// lagging behind by 16,384 events or 16 MiB, [ErrClosed] at Shutdown or when the
// Viewer's connection ends.
//
// Each range over the result is a subscription of its own. It may call the
// manager's methods. A snapshot lists at most Limits.SnapshotMembers; Total says
// how many there are.
func (p *PresenceManager) Subscribe(ctx context.Context, room string, opts SubscribeOptions) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		out := &queueOutlet{
			room: room, more: make(chan struct{}, 1), slow: &p.n.slow,
		}
		s := &subscription{room: room, viewer: opts.Viewer, out: out, most: p.n.opts.Limits.QueueBytes}
		if err := p.subscribe(ctx, s); err != nil {
			yield(Event{}, err)
			return
		}
		defer p.n.watchers.unwatch(s)
		for {
			events, err := out.take()
			for _, e := range events {
				if !yield(e, nil) {
					return
				}
			}
			if err != nil {
				yield(Event{}, err)
				return
			}
			select {
			case <-out.more:
			case <-ctx.Done():
				yield(Event{}, contextError(ctx))
				return
			}
		}
	}
}

func (p *PresenceManager) subscribe(ctx context.Context, s *subscription) error {
	if err := p.n.use(ctx, s.room); err != nil {
		return err
	}
	if s.viewer != "" {
		if _, err := p.n.conn(s.viewer); err != nil {
			return err
		}
	}
	err := p.n.watchers.watch(ctx, s)
	p.n.refusedTo(s.viewer, s.room, err) // its other subscriptions
	if err != nil && ctx.Err() != nil {
		return contextError(ctx) // as later, when the iterator waits itself
	}
	return err
}

// queueOutlet keeps a subscription's events for an iterator.
type queueOutlet struct {
	room string
	more chan struct{} // of capacity 1: there is something to take
	slow *atomic.Uint64

	mu     sync.Mutex // guards the fields below
	events []Event
	bytes  int
	err    error
}

func (o *queueOutlet) put(e Event, err error) {
	o.mu.Lock()
	switch {
	case o.err != nil:
	case err != nil:
		o.err = err
	case len(o.events) >= eventsHeld || o.bytes > bytesHeld:
		o.events, o.err = nil, ErrSlowConsumer
		o.slow.Add(1)
	default:
		o.events = append(o.events, e)
		o.bytes += len(e.Metadata) + len(e.State)
	}
	o.mu.Unlock()
	select {
	case o.more <- struct{}{}:
	default:
	}
}

func (o *queueOutlet) take() ([]Event, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	events := o.events
	o.events, o.bytes = nil, 0
	return events, o.err
}

func (o *queueOutlet) snapshot(v hub.View) {
	s := snapshotOf(o.room, v)
	o.put(Event{Type: EventSnapshot, Room: o.room, Seq: s.Seq, Epoch: s.Epoch, Snapshot: s}, nil)
}

func (o *queueOutlet) update(u *wire.Update) { o.put(eventOf(u), nil) }

func (o *queueOutlet) ended(err error) {
	if errors.Is(err, errHeldTooMuch) {
		err = ErrSlowConsumer
		o.slow.Add(1)
	}
	o.put(Event{}, err)
}
