// Package watch lets viewers see rooms: it holds the subscriptions of this server, asks
// their guards again if something changes that guards look at, and checks requests that
// read a room.
package watch

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
)

// Hub is what Access needs of a *hub.Hub.
type Hub interface {
	Load(ctx context.Context, room string) (release func(), settled bool, err error)
	Watch(ctx context.Context, room string, sink hub.Sink, ready func(hub.View)) error
	WatchNow(room string, sink hub.Sink, ready func(hub.View)) error
	Page(room string, sink hub.Sink, at hub.PageCursor, limit int, ready func(hub.Page)) bool
	Unwatch(room string, sink hub.Sink) bool
}

// Config is the configuration of Access. All fields are required.
type Config struct {
	Hub     Hub
	Numbers Numbers
	Rules   *guards.RuleSet
	Cache   *guards.Cache
	Joins   *guards.Joins
	// Context ends when the server has stopped.
	Context context.Context
	// Member returns the function that returns a connection as guards see it.
	Member func(conn string) guards.MemberFunc
	// InRoom returns the connections of this server that are in a room.
	InRoom func(room string) []*local.Conn
	// CheckViewer returns an error if a viewer must not begin to watch.
	CheckViewer func(viewer string) error
	// Before is called before each update is delivered. It must not block.
	Before func()
	// Limit is the time that a subscription waits for Redis, and EarlyLimit returns it
	// for one that is Early.
	Limit      time.Duration
	EarlyLimit func(room string) time.Duration
	// ToError turns an error of an internal package into one for the app, which has
	// waited with ctx.
	ToError func(ctx context.Context, err error) error
}

// Access holds the subscriptions of this server and decides who may see a room. It is safe
// for concurrent use.
type Access struct {
	cfg  Config
	work sync.WaitGroup // rechecks

	life context.Context // of these
	quit context.CancelFunc

	mu       sync.Mutex // guards the fields below
	closed   bool
	byViewer map[string]map[*Subscription]*recheck // nil: no recheck runs
	byRoom   map[string]map[*Subscription]struct{}
	counted  occupancyIndex
}

// New returns an Access without subscriptions.
func New(c Config) *Access {
	a := &Access{cfg: c, byViewer: make(map[string]map[*Subscription]*recheck), byRoom: make(map[string]map[*Subscription]struct{})}
	a.life, a.quit = context.WithCancel(c.Context)
	return a
}

// Check serves a client's request. It returns nil if the room is tracked and its guards let
// the viewer see it (empty: the app itself), and errs.NotTracked or errs.Refused otherwise.
// An old answer of the guards does not count: see guards.Fresh. EndIfRefused has the other
// effects of a no.
func (a *Access) Check(ctx context.Context, viewer, room string) error {
	_, err := a.request(ctx, viewer, room)
	return err
}

// request is Check that also returns the decision.
func (a *Access) request(ctx context.Context, viewer, room string) (guards.Decision, error) {
	d, err := a.decide(ctx, viewer, guards.Fresh(room))
	a.EndIfRefused(viewer, room, err)
	return d, err
}

// EndIfRefused ends the subscriptions of a viewer to a room if err, with which the guards
// have answered a request, means that they said no. A guard that failed refuses only the
// request. Otherwise active clients would lose all their subscriptions while a database is
// away.
func (a *Access) EndIfRefused(viewer, room string, err error) {
	if err == errs.Refused {
		a.recheckViewerIn(viewer, room)
	}
}

// decide is Check for any question.
func (a *Access) decide(ctx context.Context, viewer string, q guards.Question) (guards.Decision, error) {
	if viewer == "" {
		if !a.cfg.Rules.Match(q.Room).Tracked {
			return guards.Decision{}, guards.NotTracked(q.Room)
		}
		return guards.Decision{OK: true}, nil
	}
	d, err := a.cfg.Cache.Decide(ctx, viewer, a.cfg.Member(viewer), q)
	if err == nil && !d.OK {
		err = errs.Refused
	}
	return d, err
}

// Read answers a client's request with the result of read, or with none if the guards do
// not let the viewer see the room. Because read may wait for Redis, Read checks after it
// that the answer of the guards still stands.
func (a *Access) Read(ctx context.Context, viewer, room string, none any, read func() (any, error)) (any, error) {
	d, err := a.request(ctx, viewer, room)
	var found any
	if err == nil {
		found, err = read()
	}
	if err == nil {
		_, err = a.decide(ctx, viewer, guards.Question{Room: room, Last: d.By})
	}
	switch {
	case err == nil:
		return found, nil
	case IsRefusal(err):
		return none, nil
	}
	return nil, err
}

// IsRefusal reports whether an error is an answer and not a failure: the room is not
// tracked, or a guard has refused.
func IsRefusal(err error) bool {
	return errors.Is(err, errs.Refused) || errors.Is(err, errs.NotTracked)
}

// Revoke takes a connection out of a room and asks the guards again if it may still see the
// room. Until they have answered, nothing is delivered to it. They are asked once more when
// it is out, because a guard may have found it still in.
func (a *Access) Revoke(ctx context.Context, c *local.Conn, room string) (bool, error) {
	again := func() {
		a.cfg.Cache.InvalidateRoom(c.ID(), room)
		a.recheckViewerIn(c.ID(), room)
	}
	again()
	was, err := a.cfg.Joins.Leave(ctx, c, room, store.CauseRemoved)
	if was {
		again()
	}
	return was, err
}

// Recheck asks the guards and join guards again about everything that a connection sees and
// every room that it is in. It does not wait for their answers.
func (a *Access) Recheck(c *local.Conn) {
	a.cfg.Cache.Invalidate(c.ID())
	a.RecheckViewer(c.ID())
	a.RecheckMember(c)
}

// RecheckMember asks the join guards again about every room that a connection is in. It
// does not wait for their answers.
func (a *Access) RecheckMember(c *local.Conn) {
	a.cfg.Joins.RecheckAll(c)
	for _, room := range c.Rooms() {
		a.cfg.Joins.Recheck(c, room)
	}
}

// RecheckRoom asks the guards and join guards again about a room, for all connections of
// this server. It does not wait for their answers.
func (a *Access) RecheckRoom(room string) {
	a.RecheckViewers(room)
	a.cfg.Joins.RecheckOf(room)
	for _, c := range a.cfg.InRoom(room) {
		a.cfg.Joins.Recheck(c, room)
	}
}

// RecheckViewers asks the guards again about the viewers of a room. It does not wait for
// their answers.
func (a *Access) RecheckViewers(room string) {
	a.cfg.Cache.InvalidateAllOf(room)
	a.RecheckRooms([]string{room})
}

// RecheckAll asks the guards again about everything that connections see. It does not wait
// for their answers.
func (a *Access) RecheckAll() {
	a.cfg.Cache.InvalidateAll()
	a.RecheckRooms(a.Rooms())
}
