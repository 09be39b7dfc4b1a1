package mesh

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/meshpresence/mesh/internal/hub"
)

// WatchedQuery says which watched rooms are wanted.
type WatchedQuery struct {
	// Prefix is what their names begin with. Defaults to "": all of them.
	Prefix string
	// Stale leaves out those that are in order.
	Stale bool
	// After leaves out names up to this one: the Next of the page before.
	After string
	// Limit is how many at most, 1 to 1,000. Defaults to 100.
	Limit int
}

// WatchedRoom is a server's own copy of a room that somebody on it watches, or
// that many join, and how far it is behind Redis.
type WatchedRoom struct {
	Name          string
	Subscriptions int // of this server; 0: the last one has just ended, or only joins are answered from it
	Members       int // that the copy lists
	// Stale says that something may have been missed, or that Redis does not
	// answer: subscribers see what was known last.
	Stale bool
	// Epoch and Seq are where the copy stands.
	Epoch string
	Seq   uint64
	// RedisEpoch and RedisSeq are where the room stood in Redis a moment before;
	// of no meaning unless Compared.
	RedisEpoch string
	RedisSeq   uint64
	Compared   bool
}

// Behind returns how many changes Redis had told that the copy did not show a
// moment later. False: it is not known, because Redis did not answer or counts
// in another epoch.
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

// WatchedPage is a part of the rooms that somebody on this server watches.
type WatchedPage struct {
	Rooms []WatchedRoom // sorted by name
	Next  string        // the After of the next page; "": this was the last
	Total int           // rooms that the query is about, on all pages
}

// Watched returns this server's copies of the rooms that somebody here watches,
// and compares them with Redis. What is here is known without it: where it
// does not answer, the page holds everything but that comparison, and the
// error wraps ErrUnavailable.
//
// It reads from masters, writes nothing, and takes at most two seconds. A wrong
// query is an ErrInvalidOptions. Safe for concurrent use; it looks at every
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
	if err := m.n.usableFor(ctx); err != nil {
		return page, err
	}
	ctx, cancel := context.WithTimeout(ctx, lookLimit)
	defer cancel()
	return page, m.n.errorFor(ctx, m.n.compareWatched(ctx, page.Rooms))
}

// watched is what is known of watched rooms without asking Redis.
func (n *node) watched(q WatchedQuery, limit int) WatchedPage {
	all := slices.DeleteFunc(n.hub.Standings(), func(s hub.Standing) bool {
		return !strings.HasPrefix(s.Room, q.Prefix) || q.Stale && !s.Stale
	})
	page := WatchedPage{Total: len(all)}
	all = slices.DeleteFunc(all, func(s hub.Standing) bool { return q.After != "" && s.Room <= q.After })
	slices.SortFunc(all, func(a, b hub.Standing) int { return cmp.Compare(a.Room, b.Room) })
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

// compareWatched asks Redis where rooms stand, and then looks once more where
// their copies do: an event that was on its way meanwhile is no lag.
func (n *node) compareWatched(ctx context.Context, rooms []WatchedRoom) error {
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
		if s, ok := n.hub.Standing(w.Name); ok {
			w.stands(s)
		}
	}
	return nil
}

func (w *WatchedRoom) stands(s hub.Standing) {
	w.Name, w.Subscriptions, w.Members, w.Stale = s.Room, s.Sinks, s.Members, s.Stale
	w.Epoch, w.Seq = s.Position.Epoch, s.Position.Seq
}
