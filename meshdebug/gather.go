package meshdebug

import (
	"context"
	"encoding/json"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh"
)

const (
	// gatherLimit limits the time of all reads for one page.
	gatherLimit = 2 * time.Second
	// readyLimit limits the wait for a subscription that is being renewed.
	readyLimit = 100 * time.Millisecond
	// perOverview is the number of rooms in the overview.
	perOverview = 10
	// perPage is the number of rooms or members of a page if the query has no limit.
	perPage = 100
)

// gather reads the data of the view, all parts at the same time, and returns it with the
// HTTP status.
func (h *handler) gather(ctx context.Context, q query) (*page, int) {
	ctx, cancel := context.WithTimeout(ctx, gatherLimit)
	defer cancel()
	p := &page{View: q.view, query: q}
	var reads reads
	reads.Go(func() { p.ready(ctx, h.source) })
	switch q.view {
	case viewRoom:
		reads.Go(func() { p.Servers = serversOf(h.source.Servers(ctx)) })
		reads.Go(func() { p.Room = h.room(ctx, q) })
		reads.Go(func() { p.Watched = watchedOf(ctx, h.source.Rooms(), mesh.WatchedQuery{Prefix: q.room, Limit: 1}) })
	case viewConnection:
		reads.Go(func() { p.Servers = serversOf(h.source.Servers(ctx)) })
		reads.Go(func() { p.Conn = h.connection(ctx, q.conn) })
	case viewRooms:
		reads.Go(func() { p.Rooms = h.rooms(ctx, q, perPage) })
	case viewWatched:
		reads.Go(func() { p.Watched = h.watched(ctx, q, perPage) })
	default:
		reads.Go(func() { p.Servers = serversOf(h.source.Servers(ctx)) })
		reads.Go(func() { p.Rooms = h.rooms(ctx, q, perOverview) })
		reads.Go(func() { p.Watched = h.watched(ctx, q, perOverview) })
		p.Stats = statsOf(h.source.Stats())
	}
	reads.Wait()
	p.Time = time.Now().UTC()
	if q.view == viewRoom {
		p.Watched.only(q.room)
		p.Room.owners(p.Servers)
	}
	if q.view == viewConnection {
		p.Conn.owners(p.Servers)
	}
	return p, p.status()
}

// reads runs several calls of a Source at the same time.
type reads struct {
	sync.WaitGroup
	panicked atomic.Bool // a call has panicked, or ended its goroutine
}

// Go runs f on a goroutine of its own and recovers from its panic.
func (r *reads) Go(f func()) {
	r.WaitGroup.Go(func() {
		returned := false
		defer func() {
			if _ = recover(); !returned {
				r.panicked.Store(true)
			}
		}()
		f()
		returned = true
	})
}

// Wait waits for all calls, and panics if one of them did not return.
func (r *reads) Wait() {
	r.WaitGroup.Wait()
	if r.panicked.Load() {
		panic("meshdebug: the Source panicked")
	}
}

func (p *page) ready(ctx context.Context, source Source) {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	err := source.Ready(ctx)
	if p.Ready = err == nil; err != nil {
		p.NotReady = err.Error()
	}
}

func serversOf(list []mesh.ServerInfo, err error) *serversPart {
	s := &serversPart{part: failed(err), List: make([]server, len(list))}
	for i, info := range list {
		one := server{
			Incarnation: info.Incarnation, Name: info.Name, Self: info.Self, State: "living", LeaseLeft: seconds(info.LeaseLeft),
			LeaseAge: seconds(info.LeaseAge), DeadFor: seconds(info.DeadFor), Owned: info.Owned,
		}
		switch {
		case info.Dead:
			one.State = "dead"
		case info.LeaseLeft <= 0:
			one.State = "lapsed"
		}
		s.List[i] = one
	}
	return s
}

func (h *handler) rooms(ctx context.Context, q query, limit int) *roomsPart {
	if q.limit > 0 {
		limit = q.limit
	}
	found, err := h.source.Rooms().List(ctx, mesh.RoomQuery{Prefix: q.prefix, Cursor: q.cursor, Limit: limit})
	r := &roomsPart{
		part: failed(err), Total: found.Total, Prefix: q.prefix, List: make([]room, len(found.Rooms)), Next: found.Next,
	}
	for i, one := range found.Rooms {
		r.List[i] = room(one)
	}
	return r
}

func (h *handler) watched(ctx context.Context, q query, limit int) *watchedPart {
	if q.limit > 0 {
		limit = q.limit
	}
	return watchedOf(ctx, h.source.Rooms(), mesh.WatchedQuery{Prefix: q.prefix, Stale: q.stale, After: q.after, Limit: limit})
}

func watchedOf(ctx context.Context, rooms *mesh.RoomManager, q mesh.WatchedQuery) *watchedPart {
	found, err := rooms.Watched(ctx, q)
	p := &watchedPart{
		part: failed(err), Total: found.Total, Prefix: q.Prefix, Stale: q.Stale,
		List: make([]watched, len(found.Rooms)), Next: found.Next,
	}
	for i, w := range found.Rooms {
		one := watched{
			Name: w.Name, Subscriptions: w.Subscriptions, Members: w.Members, Stale: w.Stale,
			Epoch: w.Epoch, Seq: w.Seq, RedisEpoch: w.RedisEpoch, RedisSeq: w.RedisSeq,
		}
		if n, known := w.Behind(); known {
			one.Behind = &n
		}
		p.List[i] = one
	}
	return p
}

// only removes all rooms but the one of that name, which sorts before all others that
// begin with it.
func (p *watchedPart) only(name string) {
	if len(p.List) > 0 && p.List[0].Name != name {
		p.List = p.List[:0]
	}
	p.Total, p.Next = len(p.List), ""
}

func (h *handler) room(ctx context.Context, q query) *roomPart {
	limit := perPage
	if q.limit > 0 {
		limit = q.limit
	}
	found, err := h.entries(ctx, q, limit)
	r := &roomPart{
		part: failed(err), Name: q.room, User: q.user, Users: h.users(ctx, q.room), Epoch: found.Epoch, Seq: found.Seq, Total: found.Total,
		Hidden: h.opts.HideData, Entries: make([]entry, len(found.Entries)), Next: found.Next,
	}
	if err == nil {
		r.Now = found.Now.UTC()
	}
	for i, e := range found.Entries {
		r.Entries[i] = h.entry(e)
	}
	return r
}

// userSearch is the number of entries that one page looks at to find those of a user.
const userSearch = 10_000

// entries returns a page of a room, or of the entries of one user.
func (h *handler) entries(ctx context.Context, q query, limit int) (mesh.EntryPage, error) {
	rooms := h.source.Rooms()
	if q.user == "" {
		return rooms.Entries(ctx, q.room, mesh.EntryQuery{Cursor: q.cursor, Limit: limit})
	}
	var all mesh.EntryPage
	var found []mesh.Entry
	for looked, next := 0, q.cursor; ; next = all.Next {
		var err error
		all, err = rooms.Entries(ctx, q.room, mesh.EntryQuery{Cursor: next, Limit: 1000})
		for _, e := range all.Entries {
			if e.UserID == q.user {
				found = append(found, e)
			}
		}
		looked += len(all.Entries)
		if err != nil || all.Next == "" || len(found) >= limit || looked >= userSearch {
			all.Entries = found
			return all, err
		}
	}
}

// users returns the number of users of a room, 0 if it is not known.
func (h *handler) users(ctx context.Context, room string) int {
	numbers, ok := h.source.(interface {
		Occupancy(ctx context.Context, rooms ...string) (map[string]mesh.Occupancy, error)
	})
	if server, is := h.source.(interface{ Presence() *mesh.PresenceManager }); is {
		numbers, ok = server.Presence(), true
	}
	if !ok {
		return 0
	}
	all, err := numbers.Occupancy(ctx, room)
	if err != nil {
		return 0
	}
	return all[room].Users
}

// valid returns JSON as it is, and anything else as a JSON string. A value that a person
// wrote into Redis must not prevent the page.
func valid(data json.RawMessage) json.RawMessage {
	if data == nil || json.Valid(data) {
		return data
	}
	text, _ := json.Marshal(string(data)) // encoding a string cannot fail
	return text
}

// owners fills in the names and states of the servers of the entries.
func (r *roomPart) owners(servers *serversPart) {
	if servers.err != nil {
		return
	}
	known := servers.byIncarnation()
	for i := range r.Entries {
		r.Entries[i].owner(known)
	}
}
