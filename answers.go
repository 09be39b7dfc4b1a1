package mesh

import (
	"context"
	"encoding/json"
	"slices"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/wire"
)

func joinRoom(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	n := c.s.n
	if err := c.admitRoom(room); err != nil {
		return nil, err
	}
	joined, err := n.join(ctx, c.own, room)
	if refused(err) {
		return wire.Snapshot{}, nil
	} else if err != nil {
		return nil, err
	}
	answer := func() (any, error) { return c.joinAnswer(ctx, room, joined) }
	var present any
	if n.rules.match(room).tracked {
		present, err = n.look(ctx, c.id, room, wire.Snapshot{Success: true}, answer)
	} else {
		present, err = answer()
	}
	if err == nil && !c.own.In(room) { // taken out while Redis or a guard was asked
		return wire.Snapshot{}, nil
	}
	return present, err
}

// joinAnswer lists who is in a room that the connection has joined, the
// connection itself among them.
func (c *Connection) joinAnswer(ctx context.Context, room string, joined owner.Joined) (any, error) {
	n := c.s.n
	if l, ok := c.listed(room, joined); ok {
		return wire.EncodedView{Success: true, Present: l.Present, Extent: extentOf(l)}, nil
	}
	s, err := n.readPresent(ctx, room)
	if err != nil {
		return nil, err
	}
	limit := n.opts.Limits.SnapshotMembers
	answer := wire.Snapshot{Success: true, Extent: wire.Extent{Stale: s.Stale, Epoch: s.Epoch, Seq: s.Seq}}
	if !slices.ContainsFunc(s.Members, func(m Member) bool { return m.ID == c.id }) {
		s.Members = append([]Member{c.Member()}, s.Members...)
		if limit >= 0 && len(s.Members) > limit {
			s.Members = s.Members[:limit]
		}
	}
	for _, m := range s.Members {
		answer.Present = append(answer.Present, wire.Member{ID: m.ID, Metadata: m.Metadata})
	}
	if s.Total > len(answer.Present) {
		answer.Total = s.Total
	}
	return answer, nil
}

// listed returns who is in a room that the connection has joined, the connection
// itself among them, from the mirror of the room; false: Redis has to be asked.
func (c *Connection) listed(room string, joined owner.Joined) (hub.Listing, bool) {
	if !joined.Again {
		return c.s.n.hub.Joined(room, c.id, joined.Position, joined.Total)
	}
	v, ok := c.s.n.hub.View(room)
	return v.Listing, ok && slices.ContainsFunc(v.Members(), func(m *hub.Member) bool { return m.Conn == c.id })
}

func extentOf(l hub.Listing) wire.Extent {
	e := wire.Extent{Stale: l.Stale, Epoch: l.Epoch, Seq: l.Seq}
	if l.Bounded {
		e.Total = l.Total
	}
	return e
}

func getPresenceState(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	n := c.s.n
	return n.look(ctx, c.id, room, wire.StateSnapshot{}, func() (any, error) { return n.stateAnswer(ctx, room) })
}

// stateAnswer lists the members and states of a room.
func (n *node) stateAnswer(ctx context.Context, room string) (any, error) {
	if v, ok := n.hub.View(room); ok {
		return wire.EncodedView{Success: true, Present: wire.Text{v.IDs()}, States: v.States(), Extent: extentOf(v.Listing)}, nil
	}
	s, err := n.readPresent(ctx, room)
	if err != nil {
		return nil, err
	}
	answer := wire.StateSnapshot{Success: true, States: make(map[string]json.RawMessage)}
	answer.Extent = wire.Extent{Stale: s.Stale, Epoch: s.Epoch, Seq: s.Seq}
	for _, m := range s.Members {
		answer.Present = append(answer.Present, m.ID)
		if m.State != nil {
			answer.States[m.ID] = m.State
		}
	}
	if s.Total > len(s.Members) {
		answer.Total = s.Total
	}
	return answer, nil
}
