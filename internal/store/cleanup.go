package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// CleanUp ends entries and states of other owners. It ends an item only if the item's
// ground holds at that moment, and publishes each end once: if several callers name the
// same item, one gets Ended and the others get NotThere. The statuses are in the order
// of the items. If CleanUp fails, some items may have been ended. Then the known
// statuses are returned with the error, and the unknown ones are 0. CleanUp sets
// KeptUntil in the items.
//
// The error is ErrClock if the clock of Redis stepped, or if the proof is too old.
func (s *Store) CleanUp(ctx context.Context, proof ClockProof, items []CleanUpItem) ([]CleanUpStatus, error) {
	rooms := make([]string, len(items))
	for i := range items {
		rooms[i] = items[i].Room
	}
	out := make([]CleanUpStatus, len(items))
	err := s.eachPart(rooms, MaxOps, func(bucket int, part []int) error {
		return s.cleanUpPart(ctx, proof, bucket, items, part, out)
	})
	return out, err
}

func (s *Store) cleanUpPart(ctx context.Context, proof ClockProof, bucket int, items []CleanUpItem, part []int, out []CleanUpStatus) error {
	// The items of a room are sent together, so that the script enters each room once.
	sent := byRoom(len(part), func(i int) string { return items[part[i]].Room })
	for i, n := range sent {
		sent[i] = part[n]
	}
	again, refused, err := s.cleanUpOnce(ctx, proof, bucket, items, sent, out, s.users)
	if err == nil && len(again) > 0 {
		var more error
		again, more, err = s.cleanUpOnce(ctx, proof, bucket, items, again, out, true)
		refused = errors.Join(refused, more)
		if err == nil && len(again) > 0 {
			err = fmt.Errorf("clean up: %w", errFormat)
		}
	}
	return errors.Join(err, refused)
}

// cleanUpOnce makes one call for the items at the given indexes. It returns those that
// have to be sent again with the keys of users, and the refusal of an item.
func (s *Store) cleanUpOnce(ctx context.Context, proof ClockProof, bucket int, items []CleanUpItem, sent []int, out []CleanUpStatus, users bool) (again []int, refused, err error) {
	keys, args := s.cleanUpCall(proof, bucket, items, sent, users)
	reply, err := run(ctx, s, cleanUpScript, keys, args...)
	if err != nil {
		return nil, nil, err
	}
	if reply == "CLOCK" {
		return nil, nil, ErrClock
	}
	lines, err := texts(reply)
	if err != nil || len(lines) != len(sent) {
		return nil, nil, fmt.Errorf("clean up: %w", errFormat)
	}
	for i, at := range sent {
		switch {
		case lines[i] == "" || lines[i][0] == '!':
			refused = refusal(strings.TrimPrefix(lines[i], "! "))
			if !aboutData(lines[i]) {
				s.noteUnhealthy(bucket, false)
			}
		case lines[i] == "n":
			again = append(again, at)
		default:
			out[at] = CleanUpStatus(lines[i][0])
			if _, until, ok := strings.Cut(lines[i], " "); ok {
				var p parser
				items[at].KeptUntil = p.int(until)
				err = errors.Join(err, p.err)
			}
			if out[at] == Ended {
				s.cleanedUp.count(items[at].Mode)
			}
		}
	}
	return again, refused, err
}

// needsUsers reports whether the ground is about kept places.
func (g CleanUpGround) needsUsers() bool { return g == GroundGraceOver || g == GroundRemoved }

// cleanUpCall returns the KEYS and ARGV for the items at the given indexes. users: the
// call names the keys of users for every room.
func (s *Store) cleanUpCall(proof ClockProof, bucket int, items []CleanUpItem, sent []int, users bool) ([]string, []any) {
	var rooms, names []string
	numbered := make(map[string]bool)
	for _, at := range sent {
		if users || items[at].Mode.needsUsers() {
			numbered[items[at].Room] = true
		}
	}
	args := make([]any, 0, 5+8*len(sent))
	args = append(args, newTag(), s.keys.EventsPrefix(), proof.Now, millis(proof.Tolerance), "")
	for n, at := range sent {
		it := &items[at]
		if n == 0 || it.Room != items[sent[n-1]].Room {
			rooms = append(rooms, s.keys.Seq(it.Room))
			names = append(names, s.keys.Members(it.Room))
			kind := "R"
			if numbered[it.Room] {
				kind = "N"
				names = append(names, s.keys.Users(it.Room), s.keys.Kept(bucket), s.keys.Recount(it.Room))
			}
			args = append(args, kind, it.Room, flag(s.isTracked(it.Room)))
		}
		if n == 0 || it.Incarnation != items[sent[n-1]].Incarnation || it.Since != items[sent[n-1]].Since {
			names = append(names, s.keys.Owned(bucket, it.Incarnation), s.keys.Fence(bucket, it.Incarnation))
			args = append(args, "I", it.Since)
		}
		names = append(names, s.keys.Conn(it.Room, it.Conn), s.keys.State(it.Room, it.Conn))
		args = append(args, string(it.Mode)+strconv.Itoa(n), it.Conn, it.Entry, strconv.FormatUint(it.StateVersion, 10))
	}
	args[4] = strconv.Itoa(len(rooms))
	return slices.Concat([]string{s.keys.Rooms(bucket)}, rooms, names), args
}

// Lapsed returns the connections of a room that have no per-connection key, in the
// order given. Entries without a TTL never have one.
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

// OwnedPage reads a part of an incarnation's index. cursor and next are those of SSCAN.
func (s *Store) OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) (refs []EntryRef, next uint64, err error) {
	names, next, err := s.setPage(ctx, s.keys.Owned(bucket, inc), cursor)
	if err != nil {
		return nil, 0, err
	}
	refs = make([]EntryRef, 0, len(names))
	for _, name := range names {
		ref, err := decodeOwned(name)
		if err != nil {
			return nil, 0, err
		}
		refs = append(refs, ref)
	}
	return refs, next, nil
}

// OwnedSize returns the number of entries and connections in an incarnation's index.
func (s *Store) OwnedSize(ctx context.Context, bucket int, inc string) (int64, error) {
	key := s.keys.Owned(bucket, inc)
	return read(ctx, s, key, func(ctx context.Context) (int64, error) {
		return s.client.SCard(ctx, key).Result()
	})
}

// ForgetConnections removes connections from the index of a dead incarnation. It
// deletes their metadata unless another server has registered the connection since.
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
