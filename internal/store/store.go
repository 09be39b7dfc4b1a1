package store

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/limit"
)

var (
	//go:embed lua/lib.lua
	libLua string
	//go:embed lua/users.lua
	usersLua string
	//go:embed lua/kept.lua
	keptLua string
	//go:embed lua/batch.lua
	batchLua string
	//go:embed lua/update.lua
	updateLua string
	//go:embed lua/join.lua
	joinLua string
	//go:embed lua/leave.lua
	leaveLua string
	//go:embed lua/commit.lua
	commitLua string
	//go:embed lua/cleanup.lua
	cleanUpLua string
	//go:embed lua/snapshot.lua
	snapshotLua string
	//go:embed lua/positions.lua
	positionsLua string
	//go:embed lua/renew.lua
	renewLua string
	//go:embed lua/register.lua
	registerLua string
	//go:embed lua/declare_dead_if_expired.lua
	declareDeadIfExpiredLua string
	//go:embed lua/declare_dead.lua
	declareDeadLua string
	//go:embed lua/fence.lua
	fenceLua string
	//go:embed lua/forget.lua
	forgetLua string
	//go:embed lua/meta.lua
	metaLua string
	//go:embed lua/instances.lua
	instancesLua string

	roomLua = libLua + usersLua + keptLua

	commitScript               = redis.NewScript(roomLua + batchLua + updateLua + joinLua + leaveLua + commitLua)
	cleanUpScript              = redis.NewScript(roomLua + cleanUpLua)
	snapshotScript             = redis.NewScript(snapshotLua)
	positionsScript            = redis.NewScript(positionsLua)
	renewScript                = redis.NewScript(renewLua)
	registerScript             = redis.NewScript(registerLua)
	declareDeadIfExpiredScript = redis.NewScript(declareDeadIfExpiredLua)
	declareDeadScript          = redis.NewScript(declareDeadLua)
	fenceScript                = redis.NewScript(fenceLua)
	forgetScript               = redis.NewScript(forgetLua)
	metaScript                 = redis.NewScript(metaLua)
	instancesScript            = redis.NewScript(instancesLua)
)

const (
	// callTimeout limits any one call. Clients get an answer within two seconds if
	// Redis is away.
	callTimeout = 1800 * time.Millisecond
	// maxCalls limits the calls under way at once. A call that was given up counts
	// until the client library has returned from it. Calls that must not wait for
	// others have slots of their own:
	//
	//   - Batches of changes do not wait for reads of clients, nor for metadata that clients
	//     set one by one. Those also leave a part of the pool's connections free (see
	//     slowCallLimit).
	//   - On a cluster each bucket has bucketCalls, so that calls to a node that does not
	//     answer do not take the slots of calls to other nodes.
	//   - The lease has leaseCalls: no load of clients delays a renewal.
	maxCalls    = 256
	bucketCalls = 16
	leaseCalls  = 64
	// MaxOps and MaxBytes limit one script call, so that it blocks Redis for no longer
	// than about a millisecond.
	MaxOps = 128
	// MaxBytes limits the arguments of one script call.
	MaxBytes = 64 << 10
)

// Store reads and writes the data of this library in one Redis. It is safe for
// concurrent use.
type Store struct {
	client redis.UniversalClient
	keys   Keys
	reads  chan struct{} // slots of plain commands without a bucket
	leases chan struct{} // slots of calls about leases and the identity of Redis
	slots  []slots       // by bucket
	calls  limit.Group
	listed bool                   // see RequireLease
	name   string                 // see Named; "": none
	tracks func(room string) bool // see TrackedBy; nil: no room is tracked
	users  bool                   // see CountUsers

	idle        idleProbe
	generations generations

	renewals  atomic.Uint64
	nCalls    atomic.Uint64
	nFailures atomic.Uint64
	took      *histogram.Histogram
	cleanedUp cleanedUp
}

// New returns a store on client. The store never closes the client.
func New(client redis.UniversalClient, keys Keys) *Store {
	slow := slowCallLimit(client)
	reads := slow
	if keys.Buckets() > 1 { // these calls go to all nodes
		reads = maxCalls
	}
	s := &Store{
		client: client, keys: keys, reads: make(chan struct{}, reads), leases: make(chan struct{}, leaseCalls),
		slots: make([]slots, keys.Buckets()),
		took:  histogram.New(histogram.Calls()...),
	}
	for i := range s.slots {
		p := &s.slots[i]
		p.bucket, p.reads, p.writes, p.fences = i, s.reads, make(chan struct{}, maxCalls), make(chan struct{}, leaseCalls)
		if len(s.slots) > 1 {
			p.reads, p.writes = make(chan struct{}, min(bucketCalls, slow)), make(chan struct{}, bucketCalls)
		}
	}
	return s
}

// slowCallLimit returns the maximum number of reads, and of changes that clients cause
// one by one, that are under way at once: three quarters of the connections that the
// client may open to a node. A call without a connection waits in the client's queue,
// where all later calls wait too, and fails beyond MaxActiveConns. On a cluster the
// limit applies to each bucket; calls without a bucket are limited only by maxCalls.
func slowCallLimit(client redis.UniversalClient) int {
	var size, most int
	switch c := client.(type) {
	case *redis.Client:
		size, most = c.Options().PoolSize, c.Options().MaxActiveConns
	case *redis.ClusterClient:
		size, most = c.Options().PoolSize, c.Options().MaxActiveConns
	default:
		return maxCalls
	}
	if most > 0 {
		size = min(size, most)
	}
	return min(max(size*3/4, 1), maxCalls)
}

// RequireLease makes Commit refuse batches with ErrForgotten if Redis knows nothing of
// the incarnation and does not list it as live. Such a batch waited in the network
// while its server died and Redis lost everything. The check needs the list and the
// bucket in one slot. So it covers only bucket 0, which without a cluster is the only
// one. Call it before use.
func (s *Store) RequireLease() { s.listed = true }

// CountUsers makes every call that may end or change entries name the keys of users.
// Without it, a call about a room with users takes a second round trip, unless one of
// its ops has a user. Call it before use if this server's entries may have users.
func (s *Store) CountUsers() { s.users = true }

// Keys returns the key names in use.
func (s *Store) Keys() Keys { return s.keys }

// Wait blocks until no call is under way, or until ctx ends. Calls that were given up
// end with the client library's own timeouts.
func (s *Store) Wait(ctx context.Context) error {
	if !s.calls.Wait(ctx.Done()) {
		return fmt.Errorf("store: calls still under way: %w", ctx.Err())
	}
	return nil
}

// Ping checks that Redis answers.
func (s *Store) Ping(ctx context.Context) error {
	_, err := within(ctx, s, s.unqueued(), func(ctx context.Context) (string, error) { return s.client.Ping(ctx).Result() })
	return err
}

// Publish sends payload to a channel. It returns the number of receivers that are
// connected to the same node.
func (s *Store) Publish(ctx context.Context, channel, payload string) (receivers int64, err error) {
	return call(ctx, s, func(ctx context.Context) (int64, error) {
		return s.client.Publish(ctx, channel, payload).Result()
	})
}

type result[T any] struct {
	value T
	err   error
}

// call runs f and returns within ctx and callTimeout. go-redis does not interrupt a
// read when its context ends (unless configured to), so f runs in another goroutine. If
// the caller stops waiting, the outcome is unknown.
func call[T any](ctx context.Context, s *Store, f func(context.Context) (T, error)) (T, error) {
	return within(ctx, s, slotRef{s.reads, nowhere, false}, f)
}

// read is call for a command about one key.
func read[T any](ctx context.Context, s *Store, key string, f func(context.Context) (T, error)) (T, error) {
	return within(ctx, s, s.at(key).read(), f)
}

func within[T any](ctx context.Context, s *Store, at slotRef, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	// The caller cancels, not the goroutine of start when it has the answer: otherwise
	// both cases of the last select would be ready, and every other answer would be
	// lost.
	defer cancel()
	var none T
	select {
	case at.slots <- struct{}{}:
	case <-ctx.Done():
		return none, s.wrapError(ctx.Err()) // never sent, so it says nothing about Redis
	}
	s.nCalls.Add(1)
	began := time.Now()
	select {
	case r := <-start(ctx, s, at, f):
		s.took.Observe(time.Since(began))
		if r.err != nil {
			s.noteError(ctx, at, time.Since(began), r.err)
			return none, s.wrapError(r.err)
		}
		return r.value, nil
	case <-ctx.Done():
		s.took.Observe(time.Since(began))
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && time.Since(began) >= suspectAfter {
			s.probeIdle(ctx)
		}
		s.noteError(ctx, at, time.Since(began), ctx.Err())
		return none, s.wrapError(ctx.Err())
	}
}

// start runs f in another goroutine and then frees its slot.
func start[T any](ctx context.Context, s *Store, at slotRef, f func(context.Context) (T, error)) <-chan result[T] {
	done := make(chan result[T], 1)
	s.calls.Go(func() {
		r, replied := result[T]{err: errHook}, false
		defer func() {
			if value := recover(); value != nil {
				r = result[T]{err: hookPanic(value)}
			}
			<-at.slots
			if replied && at.bucket != nowhere {
				s.slots[at.bucket].health.noteAnswer()
			}
			done <- r
		}()
		v, err := f(ctx) // runs the app's hooks of the client
		r, replied = result[T]{v, err}, answered(err)
	})
	return done
}

// wrapError counts an error of Redis or of the way to it, and wraps it with its meaning. A
// caller that gave up, for example because a client disconnected, is not a failure of
// Redis.
func (s *Store) wrapError(err error) error {
	if !errors.Is(err, context.Canceled) {
		s.nFailures.Add(1)
	}
	for _, own := range []error{ErrFenced, ErrLate, ErrForgotten, ErrClock, errFormat} {
		if errors.Is(err, own) {
			return err
		}
	}
	err = s.explain(err)
	if !errors.Is(err, context.Canceled) {
		reload(s.client)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// reload makes the client of a cluster refresh its map of slots. By itself it does so
// once a minute, or if a node redirects it. A dead master redirects nothing, so the
// client would continue to ask it. Many calls in a short time cause one refresh.
func reload(client redis.UniversalClient) {
	if c, ok := client.(interface{ ReloadState(context.Context) }); ok {
		c.ReloadState(context.Background()) // returns at once and ignores the context
	}
}

// run executes a script by its hash, or by its text if Redis does not have it.
func run(ctx context.Context, s *Store, script *redis.Script, keys []string, args ...any) (any, error) {
	return runIn(ctx, s, s.at(keys[0]).write(), script, keys, args...)
}

// runIn is run in a given slot, not in that of the first key's bucket.
func runIn(ctx context.Context, s *Store, at slotRef, script *redis.Script, keys []string, args ...any) (any, error) {
	return within(ctx, s, at, func(ctx context.Context) (any, error) {
		return script.Run(ctx, s.client, keys, args...).Result()
	})
}

// texts converts a script's reply of strings and integers.
func texts(reply any) ([]string, error) {
	list, ok := reply.([]any)
	if !ok {
		return nil, fmt.Errorf("reply %T: %w", reply, errFormat)
	}
	out := make([]string, len(list))
	for i, v := range list {
		switch v := v.(type) {
		case string:
			out[i] = v
		case int64:
			out[i] = fmt.Sprint(v)
		case nil:
		default:
			return nil, fmt.Errorf("reply of %T: %w", v, errFormat)
		}
	}
	return out, nil
}
