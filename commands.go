package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/encode"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// command carries out a request. If it returns an error, the request has failed and the
// reply is ignored.
type command func(ctx context.Context, c *Connection, req wire.Request) (reply, error)

// roomCommand is a command whose payload names a room.
type roomCommand func(ctx context.Context, c *Connection, req wire.Request, room string) (reply, error)

// commands are the protocol's commands by name.
var commands = map[string]command{
	wire.CommandNoop:                    noop,
	wire.CommandJoinRoom:                joinRoom,
	wire.CommandLeaveRoom:               inRoom(leaveRoom),
	wire.CommandSubscribePresence:       inRoom(subscribePresence),
	wire.CommandUnsubscribePresence:     inRoom(unsubscribePresence),
	wire.CommandPublishPresenceState:    publishPresenceState,
	wire.CommandClearPresenceState:      inRoom(clearPresenceState),
	wire.CommandGetPresenceState:        inRoom(getPresenceState),
	wire.CommandListPresence:            listPresence,
	wire.CommandGetConnectionMetadata:   getConnectionMetadata,
	wire.CommandGetMyConnectionMetadata: getMyConnectionMetadata,
	wire.CommandSetMyConnectionMetadata: setMyConnectionMetadata,
	wire.CommandGetRoomMetadata:         inRoom(getRoomMetadata),
	wire.CommandSubscribeOccupancy:      subscribeOccupancy,
	wire.CommandUnsubscribeOccupancy:    unsubscribeOccupancy,
}

// Begin implements socket.Handler, for commands of the protocol.
func (h *wireHandler) Begin(ctx context.Context, req wire.Request, last bool) socket.Begun {
	c := (*Connection)(h)
	if !c.await(ctx) {
		return socket.Begun{}
	}
	if req.Command != wire.CommandLeaveRoom {
		c.local.Touched() // a connection that was silent first returns to its rooms
	}
	run := commands[req.Command]
	if run == nil {
		c.answer(req, wire.NotFound(req.ID, req.Command))
		return socket.Begun{}
	}
	r, err := run(ctx, c, req)
	if !last && dependsOnEarlier(&req, r, err) {
		return socket.Begun{Again: true}
	}
	if err == nil && r.answered {
		return socket.Begun{}
	}
	return socket.Begun{Spared: r.spared, Rest: func(ctx context.Context) { c.finish(ctx, req, r, err) }}
}

// Concurrent implements socket.Handler, for commands of the app.
func (h *wireHandler) Concurrent(ctx context.Context, req wire.Request) {
	c := (*Connection)(h)
	if !c.await(ctx) {
		return
	}
	r, err := appCommand(ctx, c, req)
	c.finish(ctx, req, r, err)
}

// inRoom adapts a command whose payload names a room.
func inRoom(run roomCommand) command {
	return func(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
		var p wire.RoomRequest
		if err := req.Bind(&p); err != nil {
			return reply{}, errPayload(err)
		}
		room := string(p.RoomName)
		if err := c.core().checkRoom(room); err != nil {
			return reply{}, err
		}
		return run(ctx, c, req, room)
	}
}

func noop(context.Context, *Connection, wire.Request) (reply, error) { return valueReply(true), nil }

func leaveRoom(ctx context.Context, c *Connection, _ wire.Request, room string) (reply, error) {
	if _, err := c.core().access.joins.Leave(ctx, c.local, room, store.CauseLeft); err != nil {
		return reply{}, err
	}
	return valueReply(wire.Success{Success: true}), nil
}

func getMyConnectionMetadata(_ context.Context, c *Connection, _ wire.Request) (reply, error) {
	return valueReply(wire.Metadata{Metadata: c.Member().Metadata}), nil
}

func getConnectionMetadata(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	var p wire.GetMetadataRequest
	if err := req.Bind(&p); err != nil {
		return reply{}, errPayload(err)
	}
	id := string(p.ConnectionID)
	if err := keys.ValidateConnectionID(id); err != nil {
		return reply{}, err
	}
	if id == c.id {
		return valueReply(wire.Metadata{Metadata: c.Member().Metadata}), nil
	}
	data, err := c.core().metadataFor(ctx, c.id, id, c.visibleRooms())
	return valueReply(wire.Metadata{Metadata: data}), err
}

// visibleRooms returns the rooms that the connection has joined or watches.
func (c *Connection) visibleRooms() []string {
	rooms := c.local.Rooms()
	c.mu.Lock()
	defer c.mu.Unlock()
	for room := range c.subs {
		rooms = append(rooms, room)
	}
	slices.Sort(rooms)
	return slices.Compact(rooms)
}

func setMyConnectionMetadata(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	n := c.core()
	var p wire.SetMetadataRequest
	if err := req.Bind(&p); err != nil {
		return reply{}, errPayload(err)
	}
	hook := n.opts.ClientMetadata
	if hook == nil {
		return reply{}, fmt.Errorf("%w: clients may not set metadata", ErrRefused)
	}
	change, err := n.encodeMetadata(p.Metadata)
	if err != nil {
		return reply{}, err
	}
	approve := func(current, proposed json.RawMessage) (json.RawMessage, error) {
		answer := make(chan json.RawMessage, 1) // buffered: the hook may outlive its time limit
		err := n.calls.Run(ctx, callbacks.Metadata, n.opts.HookTimeout, func(ctx context.Context) error {
			value, err := hook(ctx, Member{ID: c.id, UserID: c.local.User(), Metadata: current}, proposed)
			if err != nil {
				return err
			}
			data, err := n.encodeMetadata(value)
			answer <- data
			return err
		})
		if err != nil {
			return nil, err
		}
		return <-answer, nil
	}
	err = n.setConnMetadata(ctx, c.id, change, Strategy(p.Options.Strategy), approve)
	return valueReply(wire.Success{Success: true}), err
}

func getRoomMetadata(ctx context.Context, c *Connection, _ wire.Request, room string) (reply, error) {
	n := c.core()
	read := func() (any, error) {
		value, err := n.store.RoomMeta(ctx, room)
		return wire.Metadata{Metadata: value.Data}, errorFor(ctx, err)
	}
	metadata, err := c.read(ctx, room, wire.Metadata{}, read)
	return valueReply(metadata), err
}

// read returns the result of read if the connection may see the room, otherwise unseen.
// A room without a rule has no guards, and any connection may see it.
func (c *Connection) read(ctx context.Context, room string, unseen any, read func() (any, error)) (any, error) {
	n := c.core()
	if !n.access.rules.Match(room).Tracked {
		return read()
	}
	return n.access.Read(ctx, c.id, room, unseen, read)
}

func joinRoom(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	n := c.core()
	var p wire.JoinRequest
	if err := req.Bind(&p); err != nil {
		return reply{}, errPayload(err)
	}
	room := string(p.RoomName)
	if err := n.checkRoom(room); err != nil {
		return reply{}, err
	}
	if p.Replaces != "" {
		if err := keys.ValidateConnectionID(string(p.Replaces)); err != nil {
			return reply{}, err
		}
	}
	if err := c.admitRoom(room); err != nil {
		return reply{}, err
	}
	joined, err := n.joinNowOrLater(ctx, c.local, room, string(p.Replaces))
	refused := wire.Refusal{Code: wire.CodeRefused}
	if watch.IsRefusal(err) {
		return valueReply(refused), nil
	} else if full, ok := errors.AsType[*local.FullError](err); ok {
		return valueReply(wire.Refusal{Code: wire.CodeFull, Of: string(full.Of), Max: full.Max}), nil
	} else if err != nil {
		return reply{}, err
	}
	unseen := wire.Snapshot{Success: true, Extent: wire.Extent{Stale: joined.Kept}}
	present, err := c.read(ctx, room, unseen, func() (any, error) { return c.joinAnswer(ctx, room, joined) })
	if err == nil && !c.local.In(room) { // removed while Redis or a guard was asked
		return valueReply(refused), nil
	}
	return valueReply(present), err
}

// joinAnswer lists the members of a room that the connection has joined, including the
// connection itself: a wire.Snapshot or a wire.EncodedView. If Redis does not answer, it
// lists the last known members.
func (c *Connection) joinAnswer(ctx context.Context, room string, joined local.Joined) (any, error) {
	n := c.core()
	if err := socket.AwaitAnswerSlot(ctx); err != nil {
		return nil, err
	}
	if joined.Kept {
		return c.joinSnapshot(n.knownPresent(room)), nil
	}
	if l, ok := c.listed(room, joined); ok {
		return wire.EncodedView{Success: true, Present: l.Present, Extent: joinExtent(l)}, nil
	}
	limited, cancel := context.WithTimeout(ctx, min(n.waitLimit(room), max(callLimit-joined.Waited, awayLimit)))
	defer cancel()
	s, err := n.readPresent(limited, room)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		s = n.knownPresent(room)
	}
	s.Users = max(s.Users, joined.Users) // -1: unknown
	return c.joinSnapshot(s), nil
}

// joinSnapshot returns the answer to a join: a snapshot that includes the connection
// itself.
func (c *Connection) joinSnapshot(s *Snapshot) wire.Snapshot {
	limit := c.core().opts.Limits.SnapshotMembers
	answer := wire.Snapshot{Success: true, Extent: wire.Extent{Stale: s.Stale, Epoch: s.Epoch, Seq: s.Seq}}
	if !slices.ContainsFunc(s.Members, func(m Member) bool { return m.ID == c.id }) {
		s.Members = append([]Member{c.Member()}, s.Members...)
		s.Total = max(s.Total, len(s.Members)) // the snapshot may be older than the join
		if limit >= 0 && len(s.Members) > limit {
			s.Members = s.Members[:limit]
		}
	}
	for _, m := range s.Members {
		answer.Present = append(answer.Present, wire.Member{
			ID: m.ID, UserID: m.UserID, Metadata: m.Metadata, JoinedAt: millisOf(m.JoinedAt), Disconnected: m.Disconnected,
		})
	}
	answer.Connections = wire.CountOf(s.Total)
	switch {
	case s.Total > len(answer.Present):
		answer.Total = wire.CountOf(s.Total)
		if s.Users > 0 {
			answer.Users = wire.CountOf(s.Users)
		}
	case c.core().hub.CountsUsers():
		answer.Users = wire.CountOf(usersIn(s.Members))
	}
	return answer
}

// listed returns the members of a room that the connection has joined, including the
// connection itself, from the mirror of the room. It returns false if Redis must be
// asked.
func (c *Connection) listed(room string, joined local.Joined) (hub.Listing, bool) {
	if !joined.Again {
		return c.core().hub.Joined(room, c.id, joined.Position, joined.Total)
	}
	v, ok := c.core().hub.View(room)
	return v.Listing, ok && slices.ContainsFunc(v.Members(), func(m *hub.Member) bool { return m.Conn == c.id })
}

// appCommand carries out a command of the app. If its handler ignores the end of its
// context, it is left behind, so that the connection does not stay present until it
// returns. Therefore the result comes through a channel. It is encoded inside the call,
// because that may call methods of the app.
func appCommand(ctx context.Context, c *Connection, req wire.Request) (reply, error) {
	run := c.handler(req.Command)
	answer := make(chan wire.Raw, 1)
	err := c.core().calls.Run(ctx, callbacks.Command, 0, func(ctx context.Context) error {
		result, err := run(ctx, c, req.Payload)
		if err != nil || !req.HasID {
			return err
		}
		data, err := encode.Marshal(result)
		if err != nil {
			return fmt.Errorf("%w: %w", callbacks.ErrNotEncoded, err)
		}
		answer <- wire.Raw(data)
		return nil
	})
	if err != nil || !req.HasID {
		return reply{}, err
	}
	return valueReply(<-answer), nil
}

// ownLine is the command line of commands about the connection itself, and of invalid
// commands that name no room. No room has this name.
const ownLine = "\x00own"

// Order implements socket.Handler. Commands about one room run in order, and commands
// about different rooms run concurrently. A change of the connection's metadata
// completes before everything that was sent later, because guards decide by the
// metadata.
func (h *wireHandler) Order(req *wire.Request) socket.Order {
	c := (*Connection)(h)
	switch req.Command {
	case wire.CommandJoinRoom, wire.CommandLeaveRoom, wire.CommandSubscribePresence, wire.CommandUnsubscribePresence,
		wire.CommandGetPresenceState, wire.CommandListPresence, wire.CommandGetRoomMetadata:
		return socket.Order{Line: c.roomOf(req)}
	case wire.CommandClearPresenceState:
		return socket.Order{Line: c.roomOf(req), Overlaps: true}
	case wire.CommandPublishPresenceState:
		return c.orderOfState(req)
	case wire.CommandSetMyConnectionMetadata:
		return socket.Order{Line: ownLine, Holds: true}
	case wire.CommandSubscribeOccupancy, wire.CommandUnsubscribeOccupancy:
		return socket.Order{Line: occupancyLine}
	case wire.CommandGetConnectionMetadata:
		var p wire.GetMetadataRequest
		if req.Bind(&p) == nil && string(p.ConnectionID) == c.id {
			return socket.Order{Line: ownLine}
		}
		return socket.Order{}
	}
	return socket.Order{Line: ownLine, Beside: c.handler(req.Command) != nil}
}

// roomOf returns the command line of the room that a request names.
func (c *Connection) roomOf(req *wire.Request) string {
	var p wire.RoomRequest
	if req.Bind(&p) != nil || c.core().checkRoom(string(p.RoomName)) != nil {
		return ownLine
	}
	return string(p.RoomName)
}

// Values of Order.Latest. A delivered state and a silent one do not supersede each
// other.
const (
	latestTold = iota + 1
	latestSilent
)

// orderOfState is Order for a state. In a room with a StateInterval only the newest
// state counts, so that the next valid state supersedes a waiting one. Patches are all
// merged, in order.
func (c *Connection) orderOfState(req *wire.Request) socket.Order {
	n := c.core()
	var p wire.PublishStateRequest
	if req.Bind(&p) != nil || n.checkRoom(string(p.RoomName)) != nil {
		return socket.Order{Line: ownLine}
	}
	o := socket.Order{Line: string(p.RoomName), Overlaps: true}
	if _, err := p.Expiry(); err != nil || p.Patch || !p.HasState() || !wire.IsObject(p.State) ||
		over(len(p.State), n.opts.Limits.StateBytes) || n.access.rules.Match(o.Line).StateInterval == 0 {
		return o
	}
	if o.Latest = latestTold; p.Silent {
		o.Latest = latestSilent
	}
	return o
}

// dependsOnEarlier reports whether the outcome of a command may change when earlier
// commands about other rooms have completed. A join may need the place of a pending
// leave, and metadata may become visible through a pending join.
func dependsOnEarlier(req *wire.Request, r reply, err error) bool {
	switch req.Command {
	case wire.CommandJoinRoom, wire.CommandSubscribePresence:
		return errors.Is(err, ErrLimit)
	case wire.CommandGetConnectionMetadata:
		m, ok := r.value.(wire.Metadata)
		return err == nil && ok && m.Metadata == nil
	}
	return false
}
