package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// edge is where the parts reach the store. Tests put faults there that no
// network shows: a call or an entry of a batch refused, a process that stands
// still.
type edge struct {
	owner owner.Store
	lease lease.Store
	hub   hub.Store
	batch int // ops of one call at most; 0: as many as the store takes
}

// wheelStep is how fine the owner's clock is.
const wheelStep = 50 * time.Millisecond

// node is what a Server and a bare PresenceManager have in common: one member
// of the group of servers that share a Redis. It wires the parts together and
// starts and stops them; the work is theirs:
//
//	owner     the connections of this server, and the writing of their entries
//	lease     that this server lives, and the burial of those that do not
//	hub       mirrors of the rooms that somebody here watches
//	listener  events of those rooms, and what other servers have to say (control.go)
//	expiry    Redis's expired events (keyspace.go), acted on by hints
//	verdicts  what guards said (guard.go)
//	joins     the asking of join guards (joins.go)
//	watchers  subscriptions, and the asking anew of their guards (subscription.go)
type node struct {
	opts  Options
	logs  limit.Shield // around opts.Logger
	keys  keyspace
	store *store.Store

	wheel    *clock.Wheel
	lease    *lease.Lease
	owner    *owner.Owner
	hub      *hub.Hub
	asking   chan struct{} // places for questions to the owners of members in doubt
	listener *store.Listener
	expiry   *expiryListener // nil: off
	hints    *hints          // nil: off
	control  *control

	rules    ruleSet
	calls    *callbacks
	verdicts *verdicts
	joins    *joins
	watchers *watchers

	life    context.Context // ends when the node has stopped
	end     context.CancelFunc
	begun   context.Context // ends when it begins to stop
	halt    context.CancelFunc
	work    sync.WaitGroup
	process atomic.Pointer[string] // identity of the Redis process, as last seen; nil: not known
	awayAt  time.Time              // when mirrors were last marked as stale because Redis was away
	trouble atomic.Bool            // something may have been missed: compare everything at the next heartbeat
	contact contact
	shifts  failovers
	slow    atomic.Uint64 // subscriptions that ended because too much waited
	made    time.Time
	leased  atomic.Int64 // when the lease was last renewed, since made
	unsure  atomic.Bool  // guards have been asked again because it may have run out since

	starting   chan struct{}               // of capacity 1: holds a value during start and stop
	begunParts bool                        // there is something to stop; guarded by starting
	fit        func(context.Context) error // checks that sockets leave file descriptors for Redis; nil: there are none
	waiting    *limit.Log                  // logs what start waits for
	state      atomic.Int32                // a nodeState; written by start and stop
	retired    atomic.Bool                 // it takes no more sockets, or has begun to stop
	stopOnce   sync.Once
	stopped    chan struct{} // closed when stop is through
	stopErr    error         // read only after that
}

func newNode(opts Options) (*node, error) {
	opts, err := opts.withDefaults()
	if err != nil {
		return nil, err
	}
	n := &node{starting: make(chan struct{}, 1), stopped: make(chan struct{}), made: time.Now()}
	opts.Logger = n.logs.Logger(opts.Logger)
	n.opts, n.waiting = opts, limit.NewLog(opts.Logger)
	n.keys = keyspace{prefix: opts.Prefix, db: databaseOf(opts.Redis), buckets: opts.buckets(), cluster: opts.clustered()}
	n.store = store.New(opts.Redis, n.keys)
	n.store.RequireLease()
	n.store.TrackedBy(func(room string) bool { return n.rules.match(room).tracked })
	at := edge{owner: n.store, lease: n.store, hub: n.store}
	if opts.edge != nil {
		at = opts.edge(n.store)
	}
	n.wheel = clock.NewWheel(wheelStep)
	// A lifetime begins: that of everything the node starts.
	n.life, n.end = context.WithCancel(context.Background())
	n.begun, n.halt = context.WithCancel(n.life)
	n.calls = newCallbacks(n.life, opts.Logger)
	n.verdicts = newVerdicts(&n.rules, n.calls, opts)
	n.joins = newJoins(n)
	n.watchers = newWatchers(n)
	n.control = newControl(n)
	n.listener = store.NewListener(store.ListenerConfig{Client: opts.Redis, Handler: n, Logger: opts.Logger, Name: "events"})
	n.asking = make(chan struct{}, maxAsking)
	n.hub = hub.New(hub.Config{
		Store: at.hub, Listener: roomChannels{n}, Unconfirmed: opts.LeaseTTL + time.Second, Bucket: n.keys.RoomBucket,
		Ask: n.askOwner, Now: n.now, Listed: opts.Limits.SnapshotMembers,
		Logger: opts.Logger,
	})
	n.lease = lease.New(lease.Config{
		Store: at.lease, TTL: opts.LeaseTTL, Buckets: n.keys.Buckets(), Control: n.keys.Control, Logger: opts.Logger,
		Busy:    func() bool { return n.hub.Watching() },
		OnAway:  n.away,
		OnRenew: n.renewed, OnReborn: n.reborn, OnDeaf: n.listener.Recreate,
	})
	n.owner = owner.New(owner.Config{
		Store: at.owner, Wheel: n.wheel, Buckets: n.keys.Buckets(), RoomBucket: n.keys.RoomBucket, ConnBucket: n.keys.ConnBucket,
		Incarnation: n.lease.Incarnation, Fenced: n.lease.Fenced, Doubt: n.lease.Doubt,
		TTL:           func(room string) time.Duration { return n.rules.match(room).ttl },
		StateInterval: func(room string) time.Duration { return n.rules.match(room).interval },
		Heartbeat:     opts.LeaseTTL / 3,
		BatchOps:      at.batch, EndSilent: opts.expirationEvents(), MaxRooms: opts.Limits.RoomsPerConnection,
		Wrote: n.hub.Expect, MetaChanged: func(c *owner.Conn) { n.watchers.recheck(c.ID()) }, MayReturn: n.joins.mayReturn,
		Logger: opts.Logger,
	})
	if opts.expirationEvents() {
		n.hints = newHints(n)
		n.expiry = newExpiryListener(expiryConfig{
			Client: opts.Redis, Keys: n.keys, Hint: n.hints.add, Failover: n.failover, Logger: opts.Logger,
		})
	}
	return n, nil
}

// databaseOf returns the number of the database, which channels have to carry.
func databaseOf(client redis.UniversalClient) int {
	if c, ok := client.(*redis.Client); ok {
		return c.Options().DB
	}
	return 0
}

// now is Redis's clock, in unix ms: what subscribers are shown as the time of
// an event comes from it alone, however wrong a server's own clock is.
func (n *node) now() int64 {
	if ms, ok := n.lease.Now(); ok {
		return ms
	}
	return time.Now().UnixMilli() // Redis has never answered
}

// renewed is told of every heartbeat that Redis answered.
func (n *node) renewed(r lease.Renewed) {
	n.holdsLease()
	n.owner.Heartbeat(r.Owned, n.trouble.Swap(false) || r.Recovered)
}

// away is told of every heartbeat that Redis did not answer. What is mirrored
// may have moved on: it is shown as stale until Redis has been asked. It runs on
// the lease's goroutine alone.
func (n *node) away() {
	if now := time.Now(); now.Sub(n.awayAt) >= time.Second {
		n.awayAt = now
		n.hub.HandleAway()
	}
}

// reborn is told that this server goes on as another incarnation.
func (n *node) reborn(old, inc string, stalled bool) {
	n.listener.Add(n.keys.Control(inc))
	n.listener.Remove(n.keys.Control(old))
	// Other servers took this one for dead, so their rechecks did not reach it. It
	// asks before the repairs come.
	n.askAllAgain()
	n.holdsLease()
	n.owner.Reborn(stalled)
	n.hub.Resync()
}

// holdsLease notes that the lease stands now.
func (n *node) holdsLease() {
	n.leased.Store(int64(time.Since(n.made)))
	n.unsure.Store(false)
}

// beforeEvent is called before an event is delivered. If the lease may have run
// out, other servers may have taken this one for dead, and their rechecks did not
// reach it: all guards are asked again before the event is told. It does not block.
func (n *node) beforeEvent() {
	if time.Since(n.made)-time.Duration(n.leased.Load()) > n.opts.LeaseTTL && n.unsure.CompareAndSwap(false, true) {
		n.askAllAgain()
	}
}

// askAllAgain has the guards asked again about everything that connections see.
func (n *node) askAllAgain() {
	n.verdicts.invalidateAll()
	n.watchers.recheckRooms(n.watchers.rooms())
}

// maxAsking bounds the questions under way. Who is left out asks again.
const maxAsking = 16

// askOwner asks another server which of its connections are not in a room any
// more. It does not block.
func (n *node) askOwner(room, owner string, conns []string, gone func([]string)) {
	select {
	case n.asking <- struct{}{}:
	default:
		return
	}
	n.work.Go(func() {
		defer func() { <-n.asking }()
		locate := func(context.Context) (string, error) { return owner, nil }
		if answer, err := n.control.call(n.begun, locate, remoteCall{Op: opGone, Room: room, Conns: conns}); err == nil {
			gone(answer.Gone)
		}
	})
}

// roomChannels lets the hub speak of rooms where the listener speaks of channels.
type roomChannels struct{ n *node }

func (r roomChannels) Add(room string)    { r.n.listener.Add(r.n.keys.EventsPrefix() + room) }
func (r roomChannels) Remove(room string) { r.n.listener.Remove(r.n.keys.EventsPrefix() + room) }

// Message implements store.Handler.
func (n *node) Message(channel, payload string) {
	if room, ok := strings.CutPrefix(channel, n.keys.EventsPrefix()); ok {
		n.hub.HandleEvent(room, payload)
		return
	}
	if channel == n.keys.Ended() {
		n.hints.told(payload)
		return
	}
	n.control.message(payload)
}

// Subscribed implements store.Handler.
func (n *node) Subscribed(channel string, again bool) {
	if room, ok := strings.CutPrefix(channel, n.keys.EventsPrefix()); ok {
		n.hub.HandleSubscribed(room, again)
		return
	}
	if channel == n.keys.Ended() {
		return // what was missed, each server looks for itself
	}
	// The first time, too: after a rebirth others may have had something to
	// say on it before it stood.
	n.trouble.Store(true)
	seen := n.contact.lost()
	n.work.Go(func() { n.checkProcess(seen) })
}

// Lost implements store.Handler.
func (n *node) Lost() {
	n.trouble.Store(true)
	n.store.Disturbed()
	n.contact.lose(n.lease.Suspend) // until it is known whether it is the same Redis: see checkProcess
	n.hub.HandleLost()
}

// member returns a local connection as guards see it.
func (n *node) member(conn string) memberFunc {
	return func() (Member, uint64) {
		c, ok := n.owner.Conn(conn)
		if !ok {
			return Member{ID: conn}, 0
		}
		meta, version := c.Metadata()
		return Member{ID: conn, Metadata: meta}, version
	}
}

// watcher returns nil where a viewer may begin to watch. One that is being
// closed may not: its subscriptions have been ended already, or are being.
func (n *node) watcher(viewer string) error {
	if viewer == "" {
		return nil
	}
	c, err := n.conn(viewer)
	if err == nil && c.Claimed() {
		err = ErrClosed
	}
	return err
}

// checkRoom returns what is wrong with a room's name.
func (n *node) checkRoom(room string) error {
	return validateRoomName(room, n.opts.Limits.RoomNameBytes)
}

// conn returns a connection of this server.
func (n *node) conn(id string) (*owner.Conn, error) {
	if err := validateConnectionID(id); err != nil {
		return nil, err
	}
	c, ok := n.owner.Conn(id)
	if !ok {
		return nil, fmt.Errorf("%w: %s", ErrUnknownConnection, id)
	}
	return c, nil
}

// storeError turns an error of the parts within into one of this package's.
func (n *node) storeError(err error) error {
	if err == nil {
		return nil
	}
	for inner, outer := range innerErrors {
		if errors.Is(err, inner) {
			if errors.Is(err, outer) {
				return err // it has been through here
			}
			return tidyError{fmt.Errorf("%w: %w", outer, err)}
		}
	}
	return err
}

// notTracked returns the error for a room without a rule.
func notTracked(room string) error { return fmt.Errorf("%w: %s", ErrNotTracked, wire.Quote(room)) }

// tidyError is an error whose text leaves out the name of the package below, and
// that Redis is unavailable, which that package says at each layer.
type tidyError struct{ err error }

func (e tidyError) Error() string {
	return strings.TrimPrefix(tidyText.Replace(e.err.Error()), "store: ")
}

func (e tidyError) Unwrap() error { return e.err }

var tidyText = strings.NewReplacer(
	": "+store.ErrUnavailable.Error(), "",
	store.ErrUnavailable.Error()+": ", "",
	": store: ", ": ",
	": owner: ", ": ",
)

var innerErrors = map[error]error{
	store.ErrUnavailable: ErrUnavailable,
	store.ErrFenced:      ErrUnavailable,
	store.ErrLate:        ErrUnavailable,
	store.ErrClock:       ErrUnavailable,
	owner.ErrUnavailable: ErrUnavailable,
	owner.ErrClosed:      ErrClosed,
	owner.ErrExists:      ErrConnectionExists,
	owner.ErrNotPresent:  ErrNotPresent,
	owner.ErrTooMany:     ErrLimit,
	owner.ErrTaken:       ErrConflict,
	hub.ErrStopped:       ErrClosed,
	socket.ErrClosed:     ErrClosed,
}
