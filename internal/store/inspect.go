package store

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/redis/go-redis/v9"
)

// This file serves inspection only. Nothing here is needed to run. It only reads, and
// large data is read in pages.

// ServerLease is an incarnation in the list of live or of dead servers.
type ServerLease struct {
	Incarnation string
	Dead        bool
	// At is the time when the lease runs out, or has run out. If a server gave up its
	// lease, it is the time of that (Redis time, unix ms).
	At int64
}

// ServerLeases returns at most limit live and limit dead incarnations, the earliest At
// first, and the time of Redis (unix ms) at that moment.
func (s *Store) ServerLeases(ctx context.Context, limit int) (list []ServerLease, now int64, err error) {
	keys := []string{s.keys.Instances(), s.keys.Dead()}
	// This call does not use the slots of the lease: inspection must not delay a
	// heartbeat.
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
			list = append(list, ServerLease{Incarnation: pair[0], At: p.int(pair[1]), Dead: i == 1})
		}
	}
	return list, now, p.err
}

// sizesPerCall limits the keys in one round trip of sizes.
const sizesPerCall = 1024

// OwnedSizes returns the number of entries and connections in the indexes of
// incarnations, summed over all buckets.
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

// Counts returns the number of members of each room, in the given order.
func (s *Store) Counts(ctx context.Context, rooms []string) ([]int64, error) {
	keys := make([]string, len(rooms))
	for i, room := range rooms {
		keys[i] = s.keys.Members(room)
	}
	return s.sizes(ctx, keys, redis.Pipeliner.HLen)
}

// sizes reads the sizes of many keys, up to sizesPerCall in one round trip.
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

// Cursor is the place from which to continue reading a set or a hash in pages. The zero
// Cursor is the beginning.
type Cursor struct {
	Bucket int // bucket of the room index
	Scan   uint64
	// After is set if Redis returned a small set as a whole, and this was more than a
	// page. All names up to After have been returned.
	After string
}

// sliceFrom returns the items of one SCAN answer that belong on the page, sorted by
// name, and the place to continue from. more means that the set has not been returned
// completely.
func sliceFrom[T any](at Cursor, items []T, next uint64, limit int, name func(T) string) (page []T, to Cursor, more bool) {
	slices.SortFunc(items, func(a, b T) int { return strings.Compare(name(a), name(b)) })
	items = slices.CompactFunc(items, func(a, b T) bool { return name(a) == name(b) }) // SCAN may repeat items
	if at.After != "" {
		items = slices.DeleteFunc(items, func(v T) bool { return name(v) <= at.After })
	}
	to = Cursor{Bucket: at.Bucket, Scan: next, After: at.After}
	if at.Scan == 0 && next == 0 && len(items) > limit {
		items = items[:limit]
		to.After = name(items[limit-1])
		return items, to, true
	}
	return items, to, next != 0
}

// RoomPage is one page of the rooms that have members.
type RoomPage struct {
	Rooms []string
	Next  Cursor // where to continue
	More  bool   // there are more pages
	Total int64  // number of rooms, regardless of the prefix
}

// Limits of the work for one page of rooms. They matter if few names have the prefix,
// or if few rooms are spread over many buckets.
const (
	scansPerPage = 100
	namesPerPage = 20_000
	namesPerScan = 1000
)

// RoomsFrom reads the names of about limit rooms that begin with prefix. A page may
// have a few more names, or fewer, or even none although More is true, because
// RoomsFrom looks at a limited number of names. A room that has members all the time is
// in at least one page.
func (s *Store) RoomsFrom(ctx context.Context, prefix string, at Cursor, limit int) (RoomPage, error) {
	index, sizes, err := s.roomIndexes(ctx)
	if err != nil {
		return RoomPage{}, err
	}
	var page RoomPage
	for _, n := range sizes {
		page.Total += n
	}
	scanned, found := 0, 0 // names looked at so far, and the matches among them
	for scans, looked := 0, int64(0); at.Bucket < len(index); {
		if sizes[at.Bucket] == 0 {
			at = Cursor{Bucket: at.Bucket + 1}
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
		scanned += namesScanned(at.Scan == 0, next == 0, count, int(sizes[at.Bucket]), len(names))
		found += len(names)
		names, to, more := sliceFrom(at, names, next, want, func(name string) string { return name })
		page.Rooms = append(page.Rooms, names...)
		if at = to; !more {
			at = Cursor{Bucket: at.Bucket + 1}
		}
	}
	return page, nil
}

// roomIndexes returns the room indexes of all buckets, and their sizes.
func (s *Store) roomIndexes(ctx context.Context) (index []string, sizes []int64, err error) {
	for b := range s.keys.Buckets() {
		index = append(index, s.keys.Rooms(b))
	}
	sizes, err = s.sizes(ctx, index, redis.Pipeliner.SCard)
	return index, sizes, err
}

// namesScanned estimates how many of the names of a set one answer covers. size is the
// size of the set, and count the number asked for.
func namesScanned(first, last bool, count, size, returned int) int {
	switch {
	case !last:
		return min(count, size)
	case first: // that was the whole set
		return size
	default: // the rest of the set, of unknown size
		return returned
	}
}

// scanCount returns how many names to look at next. Judged by the names seen so far,
// about want of them match. Redis returns all matches, so a larger count would return
// more than was asked for.
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

// matching reads a part of a set of names: the matches among about count names.
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

// globEscape returns a Redis pattern that matches only s.
func globEscape(s string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`).Replace(s)
}

// EntryPage is one page of the members of a room.
type EntryPage struct {
	Position Position
	Total    int
	Numbers  Numbers
	Now      int64 // Redis time, unix ms
	Records  []Record
	Next     Cursor // where to continue
	More     bool   // there are more pages
}

// EntriesFrom reads about limit members of a room, and the position that the room had
// when reading began. If the room has at most limit members, all of them belong to one
// moment. A member that is present all the time is in at least one page.
func (s *Store) EntriesFrom(ctx context.Context, room string, at Cursor, limit int) (EntryPage, error) {
	small := -1 // read no members yet
	if at == (Cursor{}) {
		small = limit
	}
	h, err := s.head(ctx, room, small)
	if err != nil {
		return EntryPage{}, err
	}
	page := EntryPage{Position: h.pos, Total: h.total, Numbers: h.numbers, Now: h.now, Records: h.records}
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
	page.Records, page.Next, page.More = sliceFrom(at, records, p.next, limit, func(r Record) string { return r.Conn })
	return page, nil
}

// head is the position of a room, with its members if the room is small.
type head struct {
	pos        Position
	total      int
	numbers    Numbers
	incomplete bool     // the position counts more members than there are
	now        int64    // Redis time, unix ms
	records    []Record // nil: there are more than small
}

// head reads the position of a room and its number of members. If the room has at most
// small members, it reads them too, in the same moment.
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
	h.incomplete, h.numbers = countedIn(f[0]) > h.total, decodeNumbers(f[0], h.total, h.now)
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
