package mesh

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/wait"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// subscribePresence answers through its outlet, so that the answer is queued before the
// first update. Updates then wait for a pause (see socket.SendSubscribed), which must
// end with the subscription.
func subscribePresence(ctx context.Context, c *Connection, req wire.Request, room string) (reply, error) {
	n := c.core()
	if err := c.admitRoom(room); err != nil {
		return reply{}, err
	}
	out := &socketOutlet{c: c, req: req, room: room}
	s := &watch.Subscription{Room: room, Viewer: c.id, Out: out, MaxBytes: n.opts.Limits.QueueBytes, Early: true}
	old, err := c.subscribe(s)
	if err != nil {
		return reply{}, err
	}
	out.replaces = old
	err = n.access.Watch(ctx, s)
	if old != nil && (err == nil || !errors.Is(err, ErrUnavailable)) {
		n.access.Unwatch(old)
	}
	if err == nil || out.told(s) {
		return answeredReply(), nil
	}
	c.unsubscribe(s, old)
	if !errors.Is(err, ErrUnavailable) { // the old subscription has ended, too
		c.sock.Unsubscribed(room)
	}
	if watch.IsRefusal(err) {
		n.access.EndIfRefused(c.id, room, err) // the connection's subscriptions by PresenceManager.Subscribe
		return valueReply(wire.Snapshot{}), nil
	}
	return reply{}, err
}

// errNotSubscribed is the answer to an unsubscribe command without a subscription.
var errNotSubscribed = &CommandError{Code: wire.CodeNotFound, Message: "Not subscribed"}

func unsubscribePresence(_ context.Context, c *Connection, _ wire.Request, room string) (reply, error) {
	c.mu.Lock()
	s := c.subs[room]
	delete(c.subs, room)
	c.mu.Unlock()
	if s == nil {
		return reply{}, errNotSubscribed
	}
	c.core().access.Unwatch(s)
	c.sock.Unsubscribed(room)
	return valueReply(true), nil
}

// subscribe records a subscription. It returns the previous subscription to the same
// room, which the new one replaces.
func (c *Connection) subscribe(s *watch.Subscription) (old *watch.Subscription, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old = c.subs[s.Room]
	limit := c.core().opts.Limits.SubscriptionsPerConnection
	if old == nil && over(len(c.subs)+1, limit) {
		return nil, fmt.Errorf("%w: %d subscriptions per connection", ErrLimit, limit)
	}
	if c.subs == nil {
		c.subs = make(map[string]*watch.Subscription)
	}
	c.subs[s.Room] = s
	return old, nil
}

// unsubscribe undoes subscribe. The old subscription is valid again, unless it has
// ended.
func (c *Connection) unsubscribe(s, old *watch.Subscription) {
	c.mu.Lock()
	ours := c.subs[s.Room] == s
	if ours && old != nil {
		c.subs[s.Room] = old
	} else if ours {
		delete(c.subs, s.Room)
	}
	c.mu.Unlock()
	// Only after the unlock: the lock of a subscription is never taken with c.mu held.
	if ours && old != nil && old.IsOver() {
		c.forgetSub(s.Room, old.Out)
	}
}

// socketOutlet sends a subscription's events to a socket: first the answer to the
// request in a write of its own, then updates after a pause.
type socketOutlet struct {
	c        *Connection
	req      wire.Request
	room     string
	replaces *watch.Subscription // the previous one of the same connection and room; it ends when this one begins
	answered bool                // guarded by subscription.mu, like all calls of an outlet
	begun    atomic.Bool         // the answer is queued
}

func (o *socketOutlet) Snapshot(v hub.View) {
	o.answered = true
	if o.replaces != nil {
		o.replaces.EndQuietly()
	}
	defer o.begun.Store(true)
	if !o.req.HasID {
		return
	}
	if v.Stale {
		defer o.c.answeredStale(o) // after the answer
	}
	view := wire.EncodedView{Success: true, Level: int(o.c.level), Present: v.Present, States: v.States(), Extent: subscribeExtent(v.Listing)}
	if f, err := wire.Answer(o.req.ID, o.req.Command, view); err == nil { // cannot fail, because the view is encoded already
		_ = o.c.sock.SendSubscribed(o.room, f) // fails if the connection ends
	}
}

// told reports whether the request has been answered. That is possible although the
// watch failed: if metadata changed while the guard ran, the guard was asked again, and
// its refusal arrived in both ways.
func (o *socketOutlet) told(s *watch.Subscription) bool {
	var answered bool
	s.Exclusively(func() { answered = o.answered })
	return answered
}

func (o *socketOutlet) Update(u *wire.Update) {
	if u.Level() > int(o.c.level) {
		return
	}
	_ = o.c.sock.SendUpdate(u) // fails only if the connection has ended
}

func (o *socketOutlet) Ended(err error) {
	switch {
	case errors.Is(err, watch.ErrBufferFull):
		o.c.core().access.slow.Add(1)
		o.c.sock.Close(websocket.CloseTryAgainLater, "too many updates while a guard was asked")
		return
	case errors.Is(err, ErrClosed):
		return // the socket is closed, too
	case !o.answered:
		o.answered = true
		o.c.sock.Unsubscribed(o.room)
		o.c.respond(o.req, wire.Snapshot{}, nil)
	default:
		o.c.sock.Unsubscribed(o.room) // drops queued updates, which a refused client must not get
		if f, err := wire.Push(wire.PushPresenceEnded, wire.Ended{RoomName: o.room}); err == nil {
			_ = o.c.sock.Send(f)
		}
	}
	o.c.forgetSub(o.room, o)
}

// forgetSub removes a subscription that ended by itself. It takes Connection.mu while
// the lock of a subscription is held. The opposite order does not occur.
func (c *Connection) forgetSub(room string, out watch.Output) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.subs[room]; s != nil && s.Out == out {
		delete(c.subs, room)
	}
}

// SubscribeOptions are the options of a subscription of the app.
type SubscribeOptions struct {
	// Viewer is the id of a connection of this server. The guards decide about it at
	// the start of the subscription, and again when its metadata or the rules change.
	// Defaults to empty: the app itself watches, and no guard is asked.
	Viewer string
}

// maxIteratorEvents is the number of events by which a subscription may lag behind, and
// maxIteratorBytes the number of bytes of their metadata and states.
const (
	maxIteratorEvents = 16384
	maxIteratorBytes  = 16 << 20
)

// Subscribe watches a room. The iterator yields a snapshot first, then every later
// event in order. It ends when the loop is left. Otherwise its last pair has an error:
//
//   - the error of ctx
//   - [ErrNotTracked] if no rule matches the room
//   - [ErrRefused] if a guard refuses, at the start or later
//   - [ErrUnknownConnection] if the Viewer is not a connection of this server
//   - [ErrUnavailable] if Redis did not answer at the start (a later outage is waited
//     for, and missed changes come as events with Repair)
//   - [ErrSlowConsumer] after lagging behind by 16,384 events or 16 MiB
//   - [ErrClosed] at Shutdown or when the Viewer's connection ends
//
// Each range over the result is a subscription of its own. The loop may call the
// manager's methods. A snapshot lists at most Limits.SnapshotMembers members. Its Total
// is the number of members in the room.
func (p *PresenceManager) Subscribe(ctx context.Context, room string, opts SubscribeOptions) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		out := newQueueOutlet(p.n, room)
		p.follow(ctx, &watch.Subscription{Room: room, Viewer: opts.Viewer, Out: out, MaxBytes: p.n.opts.Limits.QueueBytes}, out, yield)
	}
}

// follow yields the events that a subscription puts into its outlet.
func (p *PresenceManager) follow(ctx context.Context, s *watch.Subscription, out *queueOutlet, yield func(Event, error) bool) {
	if err := p.subscribe(ctx, s); err != nil {
		yield(Event{}, err)
		return
	}
	defer p.n.access.Unwatch(s)
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
			yield(Event{}, errs.Ended(ctx))
			return
		}
	}
}

func (p *PresenceManager) subscribe(ctx context.Context, s *watch.Subscription) error {
	if err := p.n.checkUsable(ctx, s.Room); err != nil {
		return err
	}
	if s.Viewer != "" {
		if _, err := p.n.conn(s.Viewer); err != nil {
			return err
		}
	}
	err := p.n.access.Watch(ctx, s)
	p.n.access.EndIfRefused(s.Viewer, s.Room, err) // the viewer's other subscriptions
	if err != nil && ctx.Err() != nil {
		return errs.Ended(ctx) // the same error as while the iterator waits
	}
	return err
}

// queueOutlet queues a subscription's events for an iterator.
type queueOutlet struct {
	room string
	more wait.Signal // set when events are queued
	slow *atomic.Uint64

	mu     sync.Mutex // guards the fields below
	events []Event
	bytes  int
	err    error
}

func newQueueOutlet(n *core, room string) *queueOutlet {
	return &queueOutlet{room: room, more: wait.NewSignal(), slow: &n.access.slow}
}

func (o *queueOutlet) put(e Event, err error) {
	o.mu.Lock()
	switch {
	case o.err != nil:
	case err != nil:
		o.err = err
	case len(o.events) >= maxIteratorEvents || o.bytes > maxIteratorBytes:
		o.events, o.err = nil, ErrSlowConsumer
		o.slow.Add(1)
	default:
		o.events = append(o.events, e)
		o.bytes += len(e.Metadata) + len(e.State)
	}
	o.mu.Unlock()
	o.more.Set()
}

func (o *queueOutlet) take() ([]Event, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	events := o.events
	o.events, o.bytes = nil, 0
	return events, o.err
}

func (o *queueOutlet) Snapshot(v hub.View) {
	s := snapshotOf(o.room, v)
	o.put(Event{Type: EventSnapshot, Room: o.room, Seq: s.Seq, Epoch: s.Epoch, Snapshot: s}, nil)
}

func (o *queueOutlet) Update(u *wire.Update) { o.put(eventOf(u), nil) }

func (o *queueOutlet) Ended(err error) {
	if errors.Is(err, watch.ErrBufferFull) {
		err = ErrSlowConsumer
		o.slow.Add(1)
	}
	o.put(Event{}, err)
}

// admitRoom returns an ErrLimit if the connection would begin to use a room although it
// has begun to use too many others in this minute. Each room makes Redis remember a
// position and this server a mirror for some seconds, so the limit is lower than that of
// commands. A room that the connection is in, or subscribed to, is not new. A request
// that is refused later counts, because the guards were asked about it.
func (c *Connection) admitRoom(room string) error {
	if c.local.In(room) || c.isSubscribed(room) {
		return nil
	}
	most := c.core().opts.Limits.NewRoomsPerMinute
	if c.newRooms.Use(room, most, time.Now()) {
		return nil
	}
	return fmt.Errorf("%w: %d new rooms per minute", ErrLimit, most)
}

func (c *Connection) isSubscribed(room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.subs[room] != nil
}
