package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// command carries out one of the protocol's requests. A nil result without an error
// means that it has already answered.
type command func(ctx context.Context, c *Connection, req wire.Request) (any, error)

// pendingReply is the result of a command that still waits for Redis while later
// commands run: a change of a state.
type pendingReply struct {
	wait   func(ctx context.Context) (any, error)
	spared bool // it only replaced a state that waited for its StateInterval
}

// commands are the protocol's commands by name.
var commands = map[string]command{
	wire.CommandNoop:                    func(context.Context, *Connection, wire.Request) (any, error) { return true, nil },
	wire.CommandJoinRoom:                inRoom(joinRoom),
	wire.CommandLeaveRoom:               inRoom(leaveRoom),
	wire.CommandSubscribePresence:       inRoom(subscribePresence),
	wire.CommandUnsubscribePresence:     inRoom(unsubscribePresence),
	wire.CommandPublishPresenceState:    publishPresenceState,
	wire.CommandClearPresenceState:      inRoom(clearPresenceState),
	wire.CommandGetPresenceState:        inRoom(getPresenceState),
	wire.CommandGetConnectionMetadata:   getConnectionMetadata,
	wire.CommandGetMyConnectionMetadata: getMyConnectionMetadata,
	wire.CommandSetMyConnectionMetadata: setMyConnectionMetadata,
	wire.CommandGetRoomMetadata:         inRoom(getRoomMetadata),
}

// errPayload returns the error for a payload of the wrong shape. err wraps
// wire.ErrPayload and is written for the client.
func errPayload(err error) error {
	return &CommandError{Code: wire.CodeInvalid, Message: strings.TrimPrefix(err.Error(), "mesh: ")}
}

// inRoom adapts a command whose payload names a room.
func inRoom(run func(ctx context.Context, c *Connection, req wire.Request, room string) (any, error)) command {
	return func(ctx context.Context, c *Connection, req wire.Request) (any, error) {
		var p wire.RoomRequest
		if err := req.Bind(&p); err != nil {
			return nil, errPayload(err)
		}
		room := string(p.RoomName)
		if err := c.core().checkRoom(room); err != nil {
			return nil, err
		}
		return run(ctx, c, req, room)
	}
}

func leaveRoom(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	if _, err := c.core().access.joins.Leave(ctx, c.local, room); err != nil {
		return nil, err
	}
	return wire.Success{Success: true}, nil
}

func getMyConnectionMetadata(_ context.Context, c *Connection, _ wire.Request) (any, error) {
	return wire.Metadata{Metadata: c.Member().Metadata}, nil
}

func getConnectionMetadata(ctx context.Context, c *Connection, req wire.Request) (any, error) {
	var p wire.GetMetadataRequest
	if err := req.Bind(&p); err != nil {
		return nil, errPayload(err)
	}
	id := string(p.ConnectionID)
	if err := keys.ValidateConnectionID(id); err != nil {
		return nil, err
	}
	if id == c.id {
		return wire.Metadata{Metadata: c.Member().Metadata}, nil
	}
	data, err := c.core().metadataFor(ctx, c.id, id, c.visibleRooms())
	if err != nil {
		return nil, err
	}
	return wire.Metadata{Metadata: data}, nil
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

func setMyConnectionMetadata(ctx context.Context, c *Connection, req wire.Request) (any, error) {
	n := c.core()
	var p wire.SetMetadataRequest
	if err := req.Bind(&p); err != nil {
		return nil, errPayload(err)
	}
	hook := n.opts.ClientMetadata
	if hook == nil {
		return nil, fmt.Errorf("%w: clients may not set metadata", ErrRefused)
	}
	change, err := n.encodeMetadata(p.Metadata)
	if err != nil {
		return nil, err
	}
	approve := func(current, proposed json.RawMessage) (json.RawMessage, error) {
		answer := make(chan json.RawMessage, 1) // buffered: the hook may outlive its time limit
		err := n.calls.Run(ctx, callbacks.Metadata, n.opts.HookTimeout, func(ctx context.Context) error {
			value, err := hook(ctx, Member{ID: c.id, Metadata: current}, proposed)
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
	if err := n.setConnMetadata(ctx, c.id, change, Strategy(p.Options.Strategy), approve); err != nil {
		return nil, err
	}
	return wire.Success{Success: true}, nil
}

func getRoomMetadata(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	n := c.core()
	read := func() (any, error) {
		value, err := n.store.RoomMeta(ctx, room)
		return wire.Metadata{Metadata: value.Data}, errorFor(ctx, err)
	}
	if !n.access.rules.Match(room).Tracked {
		return read()
	}
	return n.access.Read(ctx, c.id, room, wire.Metadata{}, read)
}

func joinRoom(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	n := c.core()
	if err := c.admitRoom(room); err != nil {
		return nil, err
	}
	joined, err := n.joinNowOrLater(ctx, c.local, room)
	refused := wire.Refusal{Code: wire.CodeRefused}
	if watch.IsRefusal(err) {
		return refused, nil
	} else if err != nil {
		return nil, err
	}
	answer := func() (any, error) { return c.joinAnswer(ctx, room, joined) }
	var present any
	if n.access.rules.Match(room).Tracked {
		unseen := wire.Snapshot{Success: true, Extent: wire.Extent{Stale: joined.Kept}}
		present, err = n.access.Read(ctx, c.id, room, unseen, answer)
	} else {
		present, err = answer()
	}
	if err == nil && !c.local.In(room) { // removed while Redis or a guard was asked
		return refused, nil
	}
	return present, err
}

// joinAnswer lists the members of a room that the connection has joined, including the
// connection itself. If Redis does not answer, it lists the last known members.
func (c *Connection) joinAnswer(ctx context.Context, room string, joined local.Joined) (any, error) {
	n := c.core()
	if err := socket.AwaitRoom(ctx); err != nil {
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

// answersFalse reports whether a failed command is answered with false at level 1, as
// by the TypeScript server. The stock client takes an error object for a success.
func answersFalse(command string) bool {
	switch command {
	case wire.CommandPublishPresenceState, wire.CommandClearPresenceState, wire.CommandUnsubscribePresence:
		return true
	}
	return false
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
		wire.CommandGetPresenceState, wire.CommandGetRoomMetadata:
		return socket.Order{Line: c.roomOf(req)}
	case wire.CommandClearPresenceState:
		return socket.Order{Line: c.roomOf(req), Overlaps: true}
	case wire.CommandPublishPresenceState:
		return c.orderOfState(req)
	case wire.CommandSetMyConnectionMetadata:
		return socket.Order{Line: ownLine, Holds: true}
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
// state counts, so that the next valid state supersedes a waiting one.
func (c *Connection) orderOfState(req *wire.Request) socket.Order {
	n := c.core()
	var p wire.PublishStateRequest
	if req.Bind(&p) != nil || n.checkRoom(string(p.RoomName)) != nil {
		return socket.Order{Line: ownLine}
	}
	o := socket.Order{Line: string(p.RoomName), Overlaps: true}
	if _, err := p.Expiry(); err != nil || !p.HasState() || !wire.IsObject(p.State) ||
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
func dependsOnEarlier(req *wire.Request, result any, err error) bool {
	switch req.Command {
	case wire.CommandJoinRoom, wire.CommandSubscribePresence:
		return errors.Is(err, ErrLimit)
	case wire.CommandGetConnectionMetadata:
		m, ok := result.(wire.Metadata)
		return ok && m.Metadata == nil
	}
	return false
}
