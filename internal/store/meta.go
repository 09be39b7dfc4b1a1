package store

import (
	"context"
	"fmt"

	"github.com/redis/go-redis/v9"
)

// ConnMeta reads a connection's metadata and owner. It returns the zero MetaValue if
// the connection is unknown.
func (s *Store) ConnMeta(ctx context.Context, conn string) (MetaValue, error) {
	return s.readMeta(ctx, s.keys.ConnMeta(conn))
}

// RoomMeta reads a room's metadata.
func (s *Store) RoomMeta(ctx context.Context, room string) (MetaValue, error) {
	return s.readMeta(ctx, s.keys.RoomMeta(room))
}

// ConnMetas reads the metadata of many connections in one round trip, in the given
// order.
func (s *Store) ConnMetas(ctx context.Context, conns []string) ([]MetaValue, error) {
	keys := make([]string, len(conns))
	for i, c := range conns {
		keys[i] = s.keys.ConnMeta(c)
	}
	return s.readMetas(ctx, keys)
}

func (s *Store) readMeta(ctx context.Context, key string) (MetaValue, error) {
	values, err := s.readMetas(ctx, []string{key})
	if err != nil {
		return MetaValue{}, err
	}
	return values[0], nil
}

func (s *Store) readMetas(ctx context.Context, keys []string) ([]MetaValue, error) {
	rows, err := call(ctx, s, func(ctx context.Context) ([][]any, error) {
		pipe := s.client.Pipeline()
		cmds := make([]*redis.SliceCmd, len(keys))
		for i, key := range keys {
			cmds[i] = pipe.HMGet(ctx, key, "v", "d", "o")
		}
		if _, err := pipe.Exec(ctx); err != nil {
			return nil, err
		}
		rows := make([][]any, len(keys))
		for i, c := range cmds {
			rows[i] = c.Val()
		}
		return rows, nil
	})
	if err != nil {
		return nil, err
	}
	out := make([]MetaValue, len(rows))
	for i, row := range rows {
		f, err := texts(row)
		if err != nil || len(f) != 3 {
			return nil, fmt.Errorf("metadata: %w", errFormat)
		}
		if out[i], err = decodeMeta(f[0], f[1], f[2]); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func decodeMeta(version, data, owner string) (MetaValue, error) {
	var p parser
	m := MetaValue{Owner: owner}
	if version != "" {
		m.Version = p.uint(version)
	}
	if data != "" {
		m.Data = []byte(data)
	}
	return m, p.err
}

// SetConnMeta writes a connection's metadata if it still has the given version, and
// sends it to the connection's owner. If the version differs, ok is false and now is
// the current value. If the connection is unknown, ok is false and now is the zero
// MetaValue.
//
// The new version is also higher than known. If the caller is the owner, known is its
// own version: Redis may have gone back to an earlier one, and the new value must not
// look older than the owner's.
func (s *Store) SetConnMeta(ctx context.Context, conn string, version, known uint64, data []byte) (now MetaValue, ok bool, err error) {
	return s.setMeta(ctx, s.keys.ConnMeta(conn), version, known, data, "1", conn)
}

// SetRoomMeta writes a room's metadata if it still has the given version. See
// SetConnMeta for the results.
func (s *Store) SetRoomMeta(ctx context.Context, room string, version uint64, data []byte) (now MetaValue, ok bool, err error) {
	return s.setMeta(ctx, s.keys.RoomMeta(room), version, 0, data, "0", "")
}

// DeleteRoomMeta deletes a room's metadata.
func (s *Store) DeleteRoomMeta(ctx context.Context, room string) error {
	_, err := call(ctx, s, func(ctx context.Context) (int64, error) { return s.client.Del(ctx, s.keys.RoomMeta(room)).Result() })
	return err
}

func (s *Store) setMeta(ctx context.Context, key string, version, known uint64, data []byte, owned, conn string) (MetaValue, bool, error) {
	reply, err := runIn(ctx, s, s.at(key).read(), metaScript, []string{key}, version, data, owned, s.keys.ServerChannel(""), conn, newTag(), known)
	if err != nil {
		return MetaValue{}, false, err
	}
	f, err := texts(reply)
	if err != nil || len(f) == 0 {
		return MetaValue{}, false, fmt.Errorf("metadata: %w", errFormat)
	}
	switch {
	case f[0] == "+" && len(f) == 3:
		m, err := decodeMeta(f[1], string(data), f[2])
		return m, err == nil, err
	case f[0] == "x" && len(f) == 4:
		m, err := decodeMeta(f[1], f[2], f[3])
		return m, false, err
	}
	return MetaValue{}, false, nil
}
