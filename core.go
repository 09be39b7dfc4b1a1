package mesh

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/channels"
	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/encode"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/kept"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/occupancy"
	"github.com/meshpresence/mesh/internal/peers"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

const (
	// callLimit limits the time that a request waits for Redis or for another server.
	callLimit = peers.CallLimit
	// lookLimit limits the time of an inspection, regardless of its number of calls to
	// Redis.
	lookLimit = 2 * time.Second
)

// wheelStep is the resolution of the timing wheel.
const wheelStep = 50 * time.Millisecond

// core is the common part of a Server and a bare PresenceManager: one member of the
// group of servers that share a Redis. It wires the parts together, and starts and
// stops them. The parts do the work.
type core struct {
	opts  Options
	logs  limit.Shield // around opts.Logger
	keys  keys.Space
	store *store.Store
	wheel *clock.Wheel

	redis  redisLink         // the state of Redis, and its messages
	lease  *lease.Lease      // keeps this server registered, and declares others dead
	local  *local.Registry   // the connections of this server, and the writing of their entries
	hub    *hub.Hub          // mirrors of the watched rooms
	kept   *kept.Sweeper     // ends kept places whose time is over
	counts *occupancy.Rooms  // the numbers of rooms, for those that need no lists
	peers  *peers.Peers      // calls other servers, and handles their calls
	calls  *callbacks.Runner // calls the functions of the app
	access access            // rules, guards and subscriptions
	users  users             // of the connections

	sockets sockets
	life    lifecycle
}

// access is the part of a core that decides which connections may be in a room, and
// which may see it.
type access struct {
	*watch.Access // the subscriptions

	rules  guards.RuleSet
	guards *guards.Cache // keeps the answers of the guards
	joins  *guards.Joins // asks the join guards
	slow   atomic.Uint64 // number of slow subscriptions
}

// sockets are the functions of a Server that its core needs. The zero value stands for a
// core without sockets.
type sockets struct {
	deliver    func(conn string, f *wire.Frame) bool
	close      func(conn string, app bool) bool
	replaced   func(conn string)           // closes the socket of a connection that was replaced
	checkFiles func(context.Context) error // checks that sockets leave file descriptors for Redis
	away       func()                      // is called if Redis may be away; see redisAway
}

// newCore returns a core that start has to start.
func newCore(opts Options, with sockets) (*core, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &core{sockets: with}
	opts.Logger = n.logs.Logger(opts.Logger)
	if opts.Name != "" {
		opts.Logger = opts.Logger.With("server", opts.Name)
	}
	n.opts = opts
	n.life.begin()
	n.keys = opts.keySpace()
	n.users.of, n.users.log = opts.UserID, limit.NewLog(opts.Logger)
	n.users.places = kept.NewPerUser(opts.Limits.DisconnectedPerUser)
	n.store = n.newStore()
	at := testhook.Seams{Local: n.store, Lease: n.store, Hub: n.store}
	if opts.edge != nil {
		at = opts.edge(n.store)
	}
	n.wheel = clock.NewWheel(wheelStep)
	n.calls = callbacks.New(n.life.ctx, callbacks.Config{
		Logger: opts.Logger, IsAnswer: isAnswer, Typed: typedErrors, Known: []error{store.ErrFull},
	})
	n.redis.listener = store.NewListener(store.ListenerConfig{Client: opts.Redis, Handler: n, Logger: opts.Logger, Name: "events"})
	n.redis.rooms = channels.New(roomChannels{n}, n.life.work.Go)
	toHub := n.redis.rooms.NewShare()
	n.hub = hub.New(n.hubConfig(at.Hub, toHub))
	toHub.Connect(n.hub)
	n.openCounts()
	n.openAccess()
	n.lease = lease.New(n.leaseConfig(at.Lease))
	n.kept = kept.New(n.keptConfig(at.Kept))
	n.local = local.New(n.localConfig(at))
	n.peers = peers.New(n.peersConfig())
	n.linkRedis()
	return n, nil
}

// newStore returns the store of this server.
func (n *core) newStore() *store.Store {
	s := store.New(n.opts.Redis, n.keys)
	s.RequireLease()
	s.Named(n.opts.Name)
	if n.hasUsers() {
		s.CountUsers()
	}
	s.TrackedBy(func(room string) bool { return n.access.rules.Match(room).Tracked })
	return s
}

// openCounts fills in n.counts. It needs the channels of rooms.
func (n *core) openCounts() {
	share := n.redis.rooms.NewShare()
	n.counts = occupancy.New(occupancy.Config{
		Store: n.store, Listener: share, Wheel: n.wheel,
		Interval: func(room string) time.Duration { return n.access.rules.Match(room).OccupancyInterval },
		Bucket:   n.keys.RoomBucket, UncertainFor: n.opts.LeaseTTL + time.Second, Logger: n.opts.Logger,
	})
	share.Connect(n.counts)
}

// openAccess fills in n.access. It needs the hub and the numbers of rooms.
func (n *core) openAccess() {
	a := &n.access
	a.guards = guards.NewCache(guards.Config{
		Rules: &a.rules, Calls: n.calls, GuardTimeout: n.opts.GuardTimeout, JoinTimeout: n.opts.HookTimeout, Keep: n.opts.keptAnswers(),
	})
	a.joins = guards.NewJoins(guards.JoinConfig{
		Cache: a.guards, Rules: &a.rules, Context: n.life.ctx, Member: n.member, OnTakenOut: n.tellMembershipEnded, ToError: errorFor,
		Conn: func(id string) (*local.Conn, bool) { return n.local.Conn(id) },
	})
	a.Access = watch.New(watch.Config{
		Hub: n.hub, Numbers: n.counts, Rules: &a.rules, Cache: a.guards, Joins: a.joins, Context: n.life.ctx, Member: n.member, CheckViewer: n.checkViewer,
		InRoom: func(room string) []*local.Conn { return n.local.InRoom(room) },
		Before: func() { n.redis.RecheckIfLeaseLapsed() }, Limit: callLimit, EarlyLimit: n.waitLimit, ToError: errorFor,
	})
}

func (n *core) hubConfig(at hub.Store, rooms hub.Listener) hub.Config {
	return hub.Config{
		Store: at, Listener: rooms, UnconfirmedFor: n.opts.LeaseTTL + time.Second, Bucket: n.keys.RoomBucket,
		AskOwner: n.ownerAsker(), Now: n.now, Listed: n.opts.Limits.SnapshotMembers,
		CountUsers: n.hasUsers(),
		Overdue:    func(room string, o hub.Overdue) { n.kept.Add(room, o.Conn, o.Entry, o.Until) },
		Logger:     n.opts.Logger,
	}
}

func (n *core) leaseConfig(at lease.Store) lease.Config {
	return lease.Config{
		Store: at, TTL: n.opts.LeaseTTL, Buckets: n.keys.Buckets(), Channel: n.keys.ServerChannel, Logger: n.opts.Logger,
		Watching: func() bool { return n.hub.Watching() || n.counts.Watching() },
		OnAway:   func() { n.redis.RedisAway() },
		Kept:     func(room, conn, entry string, until int64) { n.kept.Add(room, conn, entry, until) },
		OnRenew:  n.leaseRenewed, OnReregistered: n.reregistered, OnNoEcho: n.redis.listener.Recreate,
	}
}

func (n *core) keptConfig(at kept.Store) kept.Config {
	if at == nil {
		at = n.store
	}
	return kept.Config{
		Store: at, Wheel: n.wheel, Buckets: n.keys.Buckets(), Bucket: n.keys.RoomBucket, Clock: n.lease.Now, Proof: n.lease.ClockProof,
		ClockRefused: n.lease.ClockRefused, Enabled: n.hasUsers, Heartbeat: n.opts.LeaseTTL / 3, Logger: n.opts.Logger,
		MayEnd: func(bucket int, deadline int64) bool { return n.lease.MayEnd(n.store.Writes(bucket), deadline) },
	}
}

func (n *core) localConfig(at testhook.Seams) local.Config {
	return local.Config{
		Store: at.Local, Wheel: n.wheel, Buckets: n.keys.Buckets(), RoomBucket: n.keys.RoomBucket, ConnBucket: n.keys.ConnBucket,
		Incarnation: n.lease.Incarnation, Fenced: n.lease.Fenced, RenewLease: n.lease.RenewNow, Answered: n.store.Answered,
		UserOf:     n.userFunc(),
		TTL:        func(room string) time.Duration { return n.access.rules.Match(room).TTL },
		Grace:      func(room string) time.Duration { return n.access.rules.Match(room).Grace },
		Caps:       n.capsOf,
		RebuildFor: n.opts.LeaseTTL + time.Second,
		Kept:       n.placeKept, Full: n.joinFull, Replaced: n.placeTaken,
		StateInterval: func(room string) time.Duration { return n.access.rules.Match(room).StateInterval },
		Heartbeat:     n.opts.LeaseTTL / 3,
		BatchOps:      at.Batch, EndSilent: n.opts.expirationEvents(), MaxRooms: n.opts.Limits.RoomsPerConnection,
		OnPosition: n.hub.Expect, MetaChanged: func(c *local.Conn) { n.access.RecheckViewer(c.ID()) }, UserMoved: n.access.RecheckMember, MayReturn: n.access.joins.MayReturn,
		Logger: n.opts.Logger,
	}
}

// now returns the clock of Redis in Unix milliseconds. Event times that subscribers see
// come from it alone, so that a wrong clock of a server does not matter.
func (n *core) now() int64 {
	if ms, ok := n.lease.Now(); ok {
		return ms
	}
	return time.Now().UnixMilli() // Redis has never answered
}

// member returns a function that reads a local connection for guards.
func (n *core) member(conn string) guards.MemberFunc {
	return func() (guards.Member, uint64) {
		c, ok := n.local.Conn(conn)
		if !ok {
			return guards.Member{ID: conn}, 0
		}
		meta, version := c.Metadata()
		return guards.Member{ID: conn, UserID: c.User(), Metadata: meta}, version
	}
}

// checkViewer returns an error if a viewer may not begin to watch. A viewer that is
// being closed may not, because its subscriptions have ended or are ending.
func (n *core) checkViewer(viewer string) error {
	if viewer == "" {
		return nil
	}
	c, err := n.conn(viewer)
	if err == nil && c.Closing() {
		err = ErrClosed
	}
	return err
}

// trackPresence adds a rule, also for existing entries, subscriptions and pending joins.
func (n *core) trackPresence(pattern Pattern, opts PresenceOptions) error {
	if err := pattern.validate(); err != nil {
		return err
	}
	if err := opts.validate(n.hasUsers()); err != nil {
		return fmt.Errorf("%w (pattern %v)", err, pattern)
	}
	n.access.rules.Add(pattern.inner(), opts.inner())
	n.obeyRule(pattern.inner())
	return nil
}

// untrackPresence removes a rule, also for existing entries, subscriptions and pending
// joins.
func (n *core) untrackPresence(pattern Pattern) bool {
	if pattern.validate() != nil || !n.access.rules.Remove(pattern.inner()) {
		return false
	}
	n.obeyRule(pattern.inner())
	return true
}

// obeyRule applies a change of a rule to the rooms that match it. Later joins and
// subscriptions use the new rules anyway.
func (n *core) obeyRule(p guards.Pattern) {
	n.local.ApplyRules(p.Among(n.local.Rooms))
	n.counts.ApplyRules(p.Among(n.counts.Rooms))
	n.access.RecheckRooms(p.Among(n.access.Rooms))
}

// checkRoom returns an error if a room name is invalid.
func (n *core) checkRoom(room string) error {
	return keys.ValidateRoomName(room, n.opts.Limits.RoomNameBytes)
}

// conn returns a connection of this server, or ErrUnknownConnection.
func (n *core) conn(id string) (*local.Conn, error) {
	if err := keys.ValidateConnectionID(id); err != nil {
		return nil, err
	}
	c, ok := n.local.Conn(id)
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrUnknownConnection, id)
	}
	return c, nil
}

// checkRunningCtx is checkRunning for a method that takes a context from the app.
func (n *core) checkRunningCtx(ctx context.Context) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	return n.checkRunning()
}

// checkUsable returns an error if ctx is nil, the core is not running, or the room name
// is invalid.
func (n *core) checkUsable(ctx context.Context, room string) error {
	if err := n.checkRunningCtx(ctx); err != nil {
		return err
	}
	return n.checkRoom(room)
}

func (n *core) checkRunning() error {
	switch n.running() {
	case stateNew:
		return ErrNotStarted
	case stateStopped:
		return ErrClosed
	}
	return nil
}

func (n *core) connIn(ctx context.Context, room, connID string) (*local.Conn, error) {
	if err := n.checkUsable(ctx, room); err != nil {
		return nil, err
	}
	return n.conn(connID)
}

// connect registers a connection. If a connection with the same id is closing, connect
// waits for its end.
func (n *core) connect(ctx context.Context, id string, metadata []byte, link local.Link) (*local.Conn, error) {
	if err := n.checkRunning(); err != nil {
		return nil, err
	}
	if err := keys.ValidateConnectionID(id); err != nil {
		return nil, err
	}
	for {
		c, err := n.local.Connect(id, metadata, link, func() { n.access.guards.AddConn(id) })
		if err == nil {
			return c, nil
		}
		gone := n.local.Closing(id)
		if _, open := n.local.Conn(id); open || !errors.Is(err, local.ErrExists) || gone == nil {
			return nil, errorFor(ctx, err)
		}
		if err := n.awaitRemoved(ctx, gone); err != nil {
			return nil, err
		}
	}
}

// departure says how the entries of a connection end.
type departure struct {
	cause store.Cause
	keep  bool // the connection has not asked to leave, so its places are kept for Grace
}

// The departures. The first is that of a connection that the app has closed.
var (
	departRemoved  = departure{cause: store.CauseRemoved}
	departClosed   = departure{cause: store.CauseClosed, keep: true}
	departLost     = departure{cause: store.CauseLost, keep: true}
	departExpelled = departure{cause: store.CauseClosed} // for breaking the protocol
)

// close ends a connection, and its socket if it has one.
func (n *core) close(c *local.Conn, d departure) {
	if n.sockets.close != nil {
		n.sockets.close(c.ID(), !d.keep)
	}
	n.disconnect(c, d)
}

// disconnect ends a connection: its subscriptions, its entries, its metadata.
func (n *core) disconnect(c *local.Conn, d departure) {
	if !c.BeginClose() {
		return // another caller has begun it
	}
	// The id is free for another connection as soon as this one is closed, so remove
	// everything that is kept under the id first.
	n.access.joins.TakeOutAll(c)
	n.access.Forget(c.ID())
	n.access.guards.RemoveConn(c.ID())
	c.Close(d.cause, d.keep)
}

func (n *core) awaitRemoved(ctx context.Context, gone <-chan struct{}) error {
	t := time.NewTimer(callLimit)
	defer t.Stop()
	select {
	case <-gone:
		return nil
	case <-t.C:
		return ErrUnavailable
	case <-ctx.Done():
		return errs.Ended(ctx)
	}
}

// userFunc returns the function that package local calls for users, nil without users.
func (n *core) userFunc() func(conn string, metadata []byte) string {
	if !n.hasUsers() {
		return nil
	}
	return n.users.userOf
}

// tellMembershipEnded tells a socket that a join guard has taken its connection out of a
// room.
func (n *core) tellMembershipEnded(conn, room string) {
	n.push(conn, wire.PushMembershipEnded, wire.Ended{RoomName: room})
}

// push sends a frame of the protocol to the socket of a connection, if it has one here.
func (n *core) push(conn, command string, payload any) {
	if n.sockets.deliver == nil {
		return
	}
	if f, err := wire.Push(command, payload); err == nil {
		n.sockets.deliver(conn, f)
	}
}

// encoder returns the encoder of values that the app passes to a method.
func (n *core) encoder() encode.Encoder {
	return encode.Encoder{Calls: n.calls, Timeout: n.opts.HookTimeout}
}

// appFrame encodes a frame of the app.
func (n *core) appFrame(ctx context.Context, command string, payload any) (peers.Frame, error) {
	if wire.IsReserved(command) {
		return peers.Frame{}, fmt.Errorf("%w: %q", ErrInvalidCommand, command)
	}
	data, err := n.encoder().Encode(ctx, payload, nil, encode.Marshal)
	if err != nil {
		return peers.Frame{}, fmt.Errorf("mesh: payload of %q: %w", command, err)
	}
	return peers.Frame{Command: command, Payload: data}, nil
}
