package mesh

import (
	"context"
	"fmt"

	"github.com/meshpresence/mesh/internal/owner"
)

// PresenceManager answers who is where, and lets an app with a transport of
// its own (Server-Sent Events, long polling, …) take part: it hands in
// connection ids of its own and says when they join, show life and leave.
//
// A Server has one ([Server.Presence]); NewPresenceManager makes one without
// WebSockets, which has to be started and shut down by itself. All methods are
// safe for concurrent use. Each call waits for Redis for at most two seconds
// and then returns an error that wraps [ErrUnavailable]; a join or leave that
// ended so is still carried out when Redis is back.
//
// The TypeScript server's presenceManager.
type PresenceManager struct {
	n        *node
	ofServer bool // which starts and stops the node
}

// errOfServer is returned where a Server's manager is started or shut down.
var errOfServer = fmt.Errorf("%w: this manager is a Server's: start and shut down that", ErrInvalidOptions)

// NewPresenceManager returns a manager that takes part in the presence of all
// servers that share opts.Redis and opts.Prefix, without serving WebSockets
// itself. Call [PresenceManager.Start] before anything else but
// [PresenceManager.TrackPresence], and [PresenceManager.Shutdown] at the end.
// What Options say about sockets and requests is of no effect. Errors wrap
// [ErrInvalidOptions].
func NewPresenceManager(opts Options) (*PresenceManager, error) {
	n, err := newNode(opts)
	if err != nil {
		return nil, err
	}
	return &PresenceManager{n: n}, nil
}

// Start joins the group of servers. It returns when Redis has answered and
// subscriptions are confirmed. Until then, while ctx lasts, it keeps trying;
// after an error it may be called again. Once it has succeeded further calls
// do nothing. For the manager of a Server it is an error. Errors as
// [Server.Start].
func (p *PresenceManager) Start(ctx context.Context) error {
	if p.ofServer {
		return errOfServer
	}
	return p.n.start(ctx)
}

// Ready returns nil once Start is through ([ErrNotStarted] before) and until
// Shutdown begins ([ErrClosed] from then on; of a Server's manager also from its
// Drain on). It answers at once, from memory, and stays nil while Redis is
// away, as [Server.Ready] does.
func (p *PresenceManager) Ready(ctx context.Context) error { return p.n.ready(ctx) }

// Shutdown makes everything that was joined here leave, in batches, and stops
// all that Start started. It is bounded by ctx (without a deadline it waits for
// a Redis that is away) and may be called again. For the manager of a Server it
// is an error, and does nothing.
func (p *PresenceManager) Shutdown(ctx context.Context) error {
	if p.ofServer {
		return errOfServer
	}
	return p.n.stop(ctx)
}

// TrackPresence puts a rule in force, as [Server.TrackPresence] does.
func (p *PresenceManager) TrackPresence(pattern Pattern, opts PresenceOptions) error {
	return p.n.trackPresence(pattern, opts)
}

// UntrackPresence takes a rule out of force, as [Server.UntrackPresence] does.
func (p *PresenceManager) UntrackPresence(pattern Pattern) bool { return p.n.untrackPresence(pattern) }

// Connections returns the manager of connections' metadata.
func (p *PresenceManager) Connections() *ConnectionManager { return &ConnectionManager{n: p.n} }

// Rooms returns the manager of rooms.
func (p *PresenceManager) Rooms() *RoomManager { return &RoomManager{n: p.n} }

// PresentConnections returns the ids of the connections that are in the room,
// in no particular order, as Redis holds them. No guard is asked: the app
// itself is asking. The room may have no rule.
//
// The TypeScript server's presenceManager.getPresentConnections.
func (p *PresenceManager) PresentConnections(ctx context.Context, room string) ([]string, error) {
	members, err := p.Members(ctx, room)
	if err != nil {
		return nil, err
	}
	ids := make([]string, len(members))
	for i, m := range members {
		ids[i] = m.ID
	}
	return ids, nil
}

// Members returns all members of the room with their metadata and states, in
// no particular order, as Redis holds them, tracked or not. It is not limited:
// rooms of more than 500 are read in pages, so that who comes or goes meanwhile
// may be in or not. No guard is asked.
func (p *PresenceManager) Members(ctx context.Context, room string) ([]Member, error) {
	if err := p.n.use(ctx, room); err != nil {
		return nil, err
	}
	records, _, err := p.n.store.Some(ctx, room, -1)
	if err != nil {
		return nil, p.n.errorFor(ctx, err)
	}
	return membersOf(records), nil
}

// Count returns how many connections are in the room, tracked or not, without
// listing them.
func (p *PresenceManager) Count(ctx context.Context, room string) (int, error) {
	if err := p.n.use(ctx, room); err != nil {
		return 0, err
	}
	count, err := p.n.store.Count(ctx, room)
	return count, p.n.errorFor(ctx, err)
}

// Connect registers a connection of the app's own transport, with its first
// metadata (any value that encodes to JSON; nil: none). The id is the app's to
// choose: unique among all servers, at most 128 bytes of UTF-8 without colon,
// whitespace and control characters. A connection that is closing under that
// id is waited for. [ErrConnectionExists] where it is open on this server,
// [ErrInvalidMetadata] or [ErrTooLarge] where the metadata cannot be stored.
//
// It counts as alive from then on; call [PresenceManager.Touch] for every sign
// of life, and [PresenceManager.Disconnect] when it is over.
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

// Disconnect ends a connection of the app's own transport: it leaves all its
// rooms, and its metadata is forgotten. It waits until Redis has it. If Redis does
// not answer in time, it is done later. If the connection is a socket of this
// server, the socket is closed with code 1000. [ErrUnknownConnection] if this
// server has no such connection; [ConnectionManager.Close] closes a connection on
// any server.
func (p *PresenceManager) Disconnect(ctx context.Context, connID string) error {
	if err := checkContext(ctx); err != nil {
		return err
	}
	c, err := p.n.conn(connID)
	if err != nil {
		return err
	}
	p.n.close(c)
	return p.n.awaitGone(ctx, c.Gone())
}

// Join brings a connection into a room: one that was registered with Connect,
// or one of this server's sockets. It is a sign of life. If the connection is in
// already, it stays in without an event, unless a JoinGuard refuses it now.
//
// [ErrUnknownConnection] if this server has no such connection (for those of
// others: [RoomManager.Add]), [ErrRefused] if a rule's JoinGuard said no, or if the
// connection was taken out of the room while Join was waiting, [ErrClosed] if it
// ended, [ErrLimit] past Limits.RoomsPerConnection. If a connection of the same id
// is in the room on another server, this one takes its place, and subscribers get
// neither a leave nor a join. The other server learns of it at its next change
// there, which fails with [ErrConflict]; until then joins and leaves there succeed
// without effect.
func (p *PresenceManager) Join(ctx context.Context, room, connID string) error {
	c, err := p.n.in(ctx, room, connID)
	if err != nil {
		return err
	}
	c.Seen()
	_, err = p.n.join(ctx, c, room)
	return err
}

// Touch is a sign of life of a connection: it postpones the expiry of all its
// entries, and joins those again that had expired, unless a JoinGuard refuses it
// then. It costs no call of Redis by itself and does not wait.
// [ErrUnknownConnection] if this server has no such connection.
func (p *PresenceManager) Touch(connID string) error {
	c, err := p.n.conn(connID)
	if err != nil {
		return err
	}
	c.Seen()
	return nil
}

// Leave takes a connection out of a room; false: it was not in. It is a sign
// of life for the connection's other rooms. [ErrUnknownConnection] where this
// server has no such connection.
func (p *PresenceManager) Leave(ctx context.Context, room, connID string) (bool, error) {
	c, err := p.n.in(ctx, room, connID)
	if err != nil {
		return false, err
	}
	// A sign of life too, but not Seen: where silence had ended the entry that
	// would join it again, and subscribers would be told of a join and a leave.
	c.Stamp()
	return p.n.leave(ctx, c, room)
}

// Recheck asks the guards and join guards again about everything that a connection
// of this server sees and every room that it is in, although neither its metadata
// nor the rules have changed. It does not wait for their verdicts. See
// [ConnectionManager.Recheck], which does so on whichever server the connection is.
func (p *PresenceManager) Recheck(connID string) error {
	c, err := p.n.conn(connID)
	if err != nil {
		return err
	}
	p.n.recheck(c)
	return nil
}

// use returns an error if nothing can be done with the room for that context:
// the node does not run, or the name is invalid.
func (n *node) use(ctx context.Context, room string) error {
	if err := n.usableFor(ctx); err != nil {
		return err
	}
	return n.checkRoom(room)
}

func (n *node) usable() error {
	switch n.running() {
	case stateNew:
		return ErrNotStarted
	case stateStopped:
		return ErrClosed
	}
	return nil
}

func (n *node) in(ctx context.Context, room, connID string) (*owner.Conn, error) {
	if err := n.use(ctx, room); err != nil {
		return nil, err
	}
	return n.conn(connID)
}
