package mesh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/channels"
	"github.com/meshpresence/mesh/internal/expired"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/redisstate"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
	"github.com/meshpresence/mesh/internal/watch"
)

// redisLink holds the state of Redis as a core knows it, and receives its messages.
type redisLink struct {
	*redisstate.State // after failures

	listener *store.Listener // receives the events of watched rooms, and messages of other servers
	rooms    *channels.Mux   // gives the parts of this server the events of their rooms
	expired  *expiration     // acts on the expired events of Redis; nil if off
	waiting  *limit.Log      // logs the reason for which start waits
}

// linkRedis completes n.redis. It needs all other parts.
func (n *core) linkRedis() {
	n.redis.waiting = limit.NewLog(n.opts.Logger)
	n.redis.State = redisstate.New(n.redisConfig())
	if !n.opts.expirationEvents() {
		return
	}
	n.redis.expired = newExpiration(expired.Config{
		Store: n.store, Lease: n.lease, Owns: n.owns, Watches: n.hub.Watches, Bucket: n.keys.RoomBucket,
		Channel: n.keys.EndedChannel(), Kept: n.kept.Add, Logger: n.opts.Logger,
	}, expiryConfig{Client: n.opts.Redis, Keys: n.keys, Failover: n.redis.FailoverSuspected, Logger: n.opts.Logger})
}

// redisConfig returns the functions that act on changes of Redis.
func (n *core) redisConfig() redisstate.Config {
	c := redisstate.Config{
		Generation: n.store.Generation, Suspend: n.lease.Suspend, Resume: n.lease.Resume, ResetContact: n.lease.ResetContact,
		PauseExpired: func(until time.Time) { n.redis.expired.PauseUntil(until) },
		Resync:       n.resync, Away: n.redisAway, Recheck: n.access.RecheckAll,
		Go: n.life.work.Go, LeaseTTL: n.opts.LeaseTTL, Life: n.life.ctx, Running: n.life.running,
	}
	if n.opts.expirationEvents() {
		c.Recreate = func() { n.redis.expired.listener.Recreate() }
	}
	return c
}

// listen starts to receive events and messages. It waits until it is known whether
// expired events arrive (see expiryListener.Start).
func (n *core) listen(ctx context.Context) {
	r := &n.redis
	r.listener.Start()
	r.listener.Add(n.keys.ServerChannel(n.lease.Incarnation()))
	if r.expired != nil {
		r.expired.Start(n.life.ctx)
		r.listener.Add(n.keys.EndedChannel())
		r.expired.listener.Start(ctx)
	}
}

// stopListening ends what listen has started.
func (r *redisLink) stopListening() {
	if r.expired != nil {
		r.expired.listener.Stop()
		r.expired.Stop()
	}
	r.listener.Stop()
}

// leaseRenewed is called after every heartbeat that Redis has answered.
func (n *core) leaseRenewed(r lease.Renewed) {
	n.redis.LeaseRenewed()
	n.local.Heartbeat(r.Owned, n.redis.TakeMissed() || r.Recovered)
	n.kept.Renewed()
}

// reregistered is called when this server continues as another incarnation.
func (n *core) reregistered(old, inc string, stalled bool) {
	n.redis.listener.Add(n.keys.ServerChannel(inc))
	n.redis.listener.Remove(n.keys.ServerChannel(old))
	// Other servers considered this one dead, so their rechecks did not reach it. Ask
	// the guards before the repairs come.
	n.access.RecheckAll()
	n.redis.LeaseRenewed()
	n.local.Reregistered(stalled)
	n.resync()
}

// roomChannels converts room names to the listener's channel names.
type roomChannels struct{ n *core }

func (r roomChannels) Add(room string) { r.n.redis.listener.Add(r.n.keys.EventsPrefix() + room) }

func (r roomChannels) Remove(room string) { r.n.redis.listener.Remove(r.n.keys.EventsPrefix() + room) }

// Message implements store.Handler.
func (n *core) Message(channel, payload string) {
	if room, ok := strings.CutPrefix(channel, n.keys.EventsPrefix()); ok {
		n.redis.rooms.HandleEvent(room, payload)
		return
	}
	if channel == n.keys.EndedChannel() {
		n.redis.expired.HandleEnded(payload)
		return
	}
	if lease.IsEcho(payload) {
		n.lease.EchoReceived(payload)
		return
	}
	n.peers.HandleMessage(payload)
}

// Subscribed implements store.Handler.
func (n *core) Subscribed(channel string, again bool) {
	if room, ok := strings.CutPrefix(channel, n.keys.EventsPrefix()); ok {
		n.redis.rooms.HandleSubscribed(room, again)
		return
	}
	if channel == n.keys.EndedChannel() {
		return // each server finds missed expiries by itself
	}
	n.redis.Connected()
}

// Disconnected implements store.Handler.
func (n *core) Disconnected() {
	n.store.MayHaveFailed()
	n.redis.Disconnected() // until checkGeneration knows whether it is the same Redis
	n.redis.rooms.HandleDisconnect()
	n.tellSockets()
}

// redisAway is resync if Redis does not answer. The sockets learn of it, too.
func (n *core) redisAway() {
	n.hub.HandleRedisAway()
	n.counts.Resync()
	n.tellSockets()
}

// resync compares everything that is known of watched rooms with Redis.
func (n *core) resync() {
	n.hub.Resync()
	n.counts.Resync()
}

// tellSockets lets the sockets be told if their rooms stay stale.
func (n *core) tellSockets() {
	if n.sockets.away != nil {
		n.sockets.away()
	}
}

// owns reports whether a connection is one of this server.
func (n *core) owns(id string) bool {
	_, ok := n.local.Conn(id)
	return ok
}

// startPause is the pause between two attempts of Start to use Redis.
var startPause = wait.Backoff{First: 50 * time.Millisecond, Last: time.Second}

// awaitRedis waits until Redis answers, checks that it can be used, and takes a lease.
// It fails at once on an error that permanentError returns.
func (n *core) awaitRedis(ctx context.Context) error {
	failures := 0
	var why error // the error of the last attempt that ctx did not end
	for {
		err := n.tryRedis(ctx)
		if err == nil {
			return nil
		}
		if final := permanentError(err); final != nil && n.store.Confirmed(ctx, err) {
			return final
		}
		switch {
		case ctx.Err() == nil:
			why = err
			n.redis.waiting.Warn("mesh: start waits for redis", "error", layerlessError{err}) // Start may wait for ever
		case why != nil && why.Error() != err.Error():
			return storeError(fmt.Errorf("%w; before that: %w", err, why))
		}
		failures++
		if wait.For(ctx, startPause.After(failures)) != nil {
			return storeError(err)
		}
	}
}

// permanentError returns the error with which Start fails if a retry cannot help, and
// nil if it can.
func permanentError(err error) error {
	switch {
	case errors.Is(err, ErrInvalidOptions):
		return err
	case errors.Is(err, store.ErrOtherFormat):
		return layerlessError{fmt.Errorf("%w: %w; or use another Options.Prefix or another database, or remove those keys", ErrIncompatible, err)}
	case errors.Is(err, store.ErrMisfit):
		return layerlessError{fmt.Errorf("%w: Redis: %w", ErrInvalidOptions, err)}
	case errors.Is(err, store.ErrMissing):
		return layerlessError{fmt.Errorf("%w: %w; every command of the ACL in docs/operations.md is needed, under its own name", ErrUnavailable, err)}
	case errors.Is(err, store.ErrForbidden):
		return layerlessError{fmt.Errorf("%w: %w; check the user and password of Options.Redis, and the ACL's commands, keys and channels", ErrUnavailable, err)}
	}
	return nil
}

// tryRedis is one attempt of awaitRedis. It includes the lease, because Redis may go
// away or reject writes between two steps.
func (n *core) tryRedis(ctx context.Context) error {
	for _, try := range []func(context.Context) error{
		n.store.Dial, n.store.CheckServer, n.checkRights, n.store.CheckFormat, n.sockets.checkFiles, n.lease.Start,
	} {
		if try == nil {
			continue
		}
		if err := try(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checkRights checks the rights of the Redis user, including the channel of expired
// hints. All channels of a server share one connection, which Redis closes if the user
// may not subscribe to one of them.
func (n *core) checkRights(ctx context.Context) error {
	if n.redis.expired == nil {
		return n.store.CheckRights(ctx)
	}
	return n.store.CheckRights(ctx, n.keys.EndedChannel())
}

// warnAboutRedis logs properties of Redis that weaken a promise but do not prevent
// Start.
func (n *core) warnAboutRedis(ctx context.Context) {
	t := n.store.Traits(ctx)
	if t.Evicts != "" {
		n.opts.Logger.Warn("mesh: redis may evict presence when its memory is full; members may be missing until the next heartbeats",
			"maxmemory_policy", t.Evicts, "remedy", "set maxmemory-policy to noeviction")
	}
	switch {
	case t.Anonymous:
		n.opts.Logger.Warn("mesh: INFO does not identify the redis process; after a failover expired events may not arrive, and leaves wait for leases")
	case t.NoRunID:
		n.opts.Logger.Info("mesh: INFO has no run_id; redis processes are told apart by process id, port, replication id and uptime")
	}
}

const (
	// awayLimit is the time that a client's request waits for Redis if Redis is
	// known to be away.
	awayLimit = 250 * time.Millisecond
	// awayAfter is the time without a successful write after which a failed call
	// means that Redis is away.
	awayAfter = time.Second
	// awayFor is the time after which a failed call says nothing any more. In an idle
	// bucket no write may follow that could show that Redis is back.
	awayFor = 15 * time.Second
)

// isAway reports whether Redis is known to be away, or to refuse writes, where a room
// is kept: the owner's writes fail, or a call has failed lately, the last write that
// succeeded was awayAfter before, and none has succeeded since.
func (n *core) isAway(room string) bool {
	bucket := n.keys.RoomBucket(room)
	w := n.store.Writes(bucket)
	failed := !w.Failed.IsZero() && w.Since.IsZero() && w.Failed.Sub(w.Back) >= awayAfter
	return failed && time.Since(w.Failed) < awayFor || n.local.Away(bucket)
}

// waitLimit bounds the time that a client's request about a room waits for Redis.
func (n *core) waitLimit(room string) time.Duration {
	if n.isAway(room) {
		return awayLimit
	}
	return callLimit
}

// joinNowOrLater is join for a client, which gives up after one failed join. If Redis
// does not take the join now, the owner keeps it and writes it when Redis is back.
// This is a success, and Joined.Kept is set. After an error the connection does not
// join later.
//
// Only Redis knows whether a room with a cap has a place. If it has none when Redis is
// back, the connection leaves and its client is told (see joinFull).
func (n *core) joinNowOrLater(ctx context.Context, c *local.Conn, room, replaces string) (local.Joined, error) {
	joined, err := n.join(ctx, c, room, guards.Request{Replaces: replaces, Within: func() time.Duration { return n.waitLimit(room) }})
	switch {
	case !joined.Kept || watch.IsRefusal(err) || !errors.Is(err, ErrUnavailable):
		return joined, err
	case errors.Is(err, store.ErrData) && !joined.Again:
		// A key of another type is in the room's place. Redis is not away, and only
		// an operator can remove the key.
		_, _ = c.Leave(ctx, room, store.CauseLeft) // Redis holds nothing: this does not fail
		joined.Kept = false
		return joined, err
	}
	return joined, nil
}

// knownPresent lists who is in a room as far as this server knows it without asking
// Redis: from its mirror, otherwise its own connections.
func (n *core) knownPresent(room string) *Snapshot {
	if v, ok := n.hub.StaleView(room); ok {
		s := snapshotOf(room, v)
		s.Stale = true
		return s
	}
	conns, total := n.local.Some(room, n.opts.Limits.SnapshotMembers)
	s := &Snapshot{Room: room, Total: total, Stale: true, Members: make([]Member, len(conns))}
	for i, c := range conns {
		meta, _ := c.Metadata()
		s.Members[i] = Member{ID: c.ID(), UserID: c.User(), Metadata: meta}
	}
	return s
}

// readPresent returns the members of a room that has no usable mirror on this server.
// It reads from Redis, or from a stale mirror if Redis does not answer. The result has
// at most Limits.SnapshotMembers members. The caller has asked the guards.
func (n *core) readPresent(ctx context.Context, room string) (*Snapshot, error) {
	records, total, err := n.store.Some(ctx, room, n.opts.Limits.SnapshotMembers)
	if err != nil {
		if v, ok := n.hub.StaleView(room); ok {
			return snapshotOf(room, v), nil
		}
		return nil, errorFor(ctx, err)
	}
	return &Snapshot{Room: room, Members: membersOf(records), Total: total}, nil
}
