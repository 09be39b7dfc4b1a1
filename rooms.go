package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/peers"
)

// RoomManager reads and changes rooms and their members, on any server of the group.
// All methods are safe for concurrent use. They wait for about two seconds for Redis or
// a server that does not answer ([ErrUnavailable]). Operations of many steps, for large
// rooms or many rooms, run as long as their context lasts. No guard is asked, because
// the app itself is acting.
type RoomManager struct {
	n *core
}

// Add adds a connection of any server to a room. JoinGuards are not asked, except when
// the connection comes back after a silence. If a join of the connection waits for a
// JoinGuard, that join takes place. It returns [ErrUnknownConnection] if no server has
// the connection, [ErrLimit] beyond Limits.RoomsPerConnection, and [ErrFull] beyond a
// cap of the room, unless opts.OverCap is set. A socket that was not in the room gets the
// push mesh/room-joined. It is safe to repeat.
func (m *RoomManager) Add(ctx context.Context, room, connID string, opts AddOptions) error {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return err
	}
	_, err := m.n.callOwner(ctx, peers.Call{Op: peers.OpAdd, Room: room, Conn: connID, OverCap: opts.OverCap})
	return err
}

// AddOptions are the options of [RoomManager.Add].
type AddOptions struct {
	// OverCap adds the connection although the room is full, beyond MaxConnections and
	// MaxUsers of the rule. Defaults to false.
	OverCap bool
}

// Remove removes a connection of any server from a room. It returns false if the
// connection was not in the room. If a join of the connection waits for a JoinGuard or
// for Redis, that join does not take place. If the connection may still see the room,
// its guards are asked again. Until they have answered, the connection gets no event of
// the room.
//
// A disconnected member loses its place. A socket that was in the room gets the push
// mesh/room-left. A stock client joins its rooms again when it reconnects, so the removal
// lasts only if a JoinGuard refuses it from then on.
//
// It returns [ErrUnknownConnection] if no server has the connection and the room keeps no
// place for it. It is safe to repeat.
func (m *RoomManager) Remove(ctx context.Context, room, connID string) (bool, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return false, err
	}
	done, err := m.n.callOwner(ctx, peers.Call{Op: peers.OpRemove, Room: room, Conn: connID})
	if done.OK || !m.n.hasUsers() || err != nil && !errors.Is(err, ErrUnknownConnection) {
		return done.OK, err
	}
	removed, failed := m.n.removeEnding(ctx, room, connID, err != nil)
	if removed || failed != nil {
		return removed, errorFor(ctx, failed)
	}
	return false, err
}

// RemoveUser removes all members of a user from a room, on all servers, as
// [RoomManager.Remove] does, including disconnected ones. It returns how many it has
// removed, also with an error. A join of the user that still waits for a JoinGuard or for
// Redis takes place. A client of the user may join again at once, unless a JoinGuard
// refuses.
//
// It returns [ErrInvalidUser] for an invalid id and [ErrUsersOff] without Options.UserID.
// It is safe to repeat.
func (m *RoomManager) RemoveUser(ctx context.Context, room, user string) (int, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return 0, err
	}
	if err := m.n.checkUser(user); err != nil {
		return 0, err
	}
	removed := 0
	for range userPasses {
		n, err := m.n.removeUser(ctx, room, user)
		removed += n
		if err != nil || n == 0 {
			return removed, err
		}
	}
	return removed, nil
}

// Recheck asks the room's guards again about every connection that sees the room, and
// its join guards about every member and every pending join, on all servers. Call it
// after data that the guards read has changed. (Changes of metadata and rules are
// detected automatically.)
//
// It does not wait for the answers. Disconnected members are not asked about, because
// no server has their connection: use RemoveUser. A subscriber gets no event until the
// guards have answered about it. A subscriber that they refuse gets the push
// mesh/presence-ended. A member that a JoinGuard refuses leaves, and its socket gets
// the push mesh/membership-ended.
//
// If it returns an error, a server that did not answer may not have asked its guards.
// It is safe to repeat.
func (m *RoomManager) Recheck(ctx context.Context, room string) error {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return err
	}
	return m.n.peers.CallAll(ctx, peers.Call{Op: peers.OpRecheckRoom, Room: room})
}

// Contains reports whether a connection is in a room, as Redis holds it. An unknown
// connection is in no room.
func (m *RoomManager) Contains(ctx context.Context, room, connID string) (bool, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return false, err
	}
	if err := keys.ValidateConnectionID(connID); err != nil {
		return false, err
	}
	_, ok, err := m.n.store.Record(ctx, room, connID)
	return ok, errorFor(ctx, err)
}

// ConnectionIDs returns the ids of the connections in a room, tracked or not, in no
// particular order. [PresenceManager.Members] also returns metadata and states.
func (m *RoomManager) ConnectionIDs(ctx context.Context, room string) ([]string, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return nil, err
	}
	records, _, err := m.n.store.Some(ctx, room, -1)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	ids := make([]string, len(records))
	for i, r := range records {
		ids[i] = r.Conn
	}
	return ids, nil
}

// All returns the names of all rooms with members, in no particular order. It reads an
// index in pages. A room that gets its first member or loses its last one during the
// read may or may not be included.
func (m *RoomManager) All(ctx context.Context) ([]string, error) {
	if err := m.n.checkRunningCtx(ctx); err != nil {
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
	return rooms, errorFor(ctx, err)
}

// Of returns the rooms that a connection of any server is in, sorted. It returns
// [ErrUnknownConnection] if no server has the connection.
func (m *RoomManager) Of(ctx context.Context, connID string) ([]string, error) {
	done, err := m.n.callOwner(ctx, peers.Call{Op: peers.OpRooms, Conn: connID})
	return done.Rooms, err
}

// Clear removes all connections from a room, on all servers, each with a leave event.
// Pending joins do not take place, and the guards are asked again about every
// connection that sees the room, as by [RoomManager.Recheck]. Kept places end, too. The
// sockets get the push mesh/room-left. The room's metadata stays. A connection that
// joins again during the call may stay in.
//
// It runs until all have left or ctx ends, regardless of their number. If it fails,
// some may still be in the room. The error is a [*ProgressError], which wraps the error
// of ctx, or [ErrUnavailable] if Redis or a server did not answer for two seconds. It
// is safe to repeat.
func (m *RoomManager) Clear(ctx context.Context, room string) error {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return err
	}
	removed, err := m.n.peers.Clear(ctx, room)
	if err != nil && ctx.Err() != nil {
		err = errs.Ended(ctx)
	}
	if err == nil && m.n.hasUsers() {
		var places int
		places, err = m.n.removeKeptIn(ctx, room)
		removed += places
	}
	if err != nil {
		return &ProgressError{Done: removed, Err: err}
	}
	return nil
}

// Delete clears a room, as [RoomManager.Clear] does and with its errors, and removes its
// metadata. It does not lock the room: a connection that joins afterwards is in it.
func (m *RoomManager) Delete(ctx context.Context, room string) error {
	if err := m.Clear(ctx, room); err != nil {
		return err
	}
	return errorFor(ctx, m.n.store.DeleteRoomMeta(ctx, room))
}

// SetMetadata stores metadata for a room: any value that encodes to JSON, or nil to
// remove it. It stays until it is set again or the room is deleted, also if the room
// has no members. Concurrent merges lose nothing. Clients that may see the room can
// read it. It returns [ErrInvalidMetadata] if the value does not encode or the strategy
// is unknown, and [ErrTooLarge] beyond Limits.MetadataBytes.
func (m *RoomManager) SetMetadata(ctx context.Context, room string, metadata any, opts MetadataOptions) error {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return err
	}
	data, err := m.n.appMetadata(ctx, metadata)
	if err != nil {
		return err
	}
	_, err = m.n.setMetadata(ctx, m.n.roomPlace(room), data, opts.Strategy, nil)
	return err
}

// Metadata returns a room's metadata, or nil if it has none.
func (m *RoomManager) Metadata(ctx context.Context, room string) (json.RawMessage, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return nil, err
	}
	value, err := m.n.store.RoomMeta(ctx, room)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	return value.Data, nil
}

// Send pushes a frame {command, payload} to the sockets of all connections in a room,
// on all servers, at most once each. It returns when the frame is queued here and on
// its way to the other servers. If it returns an error, some clients may have got the
// frame. It returns [ErrInvalidCommand] if the command is one of the protocol's own
// (all that begin with "mesh/").
//
// All members get the frame, also those that a rule's Guard does not let see the room.
func (m *RoomManager) Send(ctx context.Context, room, command string, payload any) error {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return err
	}
	f, err := m.n.appFrame(ctx, command, payload)
	if err != nil {
		return err
	}
	f.Room = room
	homes, err := m.n.store.OwnersIn(ctx, room)
	if err != nil {
		return errorFor(ctx, err)
	}
	for _, inc := range homes {
		if err := m.n.peers.Send(ctx, inc, f); err != nil {
			return err
		}
	}
	return nil
}

// ProgressError is the error of a call that ended before it had dealt with all
// connections.
type ProgressError struct {
	// Done is the number of connections that the call has dealt with. A few more may
	// have been dealt with if their answers did not come in time.
	Done int
	// Err is the reason for the end. It wraps the error of the context or an error of
	// this package.
	Err error
}

// Error returns the reason and the number of connections that were dealt with.
func (e *ProgressError) Error() string {
	return fmt.Sprintf("mesh: ended after %d connections: %v", e.Done, e.Err)
}

// Unwrap returns Err.
func (e *ProgressError) Unwrap() error { return e.Err }
