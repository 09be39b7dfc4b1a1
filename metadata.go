package mesh

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// Strategy says how new metadata goes together with what is there.
type Strategy string

// The strategies. Where either side is not an object, all of them replace.
const (
	// Replace drops what was there. It is the default.
	Replace Strategy = Strategy(wire.StrategyReplace)
	// Merge replaces the fields that are given and keeps the others.
	Merge Strategy = Strategy(wire.StrategyMerge)
	// DeepMerge does so within nested objects too; arrays are replaced.
	DeepMerge Strategy = Strategy(wire.StrategyDeepMerge)
)

// mergeTries is how often a merge is made anew because somebody else was
// faster. Each time somebody has got on, so this many in a row means trouble.
const mergeTries = 64

// metaPlace is where metadata stands, with compare-and-set.
type metaPlace struct {
	read  func(context.Context) (store.MetaValue, error)
	write func(ctx context.Context, version uint64, data []byte) (now store.MetaValue, ok bool, err error)
	// known says that a value without an owner is none: connections have one.
	known bool
	// stands reports whether Redis holds the value under that version. Nil: read
	// has asked Redis.
	stands func(ctx context.Context, version uint64) (bool, error)
}

// encodeMetadata checks and encodes metadata; nil is none.
func (n *node) encodeMetadata(value any) (json.RawMessage, error) {
	data, err := encodeJSON(value)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidMetadata, err)
	}
	return data, n.checkMetadata(data)
}

// appMetadata is encodeMetadata for a value that the app gave to a method.
func (n *node) appMetadata(ctx context.Context, value any) (json.RawMessage, error) {
	return n.encodeFor(ctx, value, ErrInvalidMetadata, n.encodeMetadata)
}

func (n *node) checkMetadata(data json.RawMessage) error {
	if over(len(data), n.opts.Limits.MetadataBytes) {
		return fmt.Errorf("%w: metadata of %d bytes, limit %d", ErrTooLarge, len(data), n.opts.Limits.MetadataBytes)
	}
	return nil
}

// setMetadata brings change into a place, by merging here and writing only if the
// value has not been written since it was read: two merges at once lose nothing.
// approve (nil: everything) sees the new value and may change or refuse it. Equal
// bytes are no change: nothing is written and the version stays.
func (n *node) setMetadata(ctx context.Context, at metaPlace, change json.RawMessage, strategy Strategy,
	approve func(current, proposed json.RawMessage) (json.RawMessage, error),
) (store.MetaValue, error) {
	now, err := at.read(ctx)
	if err != nil {
		return now, n.errorFor(ctx, err)
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
			return now, n.errorFor(ctx, err)
		}
		var ok bool
		if now, ok, err = at.write(ctx, now.Version, data); err != nil {
			return now, n.errorFor(ctx, err)
		}
		if ok {
			now.Data = data
			return now, nil
		}
	}
	return now, ErrConflict
}

// same reports whether the place already holds data. A value from memory may be
// older than that of Redis.
func (at *metaPlace) same(ctx context.Context, now store.MetaValue, data []byte) (bool, error) {
	if !bytes.Equal(now.Data, data) || (now.Data == nil) != (data == nil) {
		return false, nil
	}
	if at.stands == nil {
		return true, nil
	}
	return at.stands(ctx, now.Version)
}

// merged returns what current and change make together.
func (n *node) merged(current, change json.RawMessage, strategy Strategy) (json.RawMessage, error) {
	if change == nil {
		change = json.RawMessage("null") // which is no object, so that every strategy removes what is there
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

// connPlace is the metadata of a connection, wherever it is.
func (n *node) connPlace(conn string) metaPlace {
	return metaPlace{
		known: true,
		read: func(ctx context.Context) (store.MetaValue, error) {
			// Memory first: if another caller was faster, the write says so.
			if c, ok := n.owner.Conn(conn); ok {
				data, version := c.Metadata()
				return store.MetaValue{Version: version, Data: data, Owner: n.lease.Incarnation()}, nil
			}
			return n.store.ConnMeta(ctx, conn)
		},
		stands: func(ctx context.Context, version uint64) (bool, error) {
			if _, ok := n.owner.Conn(conn); !ok {
				return true, nil // it was read from Redis just now
			}
			value, err := n.store.ConnMeta(ctx, conn)
			return value.Owner != "" && value.Version == version, err
		},
		write: func(ctx context.Context, version uint64, data []byte) (store.MetaValue, bool, error) {
			known := uint64(0)
			if c, ok := n.owner.Conn(conn); ok {
				_, known = c.Metadata()
			}
			return n.store.SetConnMeta(ctx, conn, version, known, data)
		},
	}
}

// roomPlace is the metadata of a room.
func (n *node) roomPlace(room string) metaPlace {
	return metaPlace{
		read: func(ctx context.Context) (store.MetaValue, error) { return n.store.RoomMeta(ctx, room) },
		write: func(ctx context.Context, version uint64, data []byte) (store.MetaValue, bool, error) {
			return n.store.SetRoomMeta(ctx, room, version, data)
		},
	}
}

// setConnMetadata sets a connection's metadata. For one of this server it returns
// when its entries in rooms have been rewritten, too, unless they were rewritten
// just before (see owner.Conn.Flush). If the connection is on another server, that
// server gets a message and rewrites them.
func (n *node) setConnMetadata(ctx context.Context, conn string, change json.RawMessage, strategy Strategy,
	approve func(current, proposed json.RawMessage) (json.RawMessage, error),
) error {
	local, mine := n.owner.Conn(conn)
	if mine {
		if err := local.Registered(ctx); err != nil {
			return n.errorFor(ctx, err)
		}
	}
	now, err := n.setMetadata(ctx, n.connPlace(conn), change, strategy, approve)
	if err == ErrUnknownConnection {
		return fmt.Errorf("%w: %s", err, conn)
	}
	if err != nil || !mine {
		return err
	}
	local.SetMeta(now.Version, now.Data)
	return n.errorFor(ctx, local.Flush(ctx))
}
