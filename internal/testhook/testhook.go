// Package testhook lets the tests under internal/e2e reach the parts of a running
// server, and put faults between a server and its store. Package mesh fills in the
// functions when it is initialised. Only packages of this module can import it, so an
// app cannot reach anything through it.
package testhook

import (
	"context"
	"log/slog"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/kept"
	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
)

// Seams are the stores that the parts of a server use. A test puts one of its own in
// the place of a store, to make a fault that no network shows: a call that fails, an
// entry of a batch that is refused, a process that stands still.
type Seams struct {
	Local local.Store
	Lease lease.Store
	Hub   hub.Store
	Kept  kept.Store // nil: the store itself
	Batch int        // operations of one call at most; 0: as many as the store takes
}

// Parts are the parts of one server, or of a PresenceManager without one.
type Parts struct {
	Store *store.Store
	Keys  store.Keys
	Wheel *clock.Wheel
	Lease *lease.Lease
	Local *local.Registry
	Hub   *hub.Hub

	Listener *store.Listener

	Redis    redis.UniversalClient // Options.Redis
	Logger   *slog.Logger          // Options.Logger with its wrapper
	LeaseTTL time.Duration         // Options.LeaseTTL
}

// Limits of the server that tests compare durations with.
type Limits struct {
	Call time.Duration // how long a call waits for Redis
	Away time.Duration // the same while Redis is known to be away
	Fail time.Duration // how long Redis is taken to be away after the last failure
	Stop time.Duration // how long Shutdown waits beyond its context
}

// Callback counts the calls of one callback that did not end well.
type Callback struct{ Errors, Panics, Timeouts uint64 }

// Functions that take an owner take a *mesh.Server or a *mesh.PresenceManager.
var (
	// PartsOf returns the parts of an owner.
	PartsOf func(owner any) Parts
	// SetSeams sets the stores of a server that gets these *mesh.Options.
	SetSeams func(options any, at func(*store.Store) Seams)
	// SetFiles sets the number of files that the process may open, for a server that
	// gets these *mesh.Options.
	SetFiles func(options any, files func() (most int, ok bool))
	// LimitsOf returns the limits of all servers.
	LimitsOf func() Limits
	// NewKeys returns the names of keys and channels.
	NewKeys func(prefix string, db, buckets int, cluster bool) store.Keys

	// JoinAsClient joins a room the way a client does: if Redis is away, the join takes
	// place later.
	JoinAsClient func(ctx context.Context, owner any, conn *local.Conn, room string) (local.Joined, error)
	// JoinInPlaceOf is JoinAsClient for a client that names its last connection.
	JoinInPlaceOf func(ctx context.Context, owner any, conn *local.Conn, room, replaces string) (local.Joined, error)
	// SubscribeEarly subscribes the way a socket does: the subscription begins before
	// the room is read. It calls yield with each mesh.Event.
	SubscribeEarly func(ctx context.Context, manager any, room string, yield func(event any, err error) bool)
	// IsAway reports whether an owner takes Redis to be away for a room.
	IsAway func(owner any, room string) bool
	// OpenJoins returns how many joins wait for a guard.
	OpenJoins func(owner any) int
	// Subscriptions returns how many subscriptions to a room there are.
	Subscriptions func(owner any, room string) int
	// TTL returns the TTL of a room's members.
	TTL func(owner any, room string) time.Duration
	// Callbacks returns the counts of an owner's callbacks by name.
	Callbacks func(owner any) map[string]Callback
	// SocketPanics returns how many panics the sockets of a *mesh.Server recovered from.
	SocketPanics func(server any) int64
	// QueueBytes returns how many bytes wait to be written to a *mesh.Connection.
	QueueBytes func(conn any) int
	// AddExpired tells an owner that the key of a connection in a room has expired.
	AddExpired func(owner any, room, conn string)
	// ExpiredWaiting returns how many expired keys an owner has still to look at.
	ExpiredWaiting func(owner any) int
	// AnswersFalse reports whether a failed command is answered with false at level 1.
	AnswersFalse func(command string) bool
	// WireError returns an error as a client gets it.
	WireError func(err error) (message, code, name string)
)
