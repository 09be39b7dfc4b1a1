package mesh

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/meshpresence/mesh/internal/store"
)

// ConnectionManager reads and writes what is known about connections, on
// whichever server they are. All methods are safe for concurrent use and wait
// for Redis, and for the connection's server, for at most about two seconds
// each ([ErrUnavailable]). No guard is asked: the app itself is acting.
//
// The TypeScript server's connectionManager.
type ConnectionManager struct {
	n *node
}

// MetadataOptions say how metadata is set.
type MetadataOptions struct {
	// Strategy defaults to Replace.
	Strategy Strategy
}

// SetMetadata stores metadata for a connection: any value that encodes to
// JSON, a json.RawMessage as it is; nil removes it. Guards are asked again
// with the new metadata, on the connection's own server, and members lists
// show it. Two merges at once lose nothing. Equal bytes are no change.
//
// Changes of one connection that come within 100 ms are handled together: until
// then nothing is delivered to it by subscriptions with guards, and if it is in more
// than four rooms, members lists show the last change up to 100 ms later.
//
// [ErrUnknownConnection] where no server has that connection,
// [ErrInvalidMetadata] where the value does not encode or the strategy is
// unknown, [ErrTooLarge] past Limits.MetadataBytes.
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

// Metadata returns a connection's metadata, nil where it has none. For a
// connection of this server it comes from memory. [ErrUnknownConnection] where
// no server has that connection.
//
// The TypeScript server's connectionManager.getMetadata.
func (m *ConnectionManager) Metadata(ctx context.Context, connID string) (json.RawMessage, error) {
	if err := m.check(ctx, connID); err != nil {
		return nil, err
	}
	if c, ok := m.n.owner.Conn(connID); ok {
		data, _ := c.Metadata()
		return data, nil
	}
	value, err := m.n.store.ConnMeta(ctx, connID)
	if err != nil {
		return nil, m.n.errorFor(ctx, err)
	}
	if value.Owner == "" {
		return nil, fmt.Errorf("%w: %s", ErrUnknownConnection, connID)
	}
	return value.Data, nil
}

// RoomMetadata returns the metadata of every connection in a room, tracked or
// not, by connection id; nil for those that have none. However many they are,
// it reads them all. (What is stored for the room itself:
// [RoomManager.Metadata].)
func (m *ConnectionManager) RoomMetadata(ctx context.Context, room string) (map[string]json.RawMessage, error) {
	if err := m.n.use(ctx, room); err != nil {
		return nil, err
	}
	records, _, err := m.n.store.Some(ctx, room, -1)
	if err != nil {
		return nil, m.n.errorFor(ctx, err)
	}
	out := make(map[string]json.RawMessage, len(records))
	for _, r := range records {
		out[r.Conn] = r.Meta
	}
	return out, nil
}

// Recheck asks the guards and join guards again about everything that a connection
// sees and every room that it is in, on whichever server it is. Call it after what
// the guards read has changed. (Changes of metadata and rules are noticed by
// themselves.) It does not wait for the verdicts. What they do is described at
// [RoomManager.Recheck]. [ErrUnknownConnection] if no server has it.
func (m *ConnectionManager) Recheck(ctx context.Context, connID string) error {
	_, err := m.n.callOwner(ctx, remoteCall{Op: opRecheck, Conn: connID})
	return err
}

// Close ends a connection, on whichever server it is, as
// [PresenceManager.Disconnect] does: it leaves its rooms, and a socket is closed
// with code 1000. Close does not wait until Redis has the leaves.
// [ErrUnknownConnection] if no server has it.
func (m *ConnectionManager) Close(ctx context.Context, connID string) error {
	_, err := m.n.callOwner(ctx, remoteCall{Op: opClose, Conn: connID})
	return err
}

// Send pushes a frame {command, payload} to one connection's socket, on
// whichever server it is. It returns when the frame is queued there or, for
// another server, on its way: it arrives at most once, and nothing tells
// whether it did. [ErrUnknownConnection] where no server has the connection;
// [ErrInvalidCommand] where the command is the protocol's own, as all are that
// begin with "mesh/". For a connection without a socket it does nothing.
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
	return m.n.control.send(ctx, inc, f)
}

func (m *ConnectionManager) check(ctx context.Context, connID string) error {
	if err := m.n.usableFor(ctx); err != nil {
		return err
	}
	return validateConnectionID(connID)
}

// locate returns the incarnation that has a connection.
func (n *node) locate(ctx context.Context, connID string) (string, error) {
	if err := n.usableFor(ctx); err != nil {
		return "", err
	}
	if err := validateConnectionID(connID); err != nil {
		return "", err
	}
	if _, ok := n.owner.Conn(connID); ok {
		return n.lease.Incarnation(), nil
	}
	value, err := n.store.ConnMeta(ctx, connID)
	if err != nil {
		return "", n.errorFor(ctx, err)
	}
	if value.Owner == "" || value.Owner == n.lease.Incarnation() {
		return "", fmt.Errorf("%w: %s", ErrUnknownConnection, connID)
	}
	return value.Owner, nil
}

// callOwner has the server of call.Conn carry out a call.
func (n *node) callOwner(ctx context.Context, call remoteCall) (outcome, error) {
	return n.control.call(ctx, func(ctx context.Context) (string, error) { return n.locate(ctx, call.Conn) }, call)
}

// metadataFor returns the metadata of another connection if the viewer may have it:
// the two have a room in common that the viewer has joined or watches, and that
// its guards, if the room is tracked, let the viewer see.
func (n *node) metadataFor(ctx context.Context, viewer, connID string, rooms []string) (json.RawMessage, error) {
	records, err := n.presentIn(ctx, connID, rooms)
	if err != nil {
		return nil, err
	}
	for i, r := range records {
		if r.Entry == "" {
			continue
		}
		if n.shares(ctx, viewer, rooms[i]) {
			return r.Meta, nil
		}
	}
	return nil, nil
}

// shares reports whether a viewer may see the members of a room that it has joined or
// watches. No guard is asked about a room that is not tracked, so the viewer has to
// be in it still.
func (n *node) shares(ctx context.Context, viewer, room string) bool {
	if n.rules.match(room).tracked {
		return n.maySee(ctx, viewer, room) == nil
	}
	c, ok := n.owner.Conn(viewer)
	return ok && c.In(room)
}

// presentIn returns the records of a connection in rooms, in their order; an empty
// one if it is not in.
func (n *node) presentIn(ctx context.Context, connID string, rooms []string) ([]store.Record, error) {
	c, ok := n.owner.Conn(connID)
	if !ok && len(rooms) > 0 {
		refs := make([]store.OwnedRef, len(rooms))
		for i, room := range rooms {
			refs[i] = store.OwnedRef{Room: room, Conn: connID}
		}
		records, err := n.store.Records(ctx, refs)
		return records, n.errorFor(ctx, err)
	}
	records := make([]store.Record, len(rooms))
	for i, room := range rooms {
		if c.In(room) {
			data, _ := c.Metadata()
			records[i] = store.Record{Entry: connID, Meta: data}
		}
	}
	return records, nil
}
