package store

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"
)

// What nobody needs to run, but who looks after it wants to see. It only
// reads, in pages: what is large is never read whole for somebody who looks.

// Instance is an incarnation on the list of the living or of the dead.
type Instance struct {
	Incarnation string
	Dead        bool
	// At is when its lease runs out, or when it was declared dead (Redis time,
	// unix ms).
	At int64
}

// Instances returns at most limit of the living and as many of the dead, the
// earliest At first, and Redis's time (unix ms) at that moment.
func (s *Store) Instances(ctx context.Context, limit int) (list []Instance, now int64, err error) {
	keys := []string{s.keys.Instances(), s.keys.Dead()}
	// Not in the places of the lease: who looks must not keep a heartbeat waiting.
	reply, err := runIn(ctx, s, s.at(keys[0]).read(), instancesScript, keys, limit)
	if err != nil {
		return nil, 0, err
	}
	parts, ok := reply.([]any)
	if !ok || len(parts) != 3 {
		return nil, 0, fmt.Errorf("instances: %w", errFormat)
	}
	var p parser
	head, err := texts(parts[:1])
	if err != nil {
		return nil, 0, err
	}
	now = p.int(head[0])
	for i, part := range parts[1:] {
		pairs, err := texts(part)
		if err != nil {
			return nil, 0, err
		}
		for pair := range slices.Chunk(pairs, 2) {
			list = append(list, Instance{Incarnation: pair[0], At: p.int(pair[1]), Dead: i == 1})
		}
	}
	return list, now, p.err
}

// sizesPerCall bounds one round trip of sizes.
const sizesPerCall = 1024

// OwnedSizes returns how many entries and connections the indexes of
// incarnations hold, over all buckets.
func (s *Store) OwnedSizes(ctx context.Context, incs []string) ([]int64, error) {
	buckets := s.keys.Buckets()
	keys := make([]string, 0, len(incs)*buckets)
	for _, inc := range incs {
		for b := range buckets {
			keys = append(keys, s.keys.Owned(b, inc))
		}
	}
	sizes, err := s.sizes(ctx, keys, redis.Pipeliner.SCard)
	if err != nil {
		return nil, err
	}
	sums := make([]int64, len(incs))
	for i, n := range sizes {
		sums[i/buckets] += n
	}
	return sums, nil
}

// Counts returns how many members rooms have, in the order asked.
func (s *Store) Counts(ctx context.Context, rooms []string) ([]int64, error) {
	keys := make([]string, len(rooms))
	for i, room := range rooms {
		keys[i] = s.keys.Members(room)
	}
	return s.sizes(ctx, keys, redis.Pipeliner.HLen)
}

// sizes asks for the sizes of many keys, hundreds in one round trip.
func (s *Store) sizes(ctx context.Context, keys []string, size func(redis.Pipeliner, context.Context, string) *redis.IntCmd) ([]int64, error) {
	all := make([]int64, 0, len(keys))
	for part := range slices.Chunk(keys, sizesPerCall) {
		some, err := call(ctx, s, func(ctx context.Context) ([]int64, error) {
			pipe := s.client.Pipeline()
			cmds := make([]*redis.IntCmd, len(part))
			for i, key := range part {
				cmds[i] = size(pipe, ctx, key)
			}
			if _, err := pipe.Exec(ctx); err != nil {
				return nil, err
			}
			out := make([]int64, len(part))
			for i, c := range cmds {
				out[i] = c.Val()
			}
			return out, nil
		})
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// Place is where reading a set or a hash in pages goes on; the zero Place is
// the beginning.
type Place struct {
	Bucket int // of the room index
	Scan   uint64
	// After is set where Redis gave everything at once, as it does for what is
	// small, and more than was asked for: names up to it have been returned.
	After string
}

// turn returns the items of one answer of SCAN that are to be returned, sorted
// by name, and where it goes on. More: not all of the set has been returned.
func turn[T any](at Place, items []T, next uint64, limit int, name func(T) string) (page []T, to Place, more bool) {
	slices.SortFunc(items, func(a, b T) int { return strings.Compare(name(a), name(b)) })
	items = slices.CompactFunc(items, func(a, b T) bool { return name(a) == name(b) }) // SCAN may repeat itself
	if at.After != "" {
		items = slices.DeleteFunc(items, func(v T) bool { return name(v) <= at.After })
	}
	to = Place{Bucket: at.Bucket, Scan: next, After: at.After}
	if at.Scan == 0 && next == 0 && len(items) > limit {
		items = items[:limit]
		to.After = name(items[limit-1])
		return items, to, true
	}
	return items, to, next != 0
}

// RoomPage is some of the rooms that have members.
type RoomPage struct {
	Rooms []string
	Next  Place // where the rest is
	More  bool  // there is a rest
	Total int64 // rooms there are, whatever their names
}

// What is looked at for a page of rooms, where few names begin with what is
// wanted, or few rooms are in many buckets.
const (
	scansPerPage = 100
	namesPerPage = 20_000
	namesPerScan = 1000
)

// RoomsFrom reads the names of about limit rooms that begin with prefix. There
// may be a few more in a page, and fewer, even none, though More follow: it
// looks at a bounded number of names. A room that has members all the while
// comes at least once in all pages together.
func (s *Store) RoomsFrom(ctx context.Context, prefix string, at Place, limit int) (RoomPage, error) {
	index := make([]string, s.keys.Buckets())
	for b := range index {
		index[b] = s.keys.Rooms(b)
	}
	sizes, err := s.sizes(ctx, index, redis.Pipeliner.SCard)
	if err != nil {
		return RoomPage{}, err
	}
	var page RoomPage
	for _, n := range sizes {
		page.Total += n
	}
	scanned, found := 0, 0 // names looked at so far, and what came of them
	for scans, looked := 0, int64(0); at.Bucket < len(index); {
		if sizes[at.Bucket] == 0 {
			at = Place{Bucket: at.Bucket + 1}
			continue
		}
		if len(page.Rooms) >= limit || scans >= scansPerPage || looked >= namesPerPage {
			page.Next, page.More = at, true
			return page, nil
		}
		scans++
		looked += min(sizes[at.Bucket], namesPerScan)
		want := limit - len(page.Rooms)
		count := want
		if prefix != "" {
			count = scanCount(want, scanned, found)
		}
		names, next, err := s.matching(ctx, index[at.Bucket], at.Scan, prefix, count)
		if err != nil {
			return RoomPage{}, err
		}
		switch size := int(sizes[at.Bucket]); {
		case next != 0:
			scanned += min(count, size)
		case at.Scan == 0: // that was all of them
			scanned += size
		default: // the rest, however many those were
			scanned += len(names)
		}
		found += len(names)
		names, to, more := turn(at, names, next, want, func(name string) string { return name })
		page.Rooms = append(page.Rooms, names...)
		if at = to; !more {
			at = Place{Bucket: at.Bucket + 1}
		}
	}
	return page, nil
}

// scanCount returns how many names to look at next: about as many as hold those
// that are wanted, going by the ones looked at so far. Redis hands out all that
// match, so that more would come than anybody asked for.
func scanCount(want, scanned, found int) int {
	count := want
	switch {
	case found > 0:
		count = want * scanned / found
	case scanned > 0:
		count = 10 * scanned
	}
	return min(max(count, want), namesPerScan)
}

// matching reads part of a set of names: what matches of about count.
func (s *Store) matching(ctx context.Context, key string, cursor uint64, prefix string, count int) ([]string, uint64, error) {
	pattern := ""
	if prefix != "" {
		pattern = globEscape(prefix) + "*"
	}
	type part struct {
		names []string
		next  uint64
	}
	p, err := read(ctx, s, key, func(ctx context.Context) (part, error) {
		names, next, err := s.client.SScan(ctx, key, cursor, pattern, int64(count)).Result()
		return part{names, next}, err
	})
	return p.names, p.next, err
}

// globEscape makes a pattern of Redis's that matches nothing but s.
func globEscape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`).Replace(s)
}

// EntryPage is some of the members of a room.
type EntryPage struct {
	Position Position
	Total    int
	Now      int64 // Redis time, unix ms
	Records  []Record
	Next     Place // where the rest is
	More     bool  // there is a rest
}

// EntriesFrom reads about limit members of a room, and where the room stood
// when reading began. All of a room that has no more than limit are of one
// moment. A member that is there all the while comes at least once in all
// pages together.
func (s *Store) EntriesFrom(ctx context.Context, room string, at Place, limit int) (EntryPage, error) {
	small := -1 // none at once
	if at == (Place{}) {
		small = limit
	}
	h, err := s.head(ctx, room, small)
	if err != nil {
		return EntryPage{}, err
	}
	page := EntryPage{Position: h.pos, Total: h.total, Now: h.now, Records: h.records}
	if h.total <= small {
		slices.SortFunc(page.Records, func(a, b Record) int { return strings.Compare(a.Conn, b.Conn) })
		return page, nil
	}
	type part struct {
		pairs []string
		next  uint64
	}
	key := s.keys.Members(room)
	p, err := read(ctx, s, key, func(ctx context.Context) (part, error) {
		pairs, next, err := s.client.HScan(ctx, key, at.Scan, "", int64(limit)).Result()
		return part{pairs, next}, err
	})
	if err != nil {
		return EntryPage{}, err
	}
	records, err := decodePairs(p.pairs)
	if err != nil {
		return EntryPage{}, err
	}
	page.Records, page.Next, page.More = turn(at, records, p.next, limit, func(r Record) string { return r.Conn })
	return page, nil
}

// head is where a room stands, and who is in it if it is small.
type head struct {
	pos     Position
	total   int
	lost    bool     // more members are counted than there are
	now     int64    // Redis time, unix ms
	records []Record // nil: there are more than small
}

// head reads where a room stands and how many members it has; the members too,
// in the same moment, if they are at most small.
func (s *Store) head(ctx context.Context, room string, small int) (h head, err error) {
	reply, err := run(ctx, s, snapshotScript, []string{s.keys.Members(room), s.keys.Seq(room)}, small)
	if err != nil {
		return head{}, err
	}
	list, ok := reply.([]any)
	if !ok || len(list) != 4 {
		return head{}, fmt.Errorf("snapshot: %w", errFormat)
	}
	f, err := texts([]any{list[0], list[1], list[3]})
	if err != nil {
		return head{}, err
	}
	if h.pos, err = decodePosition(f[0]); err != nil {
		return head{}, err
	}
	var p parser
	h.total, h.now = int(p.int(f[1])), p.int(f[2])
	h.lost = countedIn(f[0]) > h.total
	if p.err != nil {
		return head{}, fmt.Errorf("snapshot: %w", errFormat)
	}
	if h.total <= small {
		pairs, err := texts(list[2])
		if err != nil {
			return head{}, err
		}
		h.records, err = decodePairs(pairs)
		return h, err
	}
	return h, nil
}
