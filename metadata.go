package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/meshpresence/mesh/internal/encode"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Strategy decides how new metadata is combined with the existing metadata.
type Strategy string

// The strategies. If either side is not an object, all of them replace.
const (
	// Replace drops the existing metadata. It is the default.
	Replace Strategy = Strategy(wire.StrategyReplace)
	// Merge replaces the given fields and keeps the others.
	Merge Strategy = Strategy(wire.StrategyMerge)
	// DeepMerge merges nested objects, too. Arrays are replaced.
	DeepMerge Strategy = Strategy(wire.StrategyDeepMerge)
)

// MetadataOptions are the options of a change of metadata.
type MetadataOptions struct {
	// Strategy defaults to Replace.
	Strategy Strategy
}

// mergeTries is the number of attempts of a merge. An attempt fails only if another
// caller was faster, so that many failures in a row mean that something is wrong.
const mergeTries = 64

// metaPlace is a place in which metadata is stored, with compare-and-set.
type metaPlace struct {
	read  func(context.Context) (store.MetaValue, error)
	write func(ctx context.Context, version uint64, data []byte) (now store.MetaValue, ok bool, err error)
	// known means that a value without an owner does not exist, as for connections.
	known bool
	// stands reports whether Redis holds the value under that version. It is nil if
	// read asks Redis anyway.
	stands func(ctx context.Context, version uint64) (bool, error)
}

// encodeMetadata checks and encodes metadata. nil means none.
func (n *core) encodeMetadata(value any) (json.RawMessage, error) {
	data, err := encode.JSON(value)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidMetadata, err)
	}
	return data, n.checkMetadata(data)
}

// appMetadata is encodeMetadata for a value that the app passed to a method.
func (n *core) appMetadata(ctx context.Context, value any) (json.RawMessage, error) {
	return n.encoder().Encode(ctx, value, ErrInvalidMetadata, n.encodeMetadata)
}

func (n *core) checkMetadata(data json.RawMessage) error {
	if over(len(data), n.opts.Limits.MetadataBytes) {
		return fmt.Errorf("%w: metadata of %d bytes, limit %d", ErrTooLarge, len(data), n.opts.Limits.MetadataBytes)
	}
	return nil
}

// setMetadata merges change into the metadata of a place. It writes only if the value
// has not been written since it was read, so that concurrent merges lose nothing.
// approve (if not nil) gets the new value and may change or refuse it. If the bytes are
// equal, nothing is written and the version stays.
func (n *core) setMetadata(ctx context.Context, at metaPlace, change json.RawMessage, strategy Strategy,
	approve func(current, proposed json.RawMessage) (json.RawMessage, error),
) (store.MetaValue, error) {
	now, err := at.read(ctx)
	if err != nil {
		return now, errorFor(ctx, err)
	}
	for range mergeTries {
		if at.known && now.Owner == "" {
			return now, ErrUnknownConnection
		}
		data, err := n.merged(now.Data, change, strategy)
		if err == nil && approve != nil {
			data, err = approve(now.Data, data)
		}
		if err != nil {
			return now, err
		}
		same, err := at.same(ctx, now, data)
		if err != nil || same {
			return now, errorFor(ctx, err)
		}
		var ok bool
		if now, ok, err = at.write(ctx, now.Version, data); err != nil {
			return now, errorFor(ctx, err)
		}
		if ok {
			now.Data = data
			return now, nil
		}
	}
	return now, ErrConflict
}

// same reports whether the place already holds data. A value from memory may be older
// than the value in Redis, so stands is asked, too.
func (at *metaPlace) same(ctx context.Context, now store.MetaValue, data []byte) (bool, error) {
	if !bytes.Equal(now.Data, data) || (now.Data == nil) != (data == nil) {
		return false, nil
	}
	if at.stands == nil {
		return true, nil
	}
	return at.stands(ctx, now.Version)
}

// merged returns the result of merging change into current.
func (n *core) merged(current, change json.RawMessage, strategy Strategy) (json.RawMessage, error) {
	if change == nil {
		change = json.RawMessage("null") // not an object, so that every strategy removes the existing value
	}
	merged, err := wire.MergeMetadata(current, change, wire.Strategy(strategy))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidMetadata, err)
	}
	if string(merged) == "null" {
		merged = nil
	}
	return merged, n.checkMetadata(merged)
}

// connPlace returns the place of the metadata of a connection on any server.
func (n *core) connPlace(conn string) metaPlace {
	return metaPlace{
		known: true,
		read: func(ctx context.Context) (store.MetaValue, error) {
			// Memory first. If another caller was faster, the write fails and is
			// repeated.
			if c, ok := n.local.Conn(conn); ok {
				data, version := c.Metadata()
				return store.MetaValue{Version: version, Data: data, Owner: n.lease.Incarnation()}, nil
			}
			return n.store.ConnMeta(ctx, conn)
		},
		stands: func(ctx context.Context, version uint64) (bool, error) {
			if _, ok := n.local.Conn(conn); !ok {
				return true, nil // read has just asked Redis
			}
			value, err := n.store.ConnMeta(ctx, conn)
			return value.Owner != "" && value.Version == version, err
		},
		write: func(ctx context.Context, version uint64, data []byte) (store.MetaValue, bool, error) {
			known := uint64(0)
			if c, ok := n.local.Conn(conn); ok {
				_, known = c.Metadata()
			}
			return n.store.SetConnMeta(ctx, conn, version, known, data)
		},
	}
}

// roomPlace returns the place of the metadata of a room.
func (n *core) roomPlace(room string) metaPlace {
	return metaPlace{
		read: func(ctx context.Context) (store.MetaValue, error) { return n.store.RoomMeta(ctx, room) },
		write: func(ctx context.Context, version uint64, data []byte) (store.MetaValue, bool, error) {
			return n.store.SetRoomMeta(ctx, room, version, data)
		},
	}
}

// setConnMetadata sets a connection's metadata. For a connection of this server it also
// waits until its entries have been rewritten, unless they were rewritten just before
// (see local.Conn.Flush). If the connection is on another server, that server gets a
// message and rewrites them.
func (n *core) setConnMetadata(ctx context.Context, conn string, change json.RawMessage, strategy Strategy,
	approve func(current, proposed json.RawMessage) (json.RawMessage, error),
) error {
	local, mine := n.local.Conn(conn)
	if mine {
		if err := local.Registered(ctx); err != nil {
			return errorFor(ctx, err)
		}
	}
	now, err := n.setMetadata(ctx, n.connPlace(conn), change, strategy, approve)
	if err == ErrUnknownConnection { //nolint:errorlint // the bare error lacks the id
		return fmt.Errorf("%w: %s", err, conn)
	}
	if err != nil || !mine {
		return err
	}
	local.SetMeta(now.Version, now.Data)
	return errorFor(ctx, local.Flush(ctx))
}

// metadataFor returns the metadata of another connection if the viewer may have it: the
// two have a room in common that the viewer has joined or watches, and the guards of that
// room, if it is tracked, let the viewer see it.
func (n *core) metadataFor(ctx context.Context, viewer, connID string, rooms []string) (json.RawMessage, error) {
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
// watches. No guard is asked about an untracked room, so the viewer must still be in
// it.
func (n *core) shares(ctx context.Context, viewer, room string) bool {
	if n.access.rules.Match(room).Tracked {
		return n.access.Check(ctx, viewer, room) == nil
	}
	c, ok := n.local.Conn(viewer)
	return ok && c.In(room)
}

// presentIn returns the records of a connection in rooms, in their order. The record is
// empty for a room that the connection is not in.
func (n *core) presentIn(ctx context.Context, connID string, rooms []string) ([]store.Record, error) {
	c, ok := n.local.Conn(connID)
	if !ok && len(rooms) > 0 {
		refs := make([]store.EntryRef, len(rooms))
		for i, room := range rooms {
			refs[i] = store.EntryRef{Room: room, Conn: connID}
		}
		records, err := n.store.Records(ctx, refs)
		return records, errorFor(ctx, err)
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
