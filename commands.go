package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/wire"
)

// command carries out one of the protocol's requests. A nil result without an
// error says that it has answered by itself.
type command func(ctx context.Context, c *Connection, req wire.Request) (any, error)

// begun is the result of a command that waits for Redis beside those that come
// after it: a state. Calling it waits.
type begun func(ctx context.Context) (any, error)

// overlaps tells whether a command's result may be a begun.
func overlaps(command string) bool {
	return command == wire.CommandPublishPresenceState || command == wire.CommandClearPresenceState
}

// commands are the protocol's own, by name.
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

// errPayload is the answer to a payload of the wrong shape. err wraps
// wire.ErrPayload and is written for the client.
func errPayload(err error) error {
	return &CommandError{Code: codeInvalid, Message: strings.TrimPrefix(err.Error(), "mesh: ")}
}

func decodePayload(req wire.Request, into any) error {
	if err := req.Bind(into); err != nil {
		return errPayload(err)
	}
	return nil
}

// inRoom adapts a command whose payload names a room.
func inRoom(run func(ctx context.Context, c *Connection, req wire.Request, room string) (any, error)) command {
	return func(ctx context.Context, c *Connection, req wire.Request) (any, error) {
		var p wire.RoomRequest
		if err := decodePayload(req, &p); err != nil {
			return nil, err
		}
		room := string(p.RoomName)
		if err := c.s.n.checkRoom(room); err != nil {
			return nil, err
		}
		return run(ctx, c, req, room)
	}
}

// refused reports whether an error is an answer rather than a failure: not
// tracked, or the guard said no.
func refused(err error) bool {
	return errors.Is(err, ErrRefused) || errors.Is(err, ErrNotTracked)
}

func leaveRoom(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	if _, err := c.s.n.leave(ctx, c.own, room); err != nil {
		return nil, err
	}
	return wire.Success{Success: true}, nil
}

func publishPresenceState(ctx context.Context, c *Connection, req wire.Request) (any, error) {
	n := c.s.n
	var p wire.PublishStateRequest
	if err := decodePayload(req, &p); err != nil {
		return nil, err
	}
	room := string(p.RoomName)
	if err := n.checkRoom(room); err != nil {
		return nil, err
	}
	if wire.IsNull(p.State) {
		return false, nil
	}
	after, err := p.Expiry()
	if err != nil {
		return nil, errPayload(err)
	}
	data, err := n.encodeState(p.State)
	if err != nil {
		return nil, err
	}
	return c.change(ctx, room, func() (owner.Write, error) {
		return n.setState(c.own, room, data, StateOptions{ExpireAfter: after, Silent: p.Silent})
	})
}

func clearPresenceState(ctx context.Context, c *Connection, _ wire.Request, room string) (any, error) {
	return c.change(ctx, room, func() (owner.Write, error) { return c.own.SetState(room, nil, 0, false) })
}

// change does something to the connection's state in a room, if it is in and
// may see the room.
func (c *Connection) change(ctx context.Context, room string, do func() (owner.Write, error)) (any, error) {
	// After a silence the join guards may be deciding whether it is in again.
	if _, err := c.s.n.joins.awaitReturn(ctx, c.own, room); err != nil {
		return nil, err
	}
	if !c.own.In(room) {
		return false, nil
	}
	if err := c.s.n.maySee(ctx, c.id, room); err != nil {
		return changed(err)
	}
	w, err := do()
	if err != nil {
		return changed(c.s.n.errorFor(ctx, err))
	}
	return begun(func(ctx context.Context) (any, error) { return changed(c.s.n.errorFor(ctx, w.Await(ctx))) }), nil
}

// changed is the answer to a change of a state.
func changed(err error) (any, error) {
	if refused(err) || errors.Is(err, ErrNotPresent) {
		return false, nil
	}
	return err == nil, err
}

func getMyConnectionMetadata(_ context.Context, c *Connection, _ wire.Request) (any, error) {
	return wire.Metadata{Metadata: c.Member().Metadata}, nil
}

func getConnectionMetadata(ctx context.Context, c *Connection, req wire.Request) (any, error) {
	var p wire.GetMetadataRequest
	if err := decodePayload(req, &p); err != nil {
		return nil, err
	}
	id := string(p.ConnectionID)
	if err := validateConnectionID(id); err != nil {
		return nil, err
	}
	if id == c.id {
		return wire.Metadata{Metadata: c.Member().Metadata}, nil
	}
	data, err := c.s.n.metadataFor(ctx, c.id, id, c.concerned())
	if err != nil {
		return nil, err
	}
	return wire.Metadata{Metadata: data}, nil
}

// concerned returns the rooms that the connection has joined or watches.
func (c *Connection) concerned() []string {
	rooms := c.own.Rooms()
	c.mu.Lock()
	defer c.mu.Unlock()
	for room := range c.subs {
		rooms = append(rooms, room)
	}
	slices.Sort(rooms)
	return slices.Compact(rooms)
}

func setMyConnectionMetadata(ctx context.Context, c *Connection, req wire.Request) (any, error) {
	n := c.s.n
	var p wire.SetMetadataRequest
	if err := decodePayload(req, &p); err != nil {
		return nil, err
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
		answer := make(chan json.RawMessage, 1) // the hook may outlive its time
		err := n.calls.run(ctx, callbackMetadata, n.opts.HookTimeout, func(ctx context.Context) error {
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
	n := c.s.n
	read := func() (any, error) {
		value, err := n.store.RoomMeta(ctx, room)
		return wire.Metadata{Metadata: value.Data}, n.errorFor(ctx, err)
	}
	if !n.rules.match(room).tracked {
		return read()
	}
	return n.look(ctx, c.id, room, wire.Metadata{}, read)
}
