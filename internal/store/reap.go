package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Reap ends entries and states that are not the caller's, each only where its
// ground holds at that moment, and tells each once: of several callers with
// the same item one gets Ended, the others NotThere. Items are answered in
// order. On an error some may have been ended: the statuses that are known come
// with it, and 0 stands for the others. ErrClock: the clock stepped, or too much
// time has passed since the judgment.
func (s *Store) Reap(ctx context.Context, j Judgment, items []ReapItem) ([]ReapStatus, error) {
	rooms := make([]string, len(items))
	for i := range items {
		rooms[i] = items[i].Room
	}
	out := make([]ReapStatus, len(items))
	for bucket, group := range s.byBucket(rooms) {
		for part := range slices.Chunk(group, MaxOps) {
			if err := s.reapPart(ctx, j, bucket, items, part, out); err != nil {
				return out, err
			}
		}
	}
	return out, nil
}

func (s *Store) reapPart(ctx context.Context, j Judgment, bucket int, items []ReapItem, part []int, out []ReapStatus) error {
	// Those of one room follow each other: it is entered once.
	order := byRoom(len(part), func(i int) string { return items[part[i]].Room })
	var rooms, names []string
	args := make([]any, 0, 5+7*len(part))
	args = append(args, newTag(), s.keys.EventsPrefix(), j.Now, millis(j.Tolerance), "")
	for n, i := range order {
		it := &items[part[i]]
		if n == 0 || it.Room != items[part[order[n-1]]].Room {
			rooms = append(rooms, s.keys.Seq(it.Room))
			names = append(names, s.keys.Members(it.Room))
			args = append(args, "R", it.Room, flag(s.isTracked(it.Room)))
		}
		if n == 0 || it.Incarnation != items[part[order[n-1]]].Incarnation {
			names = append(names, s.keys.Owned(bucket, it.Incarnation), s.keys.Fence(bucket, it.Incarnation))
			args = append(args, "I")
		}
		names = append(names, s.keys.Conn(it.Room, it.Conn), s.keys.State(it.Room, it.Conn))
		args = append(args, string(it.Mode)+strconv.Itoa(n), it.Conn, it.Entry, strconv.FormatUint(it.StateVersion, 10))
	}
	args[4] = strconv.Itoa(len(rooms))
	keys := slices.Concat([]string{s.keys.Rooms(bucket)}, rooms, names)
	reply, err := run(ctx, s, reapScript, keys, args...)
	if err != nil {
		return err
	}
	if reply == "CLOCK" {
		return ErrClock
	}
	lines, err := texts(reply)
	if err != nil || len(lines) != len(part) {
		return fmt.Errorf("reap: %w", errFormat)
	}
	var refused error
	for i, n := range order {
		at := part[n]
		if lines[i] == "" || lines[i][0] == '!' {
			refused = refusal(strings.TrimPrefix(lines[i], "! "))
			if !aboutData(lines[i]) {
				s.unwell(bucket, false)
			}
			continue
		}
		out[at] = ReapStatus(lines[i][0])
		if out[at] == Ended {
			s.reaped.count(items[at].Mode)
		}
	}
	return refused
}

// Lapsed returns which of a room's connections have no per-connection key, in
// the given order. Those of entries without a TTL never have one.
func (s *Store) Lapsed(ctx context.Context, room string, conns []string) ([]string, error) {
	var lapsed []string
	for part := range slices.Chunk(conns, MaxOps) {
		found, err := read(ctx, s, s.keys.Members(room), func(ctx context.Context) ([]*redis.IntCmd, error) {
			pipe := s.client.Pipeline()
			cmds := make([]*redis.IntCmd, len(part))
			for i, conn := range part {
				cmds[i] = pipe.Exists(ctx, s.keys.Conn(room, conn))
			}
			_, err := pipe.Exec(ctx)
			return cmds, err
		})
		if err != nil {
			return nil, err
		}
		for i, cmd := range found {
			if cmd.Val() == 0 {
				lapsed = append(lapsed, part[i])
			}
		}
	}
	return lapsed, nil
}

// OwnedPage reads part of an incarnation's index; cursor and next as in SCAN.
func (s *Store) OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) (refs []OwnedRef, next uint64, err error) {
	names, next, err := s.setPage(ctx, s.keys.Owned(bucket, inc), cursor)
	if err != nil {
		return nil, 0, err
	}
	refs = make([]OwnedRef, 0, len(names))
	for _, name := range names {
		ref, err := decodeOwned(name)
		if err != nil {
			return nil, 0, err
		}
		refs = append(refs, ref)
	}
	return refs, next, nil
}

// OwnedSize returns how many entries and connections an incarnation's index holds.
func (s *Store) OwnedSize(ctx context.Context, bucket int, inc string) (int64, error) {
	key := s.keys.Owned(bucket, inc)
	return read(ctx, s, key, func(ctx context.Context) (int64, error) {
		return s.client.SCard(ctx, key).Result()
	})
}

// ForgetConnections takes connections off the index of a dead incarnation,
// with their metadata where no other server has taken them over.
func (s *Store) ForgetConnections(ctx context.Context, bucket int, inc string, conns []string) error {
	for part := range slices.Chunk(conns, MaxOps) {
		keys := []string{s.keys.Owned(bucket, inc)}
		args := []any{inc}
		for _, c := range part {
			keys = append(keys, s.keys.ConnMeta(c))
			args = append(args, c)
		}
		if _, err := run(ctx, s, forgetScript, keys, args...); err != nil {
			return err
		}
	}
	return nil
}
