package mesh

import (
	"context"
	"time"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/internal/watch"
)

// init gives the tests under internal/e2e access to the parts of a server.
func init() {
	testhook.PartsOf = func(owner any) testhook.Parts {
		n := coreOf(owner)
		return testhook.Parts{
			Store: n.store, Keys: n.keys, Wheel: n.wheel, Lease: n.lease, Local: n.local, Hub: n.hub, Listener: n.redis.listener,
			Redis: n.opts.Redis, Logger: n.opts.Logger, LeaseTTL: n.opts.LeaseTTL,
		}
	}
	testhook.SetSeams = func(options any, at func(*store.Store) testhook.Seams) {
		options.(*Options).edge = at
	}
	testhook.SetFiles = func(options any, files func() (int, bool)) { options.(*Options).files = files }
	testhook.LimitsOf = func() testhook.Limits {
		return testhook.Limits{Call: callLimit, Away: awayLimit, Fail: awayFor, Stop: stopGrace}
	}
	testhook.NewKeys = func(prefix string, db, buckets int, cluster bool) store.Keys {
		return keys.Space{Prefix: prefix, DB: db, Spread: buckets, Cluster: cluster}
	}
	testhook.JoinAsClient = func(ctx context.Context, owner any, conn *local.Conn, room string) (local.Joined, error) {
		return coreOf(owner).joinNowOrLater(ctx, conn, room, "")
	}
	testhook.JoinInPlaceOf = func(ctx context.Context, owner any, conn *local.Conn, room, replaces string) (local.Joined, error) {
		return coreOf(owner).joinNowOrLater(ctx, conn, room, replaces)
	}
	testhook.SubscribeEarly = subscribeEarly
	testhook.IsAway = func(owner any, room string) bool { return coreOf(owner).isAway(room) }
	testhook.OpenJoins = func(owner any) int { return coreOf(owner).access.joins.Open() }
	testhook.Subscriptions = func(owner any, room string) int { return coreOf(owner).access.Count(room) }
	testhook.TTL = func(owner any, room string) time.Duration { return coreOf(owner).access.rules.Match(room).TTL }
	testhook.Callbacks = func(owner any) map[string]testhook.Callback {
		counts := make(map[string]testhook.Callback)
		for name, c := range coreOf(owner).calls.Stats() {
			counts[name] = testhook.Callback{Errors: c.Errors, Panics: c.Panics, Timeouts: c.Timeouts}
		}
		return counts
	}
	testhook.SocketPanics = func(server any) int64 { return server.(*Server).sockets.Counts().Panics }
	testhook.QueueBytes = func(conn any) int { return conn.(*Connection).sock.QueueBytes() }
	testhook.AddExpired = func(owner any, room, conn string) {
		coreOf(owner).redis.expired.Add(keys.Expired{Kind: keys.ConnExpired, Room: room, Conn: conn})
	}
	testhook.ExpiredWaiting = func(owner any) int { return coreOf(owner).redis.expired.Stats().Waiting }
	testhook.AnswersFalse = answersFalse
	testhook.WireError = wireError
}

// coreOf returns the core of a *Server or a *PresenceManager, or of a test's type that
// embeds one.
func coreOf(owner any) *core { return owner.(interface{ common() *core }).common() }

func (s *Server) common() *core          { return s.n }
func (p *PresenceManager) common() *core { return p.n }

// subscribeEarly is testhook.SubscribeEarly.
func subscribeEarly(ctx context.Context, manager any, room string, yield func(event any, err error) bool) {
	p := manager.(*PresenceManager)
	out := newQueueOutlet(p.n, room)
	s := &watch.Subscription{Room: room, Out: out, MaxBytes: p.n.opts.Limits.QueueBytes, Early: true}
	p.follow(ctx, s, out, func(e Event, err error) bool { return yield(e, err) })
}
