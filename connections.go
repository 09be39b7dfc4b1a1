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
// show it. Two merges at once lose nothing.
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

// Recheck has the guards asked again about everything that a connection sees,
// on whichever server it is: for guards that go by more than metadata and
// rules, whose changes are noticed anyway. It does not wait for their verdicts.
// [ErrUnknownConnection] where no server has it.
func (m *ConnectionManager) Recheck(ctx context.Context, connID string) error {
	_, err := m.n.callOwner(ctx, remoteCall{Op: opRecheck, Conn: connID})
	return err
}

// Close closes a connection, on whichever server it is: a socket with code
// 1000; one of an app's own transport as [PresenceManager.Disconnect] does. It
// leaves its rooms. Close does not wait for that. [ErrUnknownConnection] where
// no server has it.
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

// sees reports whether viewer may have the metadata of another connection: the
// two have a room in common that viewer has joined or watches and, where the
// room is tracked, that its guards let viewer see. It returns the metadata.
func (n *node) metadataFor(ctx context.Context, viewer, connID string, rooms []string) (json.RawMessage, error) {
	var common []string
	for _, room := range rooms {
		if !n.rules.match(room).tracked || n.maySee(ctx, viewer, room) == nil {
			common = append(common, room)
		}
	}
	if len(common) == 0 {
		return nil, nil
	}
	if c, ok := n.owner.Conn(connID); ok {
		for _, room := range common {
			if c.In(room) {
				data, _ := c.Metadata()
				return data, nil
			}
		}
		return nil, nil
	}
	var record store.Record
	record, _, err := n.store.FindIn(ctx, common, connID)
	if err != nil {
		return nil, n.errorFor(ctx, err)
	}
	return record.Meta, nil
}
