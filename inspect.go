package mesh

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/store"
)

const (
	defaultPage = 100
	maxPage     = 1000
)

// RoomQuery selects rooms for [RoomManager.List].
type RoomQuery struct {
	// Prefix is the beginning of the names. Defaults to "": all rooms.
	Prefix string
	// Cursor is the Next of the previous page with the same Prefix. Defaults to "": the
	// first page.
	Cursor string
	// Limit is the approximate number of rooms, 1 to 1,000. Defaults to 100.
	Limit int
}

// RoomInfo is a room with members.
type RoomInfo struct {
	Name    string
	Members int  // number of members; 0 if the last one left during the call
	Tracked bool // a TrackPresence rule of this server matches it
}

// RoomPage is a page of the rooms with members.
type RoomPage struct {
	Rooms []RoomInfo
	Next  string // the Cursor of the next page; "" on the last page
	Total int    // rooms with members, regardless of the Prefix
}

// List returns a page of the rooms with members, and their numbers of members. It is
// for lists that are too long to read at once (see All). A page looks at a bounded
// number of names. It may contain a few more rooms than Limit, and with a Prefix fewer
// or none although there is a Next. The order is that of Redis. A room that has members
// during the whole read appears at least once.
//
// It reads from masters, writes nothing, and takes at most two seconds. Errors wrap
// ErrUnavailable, or ErrInvalidOptions if the query is invalid.
func (m *RoomManager) List(ctx context.Context, q RoomQuery) (RoomPage, error) {
	if err := m.n.checkRunningCtx(ctx); err != nil {
		return RoomPage{}, err
	}
	limit, err := pageLimit("RoomQuery.Limit", q.Limit)
	if err != nil {
		return RoomPage{}, err
	}
	at, err := parseCursor("RoomQuery.Cursor", q.Cursor, m.n.keys.Buckets())
	if err != nil {
		return RoomPage{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	found, err := m.n.store.RoomsFrom(ctx, q.Prefix, at, limit)
	if err != nil {
		return RoomPage{}, errorFor(ctx, err)
	}
	counts, err := m.n.store.Counts(ctx, found.Rooms)
	if err != nil {
		return RoomPage{}, errorFor(ctx, err)
	}
	page := RoomPage{Rooms: make([]RoomInfo, len(found.Rooms)), Total: int(found.Total)}
	for i, room := range found.Rooms {
		page.Rooms[i] = RoomInfo{Name: room, Members: int(counts[i]), Tracked: m.n.access.rules.Match(room).Tracked}
	}
	if found.More {
		page.Next = cursorText(found.Next)
	}
	return page, nil
}

func pageLimit(field string, limit int) (int, error) {
	switch {
	case limit == 0:
		return defaultPage, nil
	case limit < 1 || limit > maxPage:
		return 0, fmt.Errorf("%w: %s is %d, must be 1 to %d", ErrInvalidOptions, field, limit, maxPage)
	}
	return limit, nil
}

// cursorText encodes a cursor as text: bucket.scan.after.
func cursorText(at store.Cursor) string {
	return strconv.Itoa(at.Bucket) + "." + strconv.FormatUint(at.Scan, 10) + "." + at.After
}

// parseCursor is the inverse of cursorText.
func parseCursor(field, text string, buckets int) (store.Cursor, error) {
	if text == "" {
		return store.Cursor{}, nil
	}
	parts := strings.SplitN(text, ".", 3)
	if len(parts) == 3 {
		bucket, err1 := strconv.Atoi(parts[0])
		scan, err2 := strconv.ParseUint(parts[1], 10, 64)
		if err1 == nil && err2 == nil && bucket >= 0 && bucket < buckets {
			return store.Cursor{Bucket: bucket, Scan: scan, After: parts[2]}, nil
		}
	}
	return store.Cursor{}, fmt.Errorf("%w: %s %.40q is not the Next of another page", ErrInvalidOptions, field, text)
}

// EntryQuery selects entries for [RoomManager.Entries].
type EntryQuery struct {
	// Cursor is the Next of the previous page. Defaults to "": the first page.
	Cursor string
	// Limit is the approximate number of entries, 1 to 1,000. Defaults to 100.
	Limit int
}

// Entry is one connection in a room, as Redis holds it: a Member together with the
// server that owns it.
type Entry struct {
	ConnectionID string
	// UserID is the user of the connection, or empty for none.
	UserID string
	// ID is new for each join: a connection that left and joined again has another one.
	ID string
	// Server is the Incarnation of the server that owns the connection. It is empty for a
	// kept place.
	Server string
	// KeptUntil is the time until which the place of a disconnected entry is kept. Zero
	// means that the entry is connected.
	KeptUntil time.Time
	Metadata  json.RawMessage // nil if there is none
	State     json.RawMessage // nil if there is none
	// StateSilent reports whether the state was published as a silent state.
	StateSilent bool
	// StateUntil is the time at which the state expires, or zero if it does not.
	StateUntil time.Time
	// JoinedAt is the time of the join, by Redis's clock.
	JoinedAt time.Time
	// TTL is the silence after which it ends, by the rule of its server. 0 means never.
	TTL time.Duration
	// Seq is the seq of its last change.
	Seq uint64
}

// EntryPage is a page of a room's entries.
type EntryPage struct {
	Room string
	// Epoch and Seq are the position of the room when the read began. Epoch is empty if
	// Redis does not know the room.
	Epoch   string
	Seq     uint64
	Now     time.Time // time of the read, by Redis's clock
	Total   int       // entries of the room
	Entries []Entry
	Next    string // the Cursor of the next page; "" on the last page
}

// Entries returns a page of a room's entries in Redis. It is for operators that want to
// know why a connection is in a room and which server owns it. Apps use Members and
// snapshots. A room of no more than Limit entries is read at one moment and sorted by
// connection id. A larger one comes in pages in Redis's own order, and a page may have
// a few more or fewer entries than Limit. An entry that exists during the whole read
// appears at least once.
//
// No guard is asked, because the app itself is asking. It reads from masters, writes
// nothing, and takes at most two seconds. Errors wrap ErrUnavailable, ErrInvalidRoom,
// or ErrInvalidOptions if the query is invalid.
func (m *RoomManager) Entries(ctx context.Context, room string, q EntryQuery) (EntryPage, error) {
	if err := m.n.checkUsable(ctx, room); err != nil {
		return EntryPage{}, err
	}
	limit, err := pageLimit("EntryQuery.Limit", q.Limit)
	if err != nil {
		return EntryPage{}, err
	}
	at, err := parseCursor("EntryQuery.Cursor", q.Cursor, 1)
	if err != nil {
		return EntryPage{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	found, err := m.n.store.EntriesFrom(ctx, room, at, limit)
	if err != nil {
		return EntryPage{}, errorFor(ctx, err)
	}
	page := EntryPage{
		Room: room, Epoch: found.Position.Epoch, Seq: found.Position.Seq, Now: time.UnixMilli(found.Now),
		Total: found.Total, Entries: make([]Entry, len(found.Records)),
	}
	for i := range found.Records {
		page.Entries[i] = entryOf(&found.Records[i])
	}
	if found.More {
		page.Next = cursorText(found.Next)
	}
	return page, nil
}

func entryOf(r *store.Record) Entry {
	e := Entry{
		ConnectionID: r.Conn, UserID: r.User, ID: r.Entry, Server: r.Incarnation, Metadata: r.Meta, State: r.State,
		StateSilent: r.StateSilent, JoinedAt: time.UnixMilli(r.JoinedAt), TTL: r.TTL, Seq: r.Seq,
	}
	if r.Kept() {
		e.Server, e.KeptUntil = "", time.UnixMilli(r.KeptUntil)
	}
	if r.StateUntil > 0 {
		e.StateUntil = time.UnixMilli(r.StateUntil)
	}
	return e
}

// WatchedQuery selects rooms for [RoomManager.Watched].
type WatchedQuery struct {
	// Prefix is the beginning of the names. Defaults to "": all watched rooms.
	Prefix string
	// Stale selects only stale rooms.
	Stale bool
	// After skips names up to this one: the Next of the previous page.
	After string
	// Limit is the maximum number of rooms, 1 to 1,000. Defaults to 100.
	Limit int
}

// WatchedRoom describes a server's mirror of a room that has a subscriber on this
// server, or that many connections join, and its lag behind Redis.
type WatchedRoom struct {
	Name          string
	Subscriptions int // on this server; 0 if the last one has just ended, or if only joins are answered from the mirror
	Members       int // in the mirror
	// Stale reports whether events may have been missed, or Redis does not answer.
	// Subscribers then see the last known state.
	Stale bool
	// Epoch and Seq are the position of the mirror.
	Epoch string
	Seq   uint64
	// RedisEpoch and RedisSeq are the position of the room in Redis a moment before.
	// They are valid only if Compared is true.
	RedisEpoch string
	RedisSeq   uint64
	Compared   bool
}

// Behind returns the number of changes in Redis that the mirror did not have a moment
// later. known is false if Redis did not answer or counts in another epoch.
func (w WatchedRoom) Behind() (changes uint64, known bool) {
	switch {
	case !w.Compared:
		return 0, false
	case w.RedisEpoch == "" && w.Members == 0: // Redis forgets an empty room after a while
		return 0, true
	case w.RedisEpoch != w.Epoch:
		return 0, false
	case w.RedisSeq <= w.Seq:
		return 0, true
	}
	return w.RedisSeq - w.Seq, true
}

// WatchedPage is a page of the watched rooms of a server.
type WatchedPage struct {
	Rooms []WatchedRoom // sorted by name
	Next  string        // the After of the next page; "" on the last page
	Total int           // rooms that the query selects, on all pages
}

// Watched returns the mirrors of the rooms that have subscribers on this server, and
// compares them with Redis. If Redis does not answer, the page lacks only that
// comparison, and the error wraps ErrUnavailable.
//
// It reads from masters, writes nothing, and takes at most two seconds. An invalid
// query is an ErrInvalidOptions. Safe for concurrent use. Each call looks at every
// watched room.
func (m *RoomManager) Watched(ctx context.Context, q WatchedQuery) (WatchedPage, error) {
	limit, err := pageLimit("WatchedQuery.Limit", q.Limit)
	if err != nil {
		return WatchedPage{}, err
	}
	page := m.n.watched(q, limit)
	if len(page.Rooms) == 0 {
		return page, nil
	}
	if err := m.n.checkRunningCtx(ctx); err != nil {
		return page, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	return page, errorFor(ctx, m.n.compareWatched(ctx, page.Rooms))
}

// watched returns the state of watched rooms without a call to Redis.
func (n *core) watched(q WatchedQuery, limit int) WatchedPage {
	all := slices.DeleteFunc(n.hub.RoomStatuses(), func(s hub.RoomStatus) bool {
		return !strings.HasPrefix(s.Room, q.Prefix) || q.Stale && !s.Stale
	})
	page := WatchedPage{Total: len(all)}
	all = slices.DeleteFunc(all, func(s hub.RoomStatus) bool { return q.After != "" && s.Room <= q.After })
	slices.SortFunc(all, func(a, b hub.RoomStatus) int { return cmp.Compare(a.Room, b.Room) })
	if len(all) > limit {
		all = all[:limit]
		page.Next = all[limit-1].Room
	}
	page.Rooms = make([]WatchedRoom, len(all))
	for i, s := range all {
		page.Rooms[i].stands(s)
	}
	return page
}

// compareWatched reads the positions of rooms from Redis, and then the positions of
// their mirrors again, so that an event in transit does not count as lag.
func (n *core) compareWatched(ctx context.Context, rooms []WatchedRoom) error {
	names := make([]string, len(rooms))
	for i := range rooms {
		names[i] = rooms[i].Name
	}
	positions, err := n.store.Positions(ctx, names)
	if err != nil {
		return err
	}
	for i, p := range positions {
		w := &rooms[i]
		w.RedisEpoch, w.RedisSeq, w.Compared = p.Epoch, p.Seq, true
		if s, ok := n.hub.RoomStatus(w.Name); ok {
			w.stands(s)
		}
	}
	return nil
}

func (w *WatchedRoom) stands(s hub.RoomStatus) {
	w.Name, w.Subscriptions, w.Members, w.Stale = s.Room, s.Sinks, s.Members, s.Stale
	w.Epoch, w.Seq = s.Position.Epoch, s.Position.Seq
}
