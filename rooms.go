package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/meshpresence/mesh/internal/wire"
)

// RoomManager works on rooms and who is in them, on whichever server the
// connections are. All methods are safe for concurrent use. A Redis or a server
// that does not answer is waited for for about two seconds ([ErrUnavailable]);
// what takes many steps, because a room or the number of rooms is large, takes
// as long as its context lasts. No guard is asked: the app itself is acting.
type RoomManager struct {
	n *node
}

// Add brings a connection into a room, on whichever server it is. JoinGuards are
// not asked, except when the connection comes back after a silence. A join of the
// connection that waits for one takes place.
// [ErrUnknownConnection] if no server has it, [ErrLimit] past
// Limits.RoomsPerConnection. It is safe to repeat.
func (m *RoomManager) Add(ctx context.Context, room, connID string) error {
	if err := m.n.use(ctx, room); err != nil {
		return err
	}
	_, err := m.n.callOwner(ctx, remoteCall{Op: opAdd, Room: room, Conn: connID})
	return err
}

// Remove takes a connection out of a room, on whichever server it is; false: it
// was not in. A join of the connection that waits, for a JoinGuard or for Redis,
// does not take place. The room's guards are asked again if the
// connection may still see the room. Until they have answered, it gets no event of
// the room.
//
// [ErrUnknownConnection] if no server has it. It is safe to repeat.
func (m *RoomManager) Remove(ctx context.Context, room, connID string) (bool, error) {
	if err := m.n.use(ctx, room); err != nil {
		return false, err
	}
	done, err := m.n.callOwner(ctx, remoteCall{Op: opRemove, Room: room, Conn: connID})
	return done.OK, err
}

// Recheck asks the room's guards again about every connection that sees the room,
// and its join guards about every member and every join that waits, on all servers.
// Call it after what the guards read has changed. (Changes of metadata and rules
// are noticed by themselves.)
//
// It does not wait for the verdicts. Until the guards have answered about a
// subscriber, the subscriber gets no event. A subscriber that they refuse gets the
// push mesh/presence-ended. A member that a JoinGuard refuses leaves, and its
// socket gets the push mesh/membership-ended.
//
// On an error, a server that does not answer may not have done so. It is safe to
// repeat.
func (m *RoomManager) Recheck(ctx context.Context, room string) error {
	if err := m.n.use(ctx, room); err != nil {
		return err
	}
	return m.n.everywhere(ctx, remoteCall{Op: opRecheckRoom, Room: room})
}

// Contains reports whether a connection is in a room, as Redis holds it. An
// unknown connection is in none.
func (m *RoomManager) Contains(ctx context.Context, room, connID string) (bool, error) {
	if err := m.n.use(ctx, room); err != nil {
		return false, err
	}
	if err := validateConnectionID(connID); err != nil {
		return false, err
	}
	_, ok, err := m.n.store.Record(ctx, room, connID)
	return ok, m.n.errorFor(ctx, err)
}

// Members returns the ids of the connections in a room, tracked or not, in no
// particular order. With metadata and states: [PresenceManager.Members].
func (m *RoomManager) Members(ctx context.Context, room string) ([]string, error) {
	return (&PresenceManager{n: m.n}).PresentConnections(ctx, room)
}

// All returns the names of all rooms that somebody is in, in no particular
// order. It reads an index in pages: rooms that fill or empty meanwhile may be
// in or not.
func (m *RoomManager) All(ctx context.Context) ([]string, error) {
	if err := m.n.usableFor(ctx); err != nil {
		return nil, err
	}
	var rooms []string
	seen := make(map[string]struct{})
	err := m.n.store.Rooms(ctx, func(room string) bool {
		if _, ok := seen[room]; !ok {
			seen[room] = struct{}{}
			rooms = append(rooms, room)
		}
		return ctx.Err() == nil
	})
	if err == nil {
		err = ctx.Err()
	}
	return rooms, m.n.errorFor(ctx, err)
}

// Of returns the rooms that a connection is in, sorted, on whichever server it
// is. [ErrUnknownConnection] where no server has it.
func (m *RoomManager) Of(ctx context.Context, connID string) ([]string, error) {
	done, err := m.n.callOwner(ctx, remoteCall{Op: opRooms, Conn: connID})
	return done.Rooms, err
}

// Clear takes all connections out of a room, on all servers, each with a leave
// event. Joins that wait do not take place, and the guards are asked again about
// every connection that sees the room, as by [RoomManager.Recheck]. The room's
// metadata stays. Connections that join again in the meantime may stay in.
//
// However many they are, it takes as long as ctx lasts. If it fails, some may
// still be in: the error is a [*ProgressError], which wraps ctx's error if that
// is why, or [ErrUnavailable] if Redis or a server did not answer for two
// seconds. It is safe to repeat.
func (m *RoomManager) Clear(ctx context.Context, room string) error {
	if err := m.n.use(ctx, room); err != nil {
		return err
	}
	var removed atomic.Int64
	err := m.n.onServers(ctx, room, func(inc string) error { return m.n.control.clearAt(ctx, inc, room, &removed) })
	if err != nil && ctx.Err() != nil {
		err = contextError(ctx)
	}
	if err != nil {
		return &ProgressError{Done: int(removed.Load()), Err: err}
	}
	return nil
}

// clearAt has one server clear a room, part after part. It goes on as long as
// there is progress: a busy Redis may take longer for a part than a call lasts.
func (c *control) clearAt(ctx context.Context, inc, room string, removed *atomic.Int64) error {
	here := func(context.Context) (string, error) { return inc, nil }
	call := remoteCall{Op: opClear, Room: room, Paged: true}
	for {
		done, err := c.call(ctx, here, call)
		removed.Add(int64(done.Count))
		switch {
		case err != nil && (done.Count == 0 || ctx.Err() != nil):
			return err
		case err == nil && done.After == "":
			return nil
		case done.After != "":
			call.After = done.After
		}
	}
}

// Delete clears a room, as [RoomManager.Clear] does and with its errors, and
// forgets its metadata. It is no lock: a connection that joins afterwards is in
// again.
func (m *RoomManager) Delete(ctx context.Context, room string) error {
	if err := m.Clear(ctx, room); err != nil {
		return err
	}
	return m.n.errorFor(ctx, m.n.store.DeleteRoomMeta(ctx, room))
}

// SetMetadata stores metadata for a room: any value that encodes to JSON; nil
// removes it. It stays until it is set anew or the room is deleted, whether or
// not somebody is in. Two merges at once lose nothing. Clients that may see
// the room can read it. [ErrInvalidMetadata] where the value does not encode or
// the strategy is unknown, [ErrTooLarge] past Limits.MetadataBytes.
func (m *RoomManager) SetMetadata(ctx context.Context, room string, metadata any, opts MetadataOptions) error {
	if err := m.n.use(ctx, room); err != nil {
		return err
	}
	data, err := m.n.appMetadata(ctx, metadata)
	if err != nil {
		return err
	}
	_, err = m.n.setMetadata(ctx, m.n.roomPlace(room), data, opts.Strategy, nil)
	return err
}

// Metadata returns a room's metadata, nil where it has none.
func (m *RoomManager) Metadata(ctx context.Context, room string) (json.RawMessage, error) {
	if err := m.n.use(ctx, room); err != nil {
		return nil, err
	}
	value, err := m.n.store.RoomMeta(ctx, room)
	if err != nil {
		return nil, m.n.errorFor(ctx, err)
	}
	return value.Data, nil
}

// Send pushes a frame {command, payload} to the sockets of everybody in a
// room, on all servers, at most once each. It returns when the frame is queued
// here and on its way to the other servers. On an error some may have it.
// [ErrInvalidCommand] where the command is the protocol's own, as all are that
// begin with "mesh/".
//
// Everybody in the room gets it, those too whom a rule's Guard does not let see
// the room: they may be in it unless its JoinGuard refuses them.
func (m *RoomManager) Send(ctx context.Context, room, command string, payload any) error {
	if err := m.n.use(ctx, room); err != nil {
		return err
	}
	f, err := m.n.appFrame(ctx, command, payload)
	if err != nil {
		return err
	}
	f.Room = room
	homes, err := m.n.store.Homes(ctx, room)
	if err != nil {
		return m.n.errorFor(ctx, err)
	}
	for _, inc := range homes {
		if err := m.n.control.send(ctx, inc, f); err != nil {
			return err
		}
	}
	return nil
}

// appFrame encodes a frame of the app's own.
func (n *node) appFrame(ctx context.Context, command string, payload any) (remoteFrame, error) {
	if err := checkCommand(command); err != nil {
		return remoteFrame{}, err
	}
	data, err := n.encodeFor(ctx, payload, nil, marshal)
	if err != nil {
		return remoteFrame{}, fmt.Errorf("mesh: payload of %q: %w", command, err)
	}
	return remoteFrame{Command: command, Payload: data}, nil
}

// checkCommand refuses the protocol's own commands and the empty one.
func checkCommand(name string) error {
	switch {
	case name == "", strings.HasPrefix(name, "mesh/"),
		name == wire.CommandPong, name == wire.CommandLatencyResponse,
		name == wire.PushPing, name == wire.PushLatency, name == wire.PushLatencyRequest:
		return fmt.Errorf("%w: %q", ErrInvalidCommand, name)
	}
	return nil
}
