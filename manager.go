package mesh

import (
	"context"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/expired"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/store"
)

// PresenceManager reads which connections are in which rooms, and lets an app with a
// transport of its own (Server-Sent Events, long polling, …) take part. Such an app
// chooses its connection ids and reports when a connection joins, shows a sign of life,
// and leaves.
//
// A Server has a manager ([Server.Presence]). NewPresenceManager creates one without
// WebSockets, which must be started and shut down by itself. All methods are safe for
// concurrent use. Each call waits for Redis for at most two seconds and then returns an
// error that wraps [ErrUnavailable]. A join or leave that failed this way is still
// carried out when Redis is back.
//
// The TypeScript server's presenceManager.
type PresenceManager struct {
	n        *core
	ofServer bool // the Server starts and stops the core
}

// errOfServer is returned if a Server's manager is started or shut down.
var errOfServer = fmt.Errorf("%w: this manager belongs to a Server: start and shut down the Server", ErrInvalidOptions)

// NewPresenceManager returns a manager that takes part in the presence of all servers
// that share opts.Redis and opts.Prefix, without serving WebSockets itself. Call
// [PresenceManager.Start] before any method except [PresenceManager.TrackPresence], and
// [PresenceManager.Shutdown] at the end. Options about sockets and requests have no
// effect. Errors wrap [ErrInvalidOptions].
func NewPresenceManager(opts Options) (*PresenceManager, error) {
	n, err := newCore(opts, sockets{})
	if err != nil {
		return nil, err
	}
	return &PresenceManager{n: n}, nil
}

// Start joins the group of servers. It returns when Redis has answered and
// subscriptions are confirmed, and retries until then or until ctx ends. After an error
// it may be called again. After a success further calls do nothing. For the manager of
// a Server it returns an error. Errors are as for [Server.Start].
func (p *PresenceManager) Start(ctx context.Context) error {
	if p.ofServer {
		return errOfServer
	}
	return p.n.start(ctx)
}

// Ready returns nil from the end of Start ([ErrNotStarted] before) until Shutdown
// begins ([ErrClosed] from then on, and for a Server's manager also from its Drain on).
// It answers from memory without waiting, and stays nil while Redis is unavailable, as
// [Server.Ready] does.
func (p *PresenceManager) Ready(ctx context.Context) error { return p.n.ready(ctx) }

// Shutdown ends all connections that were joined here, in batches, and stops everything
// that Start started. It is bounded by ctx. Without a deadline it waits while Redis is
// unavailable. It may be called again. For the manager of a Server it returns an error
// and does nothing.
func (p *PresenceManager) Shutdown(ctx context.Context) error {
	if p.ofServer {
		return errOfServer
	}
	return p.n.stop(ctx)
}

// TrackPresence adds a rule, as [Server.TrackPresence] does.
func (p *PresenceManager) TrackPresence(pattern Pattern, opts PresenceOptions) error {
	return p.n.trackPresence(pattern, opts)
}

// UntrackPresence removes a rule, as [Server.UntrackPresence] does.
func (p *PresenceManager) UntrackPresence(pattern Pattern) bool { return p.n.untrackPresence(pattern) }

// Connections returns the manager of connections.
func (p *PresenceManager) Connections() *ConnectionManager { return &ConnectionManager{n: p.n} }

// Rooms returns the manager of rooms.
func (p *PresenceManager) Rooms() *RoomManager { return &RoomManager{n: p.n} }

// PresentConnections returns the ids of the connections in the room, in no particular
// order, as Redis holds them. No guard is asked, because the app itself is asking. The
// room need not be tracked.
//
// The TypeScript server's presenceManager.getPresentConnections.
func (p *PresenceManager) PresentConnections(ctx context.Context, room string) ([]string, error) {
	return p.Rooms().ConnectionIDs(ctx, room)
}

// Members returns all members of the room with their metadata and states, in no
// particular order, as Redis holds them. The room need not be tracked. The number is
// not limited: rooms of more than 500 members are read in pages, so that a connection
// that joins or leaves during the read may or may not be included. No guard is asked.
func (p *PresenceManager) Members(ctx context.Context, room string) ([]Member, error) {
	if err := p.n.checkUsable(ctx, room); err != nil {
		return nil, err
	}
	records, _, err := p.n.store.Some(ctx, room, -1)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	return membersOf(records), nil
}

// Snapshot returns all members of a tracked room as of one Seq, however many there are.
// No guard is asked. If this server does not mirror the room, it reads the room from
// Redis. If Redis does not answer for about two seconds, it returns the last known members
// with Stale set, or [ErrUnavailable] if there are none. It returns [ErrNotTracked] for a
// room without a rule.
func (p *PresenceManager) Snapshot(ctx context.Context, room string) (*Snapshot, error) {
	if err := p.n.checkUsable(ctx, room); err != nil {
		return nil, err
	}
	if !p.n.access.rules.Match(room).Tracked {
		return nil, guards.NotTracked(room)
	}
	limited, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	v, err := p.n.hub.Whole(limited, room)
	switch {
	case err == nil:
		return snapshotOf(room, v), nil
	case ctx.Err() != nil:
		return nil, errs.Ended(ctx)
	case limited.Err() == nil:
		return nil, errorFor(ctx, err)
	}
	if v, ok := p.n.hub.StaleView(room); ok && !v.Bounded {
		s := snapshotOf(room, v)
		s.Stale = true
		return s, nil
	}
	return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// Users groups the members of a room by user, as [PresenceManager.Members] reads them.
// Users are sorted by id. Each connection without a user is one User without an id, and
// these come first. It returns [ErrUsersOff] without Options.UserID.
func (p *PresenceManager) Users(ctx context.Context, room string) ([]User, error) {
	if err := p.n.checkUsers(); err != nil {
		return nil, err
	}
	members, err := p.Members(ctx, room)
	if err != nil {
		return nil, err
	}
	return groupByUser(members), nil
}

// Count returns the number of connections in the room, tracked or not, without listing
// them.
func (p *PresenceManager) Count(ctx context.Context, room string) (int, error) {
	if err := p.n.checkUsable(ctx, room); err != nil {
		return 0, err
	}
	count, err := p.n.store.Count(ctx, room)
	return count, errorFor(ctx, err)
}

// Counts returns the number of connections in each of the rooms, tracked or not. A use
// is a list of documents with the number of people that look at each. It asks Redis for
// up to 1,024 rooms in one round trip, and on a Cluster asks all nodes at the same
// time. The map contains every given room, also empty ones with 0. A room that is given
// twice is asked for once. Without rooms the map is empty, and Redis is not asked.
//
// Either all rooms are counted or none. An invalid name is [ErrInvalidRoom], and Redis
// is not asked then. If any node does not answer, the error wraps [ErrUnavailable].
// Each round trip waits for at most two seconds. The rooms are not counted at the same
// moment.
func (p *PresenceManager) Counts(ctx context.Context, rooms ...string) (map[string]int, error) {
	if err := p.n.checkRunningCtx(ctx); err != nil {
		return nil, err
	}
	counts := make(map[string]int, len(rooms))
	names := make([]string, 0, len(rooms))
	for _, room := range rooms {
		if _, twice := counts[room]; twice {
			continue
		}
		if err := p.n.checkRoom(room); err != nil {
			return nil, err
		}
		counts[room] = 0
		names = append(names, room)
	}
	sizes, err := p.n.store.Counts(ctx, names)
	if err != nil {
		return nil, errorFor(ctx, err)
	}
	for i, size := range sizes {
		counts[names[i]] = int(size)
	}
	return counts, nil
}

// Connect registers a connection of the app's own transport with its first metadata
// (any value that encodes to JSON, or nil for none). The app chooses the id: unique
// among all servers, at most 128 bytes of UTF-8 without colon, whitespace and control
// characters. If a connection with that id is closing, Connect waits for its end. It
// returns [ErrConnectionExists] if the connection is open on this server, and
// [ErrInvalidMetadata] or [ErrTooLarge] if the metadata cannot be stored.
//
// The connection counts as alive from then on. Call [PresenceManager.Touch] for every
// sign of life, and [PresenceManager.Disconnect] when it has ended.
func (p *PresenceManager) Connect(ctx context.Context, connID string, metadata any) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	data, err := p.n.appMetadata(ctx, metadata)
	if err != nil {
		return err
	}
	_, err = p.n.connect(ctx, connID, data, nil)
	return err
}

// Disconnect ends a connection of the app's own transport: it leaves all its rooms, and
// its metadata is removed. A room with a Grace may keep the place of its user. For a
// leave at once, call [PresenceManager.Leave] before. It waits until Redis has stored
// that. If Redis does not answer in time, it is done later. If the connection is a
// socket of this server, the socket is closed with code 1000. It returns
// [ErrUnknownConnection] if this server has no such connection.
// [ConnectionManager.Close] closes a connection on any server.
func (p *PresenceManager) Disconnect(ctx context.Context, connID string) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	c, err := p.n.conn(connID)
	if err != nil {
		return err
	}
	p.n.close(c, departClosed)
	return p.n.awaitRemoved(ctx, c.Gone())
}

// Join adds a connection to a room. The connection was registered with Connect or is a
// socket of this server. Join is a sign of life. If the connection is already in the
// room, it stays in without an event, unless a JoinGuard refuses it now.
//
// It returns [ErrUnknownConnection] if this server has no such connection (see
// [RoomManager.Add] for those of other servers), [ErrRefused] if a rule's JoinGuard
// refused or if the connection was removed from the room while Join was waiting,
// [ErrClosed] if the connection ended, [ErrLimit] beyond Limits.RoomsPerConnection, and
// [ErrFull] beyond a cap of the room. If the place of the connection's user is kept
// there, the connection takes it.
//
// If a connection with the same id is in the room on another server, this one takes its
// place, and subscribers see neither a leave nor a join. The other server learns of it
// at its next change there, which fails with [ErrConflict]. Until then joins and leaves
// there succeed without effect.
//
// After [ErrUnavailable] the connection is a member that is not yet in Redis. It is
// joined when Redis is back, unless it leaves, ends or is removed before. To give up
// the join, call Leave. (A client's own join is answered with a stale success in this
// case.)
func (p *PresenceManager) Join(ctx context.Context, room, connID string) error {
	c, err := p.n.connIn(ctx, room, connID)
	if err != nil {
		return err
	}
	c.Touched()
	_, err = p.n.join(ctx, c, room, guards.Request{Within: func() time.Duration { return callLimit }})
	return err
}

// Touch is a sign of life of a connection. It postpones the expiry of all its entries.
// Entries that had expired are joined again, unless a JoinGuard refuses. It makes no
// call to Redis itself and does not wait. It returns [ErrUnknownConnection] if this
// server has no such connection.
func (p *PresenceManager) Touch(connID string) error {
	c, err := p.n.conn(connID)
	if err != nil {
		return err
	}
	c.Touched()
	return nil
}

// Leave removes a connection from a room. It returns false if the connection was not in
// the room. It is a sign of life for the connection's other rooms. It returns
// [ErrUnknownConnection] if this server has no such connection.
func (p *PresenceManager) Leave(ctx context.Context, room, connID string) (bool, error) {
	c, err := p.n.connIn(ctx, room, connID)
	if err != nil {
		return false, err
	}
	// A sign of life too, but not Touched: if the entry had ended by silence, that
	// would join it again, and subscribers would see a join and a leave.
	c.FrameSeen()
	return p.n.access.joins.Leave(ctx, c, room, store.CauseLeft)
}

// Recheck asks the guards and join guards again about every room that a connection of
// this server sees or is in, although neither its metadata nor the rules have changed.
// It does not wait for the answers. [ConnectionManager.Recheck] does the same for a
// connection on any server.
func (p *PresenceManager) Recheck(connID string) error {
	c, err := p.n.conn(connID)
	if err != nil {
		return err
	}
	p.n.access.Recheck(c)
	return nil
}

// CleanExpired ends the entries of a room whose TTL has run out, each with its leave
// event, and returns how many it ended. An app needs it only if
// Options.EnablePresenceExpirationEvents is false. Any server may call it. If several do,
// each entry is ended by one of them.
//
// A server ends entries of other servers only after it has been in contact with Redis for
// one LeaseTTL. Before that, the call waits until ctx ends. The owners of expired entries
// first get half a second in which Redis takes writes (2.5 seconds if connections broke),
// because they may have been unable to refresh them. CleanExpired returns an error that
// wraps [ErrUnavailable] if Redis takes no writes for two seconds. If it returns an error,
// it also returns how many entries it had ended before.
func (p *PresenceManager) CleanExpired(ctx context.Context, room string) (int, error) {
	if err := p.n.checkUsable(ctx, room); err != nil {
		return 0, err
	}
	ended, err := p.n.local.EndLapsed(ctx, room)
	if err != nil {
		return ended, errorFor(ctx, err)
	}
	records, _, err := p.n.store.Some(ctx, room, -1)
	if err != nil {
		return ended, errorFor(ctx, err)
	}
	var conns []string
	of := make(map[string]store.Record)
	for _, r := range records {
		if _, mine := p.n.local.Conn(r.Conn); r.TTL > 0 && !mine {
			conns = append(conns, r.Conn)
			of[r.Conn] = r
		}
	}
	lapsed, err := p.n.store.Lapsed(ctx, room, conns)
	if err != nil || len(lapsed) == 0 {
		return ended, errorFor(ctx, err)
	}
	items := make([]store.CleanUpItem, len(lapsed))
	for i, conn := range lapsed {
		items[i] = store.CleanUpItem{
			Mode: store.GroundExpired, Room: room, Conn: conn, Entry: of[conn].Entry, Incarnation: of[conn].Incarnation,
		}
	}
	cleaner := expired.Cleaner{Store: p.n.store, Lease: p.n.lease, Life: p.n.life.ctx, Kept: p.n.kept.Add}
	more, err := cleaner.CleanUp(ctx, p.n.keys.RoomBucket(room), items)
	return ended + more, errorFor(ctx, err)
}

// Servers returns the servers of the group, as Server.Servers does.
func (p *PresenceManager) Servers(ctx context.Context) ([]ServerInfo, error) { return p.n.servers(ctx) }
