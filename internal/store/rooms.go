package store

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/redis/go-redis/v9"
)

const (
	// PageSize is the maximum number of members of a room that one call reads.
	PageSize = 500
	// positionsPerCall limits one call of Positions.
	positionsPerCall = 256
)

// Snapshot reads a whole room. A room of at most PageSize members is read in one
// moment, a larger one in pages.
func (s *Store) Snapshot(ctx context.Context, room string) (Snapshot, error) {
	h, err := s.head(ctx, room, PageSize)
	snap := Snapshot{Position: h.pos, Records: h.records, Numbers: h.numbers, Incomplete: h.incomplete}
	if err != nil || h.total <= PageSize {
		return snap, err
	}
	snap.Paged = true
	byConn := make(map[string]Record, h.total)
	err = s.scan(ctx, room, 0, func(r Record) bool {
		if r.Seq >= byConn[r.Conn].Seq {
			byConn[r.Conn] = r
		}
		return true
	})
	if err != nil {
		return Snapshot{}, err
	}
	snap.Records = make([]Record, 0, len(byConn))
	for _, r := range byConn {
		snap.Records = append(snap.Records, r)
	}
	return snap, nil
}

// page is a part of a room. next is the cursor of the following page, 0 after the last.
type page struct {
	pairs []string
	next  uint64
}

// scan reads a room page by page, from a cursor on, until f returns false. Records that
// exist all the time come at least once.
func (s *Store) scan(ctx context.Context, room string, cursor uint64, f func(Record) bool) error {
	key := s.keys.Members(room)
	for {
		p, err := read(ctx, s, key, func(ctx context.Context) (page, error) {
			pairs, next, err := s.client.HScan(ctx, key, cursor, "", PageSize).Result()
			return page{pairs, next}, err
		})
		if err != nil {
			return err
		}
		more, err := p.each(f)
		if cursor = p.next; err != nil || !more || cursor == 0 {
			return err
		}
	}
}

// each calls f with the records of the page until f returns false. more is false if f
// did.
func (p page) each(f func(Record) bool) (more bool, err error) {
	records, err := decodePairs(p.pairs)
	if err != nil {
		return false, err
	}
	for _, r := range records {
		if !f(r) {
			return false, nil
		}
	}
	return true, nil
}

func decodePairs(pairs []string) ([]Record, error) {
	records := make([]Record, 0, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		r, err := DecodeRecord(pairs[i], pairs[i+1])
		if err != nil {
			return nil, err
		}
		records = append(records, r)
	}
	return records, nil
}

// Some reads at most limit members of a room (limit < 0: all of them) and their total
// number. It reads not many more members than it returns, and usually needs one round
// trip.
func (s *Store) Some(ctx context.Context, room string, limit int) ([]Record, int, error) {
	if limit < 0 {
		snap, err := s.Snapshot(ctx, room)
		return snap.Records, len(snap.Records), err
	}
	total, first, err := s.glance(ctx, room, limit)
	if err != nil || total == 0 || limit == 0 {
		return nil, total, err
	}
	var records []Record
	seen := make(map[string]struct{})
	take := func(r Record) bool {
		if _, twice := seen[r.Conn]; !twice {
			seen[r.Conn] = struct{}{}
			records = append(records, r)
		}
		return len(records) < limit
	}
	if more, err := first.each(take); err != nil || !more || first.next == 0 {
		return records, max(total, len(records)), err
	}
	err = s.scan(ctx, room, first.next, take)
	return records, max(total, len(records)), err
}

// glance returns the number of members of a room, and a page of about that size.
func (s *Store) glance(ctx context.Context, room string, about int) (int, page, error) {
	type seen struct {
		total int64
		first page
	}
	key := s.keys.Members(room)
	g, err := read(ctx, s, key, func(ctx context.Context) (g seen, err error) {
		pipe := s.client.Pipeline()
		count := pipe.HLen(ctx, key)
		some := pipe.HScan(ctx, key, 0, "", int64(min(max(about, 1), PageSize)))
		if _, err = pipe.Exec(ctx); err == nil {
			g.total = count.Val()
			g.first.pairs, g.first.next = some.Val()
		}
		return g, err
	})
	return int(g.total), g.first, err
}

// Count returns the number of members of a room.
func (s *Store) Count(ctx context.Context, room string) (int, error) {
	key := s.keys.Members(room)
	n, err := read(ctx, s, key, func(ctx context.Context) (int64, error) {
		return s.client.HLen(ctx, key).Result()
	})
	return int(n), err
}

// Record reads one entry.
func (s *Store) Record(ctx context.Context, room, conn string) (Record, bool, error) {
	return s.FindIn(ctx, []string{room}, conn)
}

// Records reads many entries in one round trip, in the given order. Missing entries are
// zero Records.
func (s *Store) Records(ctx context.Context, refs []EntryRef) ([]Record, error) {
	return call(ctx, s, func(ctx context.Context) ([]Record, error) {
		pipe := s.client.Pipeline()
		cmds := make([]*redis.StringCmd, len(refs))
		for i, ref := range refs {
			cmds[i] = pipe.HGet(ctx, s.keys.Members(ref.Room), ref.Conn)
		}
		if _, err := pipe.Exec(ctx); err != nil && !errors.Is(err, redis.Nil) {
			return nil, err
		}
		records := make([]Record, len(refs))
		for i, c := range cmds {
			text, err := c.Result()
			if errors.Is(err, redis.Nil) {
				continue
			}
			if err != nil { // Exec returns only the first error, which may be a Nil
				return nil, err
			}
			if records[i], err = DecodeRecord(refs[i].Conn, text); err != nil {
				return nil, err
			}
		}
		return records, nil
	})
}

// FindIn reads the entry of conn in each of the rooms, in one round trip, and returns
// the first that exists.
func (s *Store) FindIn(ctx context.Context, rooms []string, conn string) (Record, bool, error) {
	refs := make([]EntryRef, len(rooms))
	for i, room := range rooms {
		refs[i] = EntryRef{Room: room, Conn: conn}
	}
	records, err := s.Records(ctx, refs)
	for _, r := range records {
		if r.Entry != "" {
			return r, true, nil
		}
	}
	return Record{}, false, err
}

// Positions reads the positions of rooms, hundreds per call, in the given order.
func (s *Store) Positions(ctx context.Context, rooms []string) ([]Position, error) {
	out := make([]Position, len(rooms))
	err := s.eachPosition(ctx, rooms, func(at int, position string) (err error) {
		out[at], err = decodePosition(position)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// eachPosition calls f with the index of each room and its position as Redis holds it.
func (s *Store) eachPosition(ctx context.Context, rooms []string, f func(at int, position string) error) error {
	return s.eachPart(rooms, positionsPerCall, func(_ int, part []int) error {
		keys := make([]string, len(part))
		for i, at := range part {
			keys[i] = s.keys.Seq(rooms[at])
		}
		reply, err := run(ctx, s, positionsScript, keys)
		if err != nil {
			return err
		}
		lines, err := texts(reply)
		if err != nil || len(lines) != len(part) {
			return fmt.Errorf("positions: %w", errFormat)
		}
		for i, at := range part {
			if err := f(at, lines[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

// eachPart calls f with the indexes of at most size rooms at a time, all of one bucket,
// because one script call may only use the rooms of one bucket. It stops at the first
// error.
func (s *Store) eachPart(rooms []string, size int, f func(bucket int, part []int) error) error {
	groups := make(map[int][]int)
	for i, room := range rooms {
		b := s.keys.RoomBucket(room)
		groups[b] = append(groups[b], i)
	}
	for bucket, group := range groups {
		for part := range slices.Chunk(group, size) {
			if err := f(bucket, part); err != nil {
				return err
			}
		}
	}
	return nil
}

// Rooms calls f with the name of every room that has members, until f returns false. It
// may name a room more than once.
func (s *Store) Rooms(ctx context.Context, f func(room string) bool) error {
	for b := range s.keys.Buckets() {
		var cursor uint64
		for {
			names, next, err := s.setPage(ctx, s.keys.Rooms(b), cursor)
			if err != nil {
				return err
			}
			for _, name := range names {
				if !f(name) {
					return nil
				}
			}
			if cursor = next; cursor == 0 {
				break
			}
		}
	}
	return nil
}

func (s *Store) setPage(ctx context.Context, key string, cursor uint64) ([]string, uint64, error) {
	type page struct {
		names []string
		next  uint64
	}
	p, err := read(ctx, s, key, func(ctx context.Context) (page, error) {
		names, next, err := s.client.SScan(ctx, key, cursor, "", MaxOps).Result()
		return page{names, next}, err
	})
	return p.names, p.next, err
}

// OwnersIn returns the incarnations that own entries of a room.
func (s *Store) OwnersIn(ctx context.Context, room string) ([]string, error) {
	key := s.keys.Seq(room)
	at, err := read(ctx, s, key, func(ctx context.Context) (string, error) {
		at, err := s.client.Get(ctx, key).Result()
		if errors.Is(err, redis.Nil) {
			return "", nil
		}
		return at, err
	})
	if err != nil {
		return nil, err
	}
	return decodeOwners(at)
}
