package mesh

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	defaultPage = 100
	maxPage     = 1000
)

// RoomQuery says which rooms are wanted.
type RoomQuery struct {
	// Prefix is what their names begin with. Defaults to "": all rooms.
	Prefix string
	// Cursor is the Next of the page before, of the same Prefix. Defaults to
	// "": the first page.
	Cursor string
	// Limit is about how many, 1 to 1,000. Defaults to 100.
	Limit int
}

// RoomInfo is a room that somebody is in.
type RoomInfo struct {
	Name    string
	Members int  // connections in it; 0: the last one has left meanwhile
	Tracked bool // a TrackPresence rule of this server matches it
}

// RoomPage is a part of the rooms that somebody is in.
type RoomPage struct {
	Rooms []RoomInfo
	Next  string // the Cursor of the next page; "": this was the last
	Total int    // rooms that somebody is in, whatever their names
}

// List returns a page of the rooms that somebody is in, with how many are in
// each: for lists of rooms too many to read whole (see All). A page may hold
// some rooms more than Limit, and with a Prefix fewer, even none, while there
// is a Next: it looks at a bounded number of names. Their order is Redis's own.
// A room that somebody is in all the while comes at least once in all pages
// together.
//
// It reads from masters, writes nothing, and takes at most two seconds. Errors
// wrap ErrUnavailable, or ErrInvalidOptions where the query is wrong.
func (m *RoomManager) List(ctx context.Context, q RoomQuery) (RoomPage, error) {
	if err := m.n.usableFor(ctx); err != nil {
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
		return RoomPage{}, m.n.errorFor(ctx, err)
	}
	counts, err := m.n.store.Counts(ctx, found.Rooms)
	if err != nil {
		return RoomPage{}, m.n.errorFor(ctx, err)
	}
	page := RoomPage{Rooms: make([]RoomInfo, len(found.Rooms)), Total: int(found.Total)}
	for i, room := range found.Rooms {
		page.Rooms[i] = RoomInfo{Name: room, Members: int(counts[i]), Tracked: m.n.rules.match(room).tracked}
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

// cursorText is a place as text: bucket.scan.after.
func cursorText(at store.Place) string {
	return strconv.Itoa(at.Bucket) + "." + strconv.FormatUint(at.Scan, 10) + "." + at.After
}

// parseCursor is the inverse of cursorText.
func parseCursor(field, text string, buckets int) (store.Place, error) {
	if text == "" {
		return store.Place{}, nil
	}
	parts := strings.SplitN(text, ".", 3)
	if len(parts) == 3 {
		bucket, err1 := strconv.Atoi(parts[0])
		scan, err2 := strconv.ParseUint(parts[1], 10, 64)
		if err1 == nil && err2 == nil && bucket >= 0 && bucket < buckets {
			return store.Place{Bucket: bucket, Scan: scan, After: parts[2]}, nil
		}
	}
	return store.Place{}, fmt.Errorf("%w: %s %.40q is not the Next of another page", ErrInvalidOptions, field, text)
}
