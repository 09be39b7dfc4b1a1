package mesh

import (
	"context"
	"time"

	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/wire"
)

// maySee is for a client's request. It returns nil if the room is tracked and its
// guards let the connection see it (the empty one is the app itself), and
// ErrNotTracked or ErrRefused otherwise. A verdict older than freshFor does not
// count. See refusedTo for the other effects of a no.
func (n *node) maySee(ctx context.Context, viewer, room string) error {
	_, err := n.request(ctx, viewer, room)
	return err
}

// request is maySee that also returns the verdict.
func (n *node) request(ctx context.Context, viewer, room string) (decision, error) {
	d, err := n.sees(ctx, viewer, fresh(room))
	n.refusedTo(viewer, room, err)
	return d, err
}

// refusedTo ends the subscriptions that a connection has to a room if err, with
// which the guards have answered a request, says that they said no. A guard that
// failed refuses the request only: clients that are active while a database is away
// would lose all their subscriptions.
func (n *node) refusedTo(viewer, room string, err error) {
	if err == ErrRefused {
		n.watchers.recheckRoom(viewer, room)
	}
}

// fresh is the question that a client's request puts.
func fresh(room string) question { return question{room: room, since: time.Now().Add(-freshFor)} }

// sees is maySee for any question.
func (n *node) sees(ctx context.Context, viewer string, q question) (decision, error) {
	if viewer == "" {
		if !n.rules.match(q.room).tracked {
			return decision{}, notTracked(q.room)
		}
		return decision{ok: true}, nil
	}
	d, err := n.verdicts.decide(ctx, viewer, n.member(viewer), q)
	if err == nil && !d.ok {
		err = ErrRefused
	}
	return d, err
}

// look answers a client's request with what read finds in a room, or with none if
// the guards do not let the connection see the room. Because read may wait for
// Redis, it is checked after it that the verdict still stands.
func (n *node) look(ctx context.Context, viewer, room string, none any, read func() (any, error)) (any, error) {
	d, err := n.request(ctx, viewer, room)
	var found any
	if err == nil {
		found, err = read()
	}
	if err == nil {
		_, err = n.sees(ctx, viewer, question{room: room, last: d.by})
	}
	switch {
	case err == nil:
		return found, nil
	case refused(err):
		return none, nil
	}
	return nil, err
}

// revoke takes a connection out of a room and asks the guards again if it may
// still see the room. Until they have answered, nothing is delivered to it. They
// are asked once more when it is out: a guard may have found it still in.
func (n *node) revoke(ctx context.Context, c *owner.Conn, room string) (bool, error) {
	again := func() {
		n.verdicts.invalidateRoom(c.ID(), room)
		n.watchers.recheckRoom(c.ID(), room)
	}
	again()
	was, err := n.leave(ctx, c, room)
	if was {
		again()
	}
	return was, err
}

// recheck asks the guards and join guards again about everything that a connection
// sees and every room that it is in. It does not wait for their answers.
func (n *node) recheck(c *owner.Conn) {
	n.verdicts.invalidate(c.ID())
	n.watchers.recheck(c.ID())
	n.joins.recheckAll(c)
	for _, room := range c.Rooms() {
		n.joins.recheck(c, room)
	}
}

// recheckRoom asks the guards and join guards again about a room, for all of this
// server's connections. It does not wait for their answers.
func (n *node) recheckRoom(room string) {
	n.verdicts.invalidateAllOf(room)
	n.watchers.recheckRooms([]string{room})
	n.joins.recheckOf(room)
	for _, c := range n.owner.InRoom(room) {
		n.joins.recheck(c, room)
	}
}

// tellMembershipEnded tells a socket that a join guard has taken its connection
// out of a room.
func (n *node) tellMembershipEnded(conn, room string) {
	if n.control.sockets == nil {
		return
	}
	if f, err := wire.Push(wire.PushMembershipEnded, wire.Ended{RoomName: room}); err == nil {
		n.control.sockets(conn, f)
	}
}
