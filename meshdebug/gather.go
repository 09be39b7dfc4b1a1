package meshdebug

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh"
)

const (
	// gatherLimit bounds everything that is read for one page.
	gatherLimit = 2 * time.Second
	// readyLimit is how long a subscription that is being renewed is waited for.
	readyLimit = 100 * time.Millisecond
	// glance is how many rooms the overview shows.
	glance = 10
	// perPage is how many rooms or members a page shows if not asked otherwise.
	perPage = 100
)

// page is all that is shown, as HTML and as JSON.
type page struct {
	View  string    `json:"view"`
	Time  time.Time `json:"time"` // by this machine's clock
	Ready bool      `json:"ready"`
	// NotReady says why the server does not accept connections.
	NotReady string       `json:"notReady,omitempty"`
	Servers  *serversPart `json:"servers,omitempty"`
	Room     *roomPart    `json:"room,omitempty"`
	Rooms    *roomsPart   `json:"rooms,omitempty"`
	Watched  *watchedPart `json:"watched,omitempty"`
	Stats    stats        `json:"stats,omitempty"`

	query query
}

// part is what every part has.
type part struct {
	Error string `json:"error,omitempty"` // why it is not all here

	err error
}

type serversPart struct {
	part
	List []server `json:"list"`
}

type server struct {
	Incarnation string  `json:"incarnation"`
	Self        bool    `json:"self"`
	State       string  `json:"state"`
	LeaseLeft   seconds `json:"leaseLeftSeconds"`
	LeaseAge    seconds `json:"leaseAgeSeconds"`
	DeadFor     seconds `json:"deadForSeconds"`
	Owned       int     `json:"owned"`
}

type roomsPart struct {
	part
	Total  int    `json:"total"`
	Prefix string `json:"prefix"`
	List   []room `json:"list"`
	Next   string `json:"next"`
}

type room struct {
	Name    string `json:"name"`
	Members int    `json:"members"`
	Tracked bool   `json:"tracked"`
}

type watchedPart struct {
	part
	Total  int       `json:"total"`
	Prefix string    `json:"prefix"`
	Stale  bool      `json:"stale"`
	List   []watched `json:"list"`
	Next   string    `json:"next"`
}

type watched struct {
	Name          string  `json:"name"`
	Subscriptions int     `json:"subscriptions"`
	Members       int     `json:"members"`
	Stale         bool    `json:"stale"`
	Epoch         string  `json:"epoch"`
	Seq           uint64  `json:"seq"`
	RedisEpoch    string  `json:"redisEpoch"`
	RedisSeq      uint64  `json:"redisSeq"`
	Behind        *uint64 `json:"behind"`
}

type roomPart struct {
	part
	Name    string    `json:"name"`
	Epoch   string    `json:"epoch"`
	Seq     uint64    `json:"seq"`
	Total   int       `json:"total"`
	Now     time.Time `json:"now,omitzero"` // by Redis's clock
	Hidden  bool      `json:"hidden"`
	Entries []entry   `json:"entries"`
	Next    string    `json:"next"`
}

type entry struct {
	ConnectionID string          `json:"connectionId"`
	ID           string          `json:"id"`
	Server       string          `json:"server"`
	ServerState  string          `json:"serverState,omitempty"`
	Self         bool            `json:"self"`
	JoinedAt     time.Time       `json:"joinedAt"`
	TTL          seconds         `json:"ttlSeconds"`
	Seq          uint64          `json:"seq"`
	Metadata     json.RawMessage `json:"metadata,omitempty"`
	State        json.RawMessage `json:"state,omitempty"`
	StateSilent  bool            `json:"stateSilent,omitempty"`
	StateUntil   *time.Time      `json:"stateUntil,omitempty"`
}

// seconds is a duration that is a number of seconds in JSON.
type seconds time.Duration

// MarshalJSON implements json.Marshaler.
func (s seconds) MarshalJSON() ([]byte, error) {
	return json.Marshal(float64(time.Duration(s).Microseconds()) / 1e6)
}

// gather reads what the view shows, all parts at the same time, and says with
// which status.
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
		reads.Go(func() { p.Watched = watchedOf(h.source.Rooms(), ctx, mesh.WatchedQuery{Prefix: q.room, Limit: 1}) })
	case viewRooms:
		reads.Go(func() { p.Rooms = h.rooms(ctx, q, perPage) })
	case viewWatched:
		reads.Go(func() { p.Watched = h.watched(ctx, q, perPage) })
	default:
		reads.Go(func() { p.Servers = serversOf(h.source.Servers(ctx)) })
		reads.Go(func() { p.Rooms = h.rooms(ctx, q, glance) })
		reads.Go(func() { p.Watched = h.watched(ctx, q, glance) })
		p.Stats = statsOf(h.source.Stats())
	}
	reads.Wait()
	p.Time = time.Now().UTC()
	if q.view == viewRoom {
		p.Watched.only(q.room)
		p.Room.owners(p.Servers)
	}
	return p, p.status()
}

// reads are calls of a Source under way.
type reads struct {
	sync.WaitGroup
	fallen atomic.Bool // one of them has panicked, or ended its goroutine
}

// Go runs f on a goroutine of its own, recovered.
func (r *reads) Go(f func()) {
	r.WaitGroup.Go(func() {
		returned := false
		defer func() {
			if recover(); !returned {
				r.fallen.Store(true)
			}
		}()
		f()
		returned = true
	})
}

// Wait waits for all, and panics if one of them did not return.
func (r *reads) Wait() {
	r.WaitGroup.Wait()
	if r.fallen.Load() {
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

// status is 200, 400 where the query was wrong, or 503 where something could not
// be read.
func (p *page) status() int {
	status := http.StatusOK
	for _, err := range p.errors() {
		switch {
		case errors.Is(err, mesh.ErrInvalidRoom), errors.Is(err, mesh.ErrInvalidOptions):
			return http.StatusBadRequest
		case err != nil:
			status = http.StatusServiceUnavailable
		}
	}
	return status
}

func (p *page) errors() (errs []error) {
	if p.Servers != nil {
		errs = append(errs, p.Servers.err)
	}
	if p.Room != nil {
		errs = append(errs, p.Room.err)
	}
	if p.Rooms != nil {
		errs = append(errs, p.Rooms.err)
	}
	if p.Watched != nil {
		errs = append(errs, p.Watched.err)
	}
	return errs
}

func failed(err error) part {
	if err == nil {
		return part{}
	}
	return part{Error: err.Error(), err: err}
}

func serversOf(list []mesh.ServerInfo, err error) *serversPart {
	s := &serversPart{part: failed(err), List: make([]server, len(list))}
	for i, info := range list {
		one := server{
			Incarnation: info.Incarnation, Self: info.Self, State: "living", LeaseLeft: seconds(info.LeaseLeft),
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
	return watchedOf(h.source.Rooms(), ctx, mesh.WatchedQuery{Prefix: q.prefix, Stale: q.stale, After: q.after, Limit: limit})
}

func watchedOf(rooms *mesh.RoomManager, ctx context.Context, q mesh.WatchedQuery) *watchedPart {
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

// only leaves nothing but the room of that name, which sorts before all others
// that begin with it.
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
	found, err := h.source.Rooms().Entries(ctx, q.room, mesh.EntryQuery{Cursor: q.cursor, Limit: limit})
	r := &roomPart{
		part: failed(err), Name: q.room, Epoch: found.Epoch, Seq: found.Seq, Total: found.Total,
		Hidden: h.opts.HideData, Entries: make([]entry, len(found.Entries)), Next: found.Next,
	}
	if err == nil {
		r.Now = found.Now.UTC()
	}
	for i, e := range found.Entries {
		one := entry{
			ConnectionID: e.ConnectionID, ID: e.ID, Server: e.Server, JoinedAt: e.JoinedAt.UTC(), TTL: seconds(e.TTL), Seq: e.Seq,
		}
		if !h.opts.HideData {
			one.Metadata, one.State, one.StateSilent = valid(e.Metadata), valid(e.State), e.StateSilent
			if !e.StateUntil.IsZero() {
				until := e.StateUntil.UTC()
				one.StateUntil = &until
			}
		}
		r.Entries[i] = one
	}
	return r
}

// valid returns JSON as it is, and anything else as a string: what somebody has
// put into Redis by hand must not keep the page from being made.
func valid(data json.RawMessage) json.RawMessage {
	if data == nil || json.Valid(data) {
		return data
	}
	text, _ := json.Marshal(string(data)) // of a string there is no error
	return text
}

// owners says of each entry what is known of its server.
func (r *roomPart) owners(servers *serversPart) {
	if servers.err != nil {
		return
	}
	known := make(map[string]server, len(servers.List))
	for _, s := range servers.List {
		known[s.Incarnation] = s
	}
	for i := range r.Entries {
		e := &r.Entries[i]
		s, ok := known[e.Server]
		if e.ServerState = s.State; !ok {
			e.ServerState = "unknown"
		}
		e.Self = s.Self
	}
}
