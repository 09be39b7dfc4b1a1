package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/peers"
	"github.com/meshpresence/mesh/internal/store"
)

// ConnectionManager reads and changes connections on any server of the group. All
// methods are safe for concurrent use, and wait for at most about two seconds for Redis
// and for the connection's server ([ErrUnavailable]). No guard is asked, because the
// app itself is acting.
//
// The TypeScript server's connectionManager.
type ConnectionManager struct {
	n *core
}

// SetMetadata stores metadata for a connection: any value that encodes to JSON (a
// json.RawMessage is stored as it is), or nil to remove it. Guards are asked again with
// the new metadata on the connection's own server, and lists of members show it.
// Concurrent merges lose nothing. If the bytes are equal, nothing changes.
//
// Changes of one connection within 100 ms are handled together. Until then its
// subscriptions with guards deliver nothing, and if it is in more than four rooms,
// lists of members show the last change up to 100 ms later.
//
// It returns [ErrUnknownConnection] if no server has the connection,
// [ErrInvalidMetadata] if the value does not encode or the strategy is unknown, and
// [ErrTooLarge] beyond Limits.MetadataBytes.
//
// The TypeScript server's connectionManager.setMetadata.
func (m *ConnectionManager) SetMetadata(ctx context.Context, connID string, metadata any, opts MetadataOptions) error {
	if err := m.check(ctx, connID); err != nil {
		return err
	}
	data, err := m.n.appMetadata(ctx, metadata)
	if err != nil {
		return err
	}
	return m.n.setConnMetadata(ctx, connID, data, opts.Strategy, nil)
}

// Metadata returns a connection's metadata, or nil if it has none. For a connection of
// this server it comes from memory. It returns [ErrUnknownConnection] if no server has
// the connection.
//
// The TypeScript server's connectionManager.getMetadata.
func (m *ConnectionManager) Metadata(ctx context.Context, connID string) (json.RawMessage, error) {
	if err := m.check(ctx, connID); err != nil {
		return nil, err
	}
	if c, ok := m.n.local.Conn(connID); ok {
		data, _ := c.Metadata()
		return data, nil
	}
	value, err := m.n.store.ConnMeta(ctx, connID)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	if value.Owner == "" {
		return nil, fmt.Errorf("%w: %s", ErrUnknownConnection, connID)
	}
	return value.Data, nil
}

// RoomMetadata returns the metadata of every connection in a room, tracked or not, by
// connection id. The value is nil for a connection without metadata. The number of
// connections is not limited. [RoomManager.Metadata] returns the metadata of the room
// itself.
func (m *ConnectionManager) RoomMetadata(ctx context.Context, room string) (map[string]json.RawMessage, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return nil, err
	}
	records, _, err := m.n.store.Some(ctx, room, -1)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	out := make(map[string]json.RawMessage, len(records))
	for _, r := range records {
		out[r.Conn] = r.Meta
	}
	return out, nil
}

// Recheck asks the guards and join guards again about every room that a connection of
// any server sees or is in. Call it after data that the guards read has changed.
// (Changes of metadata and rules are detected automatically.) It does not wait for the
// answers. [RoomManager.Recheck] describes their effect. It returns
// [ErrUnknownConnection] if no server has the connection.
func (m *ConnectionManager) Recheck(ctx context.Context, connID string) error {
	_, err := m.n.callOwner(ctx, peers.Call{Op: peers.OpRecheck, Conn: connID})
	return err
}

// Close ends a connection on any server: it leaves its rooms at once, whatever their
// Grace, and a socket is closed with code 1000. Close does not wait until
// Redis has the leaves. It returns [ErrUnknownConnection] if no server has the
// connection.
func (m *ConnectionManager) Close(ctx context.Context, connID string) error {
	_, err := m.n.callOwner(ctx, peers.Call{Op: peers.OpClose, Conn: connID})
	return err
}

// Send pushes a frame {command, payload} to the socket of one connection on any server.
// It returns when the frame is queued there or, for another server, on its way. The
// frame arrives at most once, without a confirmation. It returns [ErrUnknownConnection]
// if no server has the connection, and [ErrInvalidCommand] if the command is one of the
// protocol's own (all that begin with "mesh/"). It does nothing for a connection
// without a socket.
func (m *ConnectionManager) Send(ctx context.Context, connID, command string, payload any) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	f, err := m.n.appFrame(ctx, command, payload)
	if err != nil {
		return err
	}
	inc, err := m.n.locate(ctx, connID)
	if err != nil {
		return err
	}
	f.Conn = connID
	return m.n.peers.Send(ctx, inc, f)
}

func (m *ConnectionManager) check(ctx context.Context, connID string) error {
	if err := m.n.checkRunningCtx(ctx); err != nil {
		return err
	}
	return keys.ValidateConnectionID(connID)
}

// ConnectionInfo describes one connection, for operators: its server and its rooms.
type ConnectionInfo struct {
	ID string
	// Server is the Incarnation of the server that owns the connection.
	// [Server.Servers] lists the name of that server.
	Server string
	// Self reports whether it is the server that was asked.
	Self     bool
	Metadata json.RawMessage // nil if there is none
	Rooms    []RoomEntry     // sorted by name
}

// RoomEntry is a room of a connection.
type RoomEntry struct {
	Room string
	// Entry is the entry in Redis. Its ID is empty if Redis has none: the join is not
	// written yet, or Redis has lost it.
	Entry Entry
}

// Find returns information about a connection on any server. The server and the entries
// come from Redis, and the list of rooms from the server that owns the connection. No
// guard is asked, because the app itself is asking. It reads from masters, writes
// nothing, and takes at most two seconds.
//
// It returns [ErrUnknownConnection] if no server has the connection, and
// [ErrInvalidConnectionID] if no connection can have that id. With [ErrUnavailable] the
// info is partial. For a connection of this server, the entries are missing if Redis
// does not answer. For a connection of another server, only the server and the metadata
// are set if that server does not answer. The ID is empty if nothing is known.
func (m *ConnectionManager) Find(ctx context.Context, connID string) (ConnectionInfo, error) {
	if err := m.check(ctx, connID); err != nil {
		return ConnectionInfo{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	info, rooms, err := m.n.find(ctx, connID)
	if err != nil {
		return info, err
	}
	slices.Sort(rooms)
	info.Rooms = make([]RoomEntry, len(rooms))
	refs := make([]store.EntryRef, len(rooms))
	for i, room := range rooms {
		info.Rooms[i].Room = room
		refs[i] = store.EntryRef{Room: room, Conn: connID}
	}
	for at := 0; at < len(refs); at += maxFound {
		records, err := m.n.store.Records(ctx, refs[at:min(at+maxFound, len(refs))])
		if err != nil {
			return info, errorFor(ctx, err)
		}
		for i := range records {
			if records[i].Entry != "" {
				info.Rooms[at+i].Entry = entryOf(&records[i])
			}
		}
	}
	return info, nil
}

// maxFound limits the entries that one round trip of Find reads.
const maxFound = 256

// find returns the server of a connection, its metadata and its rooms.
func (n *core) find(ctx context.Context, connID string) (ConnectionInfo, []string, error) {
	if c, ok := n.local.Conn(connID); ok {
		data, _ := c.Metadata()
		return ConnectionInfo{ID: connID, Server: n.lease.Incarnation(), Self: true, Metadata: data}, c.Rooms(), nil
	}
	value, err := n.store.ConnMeta(ctx, connID)
	if err != nil {
		return ConnectionInfo{}, nil, errorFor(ctx, err)
	}
	if value.Owner == "" || value.Owner == n.lease.Incarnation() {
		return ConnectionInfo{}, nil, fmt.Errorf("%w: %s", ErrUnknownConnection, connID)
	}
	info := ConnectionInfo{ID: connID, Server: value.Owner, Metadata: value.Data}
	done, err := n.peers.Call(ctx, peers.At(value.Owner), peers.Call{Op: peers.OpRooms, Conn: connID})
	if errors.Is(err, ErrUnknownConnection) { // the connection has just ended
		return ConnectionInfo{}, nil, err
	}
	return info, done.Rooms, err
}
