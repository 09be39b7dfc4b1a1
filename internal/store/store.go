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
	//go:embed lua/commit.lua
	commitLua string
	//go:embed lua/reap.lua
	reapLua string
	//go:embed lua/snapshot.lua
	snapshotLua string
	//go:embed lua/positions.lua
	positionsLua string
	//go:embed lua/renew.lua
	renewLua string
	//go:embed lua/register.lua
	registerLua string
	//go:embed lua/bury.lua
	buryLua string
	//go:embed lua/declare.lua
	declareLua string
	//go:embed lua/fence.lua
	fenceLua string
	//go:embed lua/forget.lua
	forgetLua string
	//go:embed lua/meta.lua
	metaLua string
	//go:embed lua/instances.lua
	instancesLua string

	commitScript    = redis.NewScript(libLua + commitLua)
	reapScript      = redis.NewScript(libLua + reapLua)
	snapshotScript  = redis.NewScript(snapshotLua)
	positionsScript = redis.NewScript(positionsLua)
	renewScript     = redis.NewScript(renewLua)
	registerScript  = redis.NewScript(registerLua)
	buryScript      = redis.NewScript(buryLua)
	declareScript   = redis.NewScript(declareLua)
	fenceScript     = redis.NewScript(fenceLua)
	forgetScript    = redis.NewScript(forgetLua)
	metaScript      = redis.NewScript(metaLua)
	instancesScript = redis.NewScript(instancesLua)
)

const (
	// callTimeout is how long any one call may take: clients are told within
	// 2 s that Redis is away.
	callTimeout = 1800 * time.Millisecond
	// maxCalls bounds the calls under way at once. Calls that were given up count
	// until the client library has returned from them. Calls that must not wait
	// for others have places of their own:
	//
	//   - Batches of changes do not wait for what clients read, nor for metadata
	//     that clients set one by one. These also leave a part of the pool's
	//     connections free (see patientCalls).
	//   - On a cluster each bucket has bucketCalls, so that calls to a node that
	//     swallows everything do not take the places of those to all others.
	//   - The lease has leaseCalls: no load of clients delays a renewal.
	maxCalls    = 256
	bucketCalls = 16
	leaseCalls  = 64
	// MaxOps and MaxBytes bound one script call, so that it holds up Redis for
	// no longer than about a millisecond.
	MaxOps   = 128
	MaxBytes = 64 << 10
)

// Store does the reading and writing in one Redis. It is safe for concurrent use.
type Store struct {
	client redis.UniversalClient
	keys   Keys
	reads  chan struct{} // places for plain commands that are of no one bucket
	leases chan struct{} // places for calls that say which servers live, and whether Redis is the same
	places []places      // by bucket
	calls  limit.Crew
	listed bool                   // see RequireLease
	tracks func(room string) bool // see TrackedBy; nil: no room is tracked

	suspects  suspects
	processes processes

	renewals  atomic.Uint64
	nCalls    atomic.Uint64
	nFailures atomic.Uint64
	took      *histogram.Histogram
	reaped    reaped
}

// New returns a store on client, which stays the caller's to close.
func New(client redis.UniversalClient, keys Keys) *Store {
	patient := patientCalls(client)
	reads := patient
	if keys.Buckets() > 1 { // calls to all nodes
		reads = maxCalls
	}
	s := &Store{
		client: client, keys: keys, reads: make(chan struct{}, reads), leases: make(chan struct{}, leaseCalls),
		places: make([]places, keys.Buckets()),
		took:   histogram.New(histogram.Calls()...),
	}
	for i := range s.places {
		p := &s.places[i]
		p.bucket, p.reads, p.writes, p.fences = i, s.reads, make(chan struct{}, maxCalls), make(chan struct{}, leaseCalls)
		if len(s.places) > 1 {
			p.reads, p.writes = make(chan struct{}, min(bucketCalls, patient)), make(chan struct{}, bucketCalls)
		}
	}
	return s
}

// patientCalls is how many reads, and changes that clients make one by one, are
// under way at once: three quarters of the connections that the client may open
// to a node. A call that gets no connection waits in the client's queue, and all
// that come after it wait there, too; beyond MaxActiveConns it fails. On a cluster
// this bounds each bucket, and calls of no one bucket only by maxCalls.
func patientCalls(client redis.UniversalClient) int {
	size, most := 0, 0
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

// RequireLease makes Commit refuse, with ErrLost, what comes from an incarnation
// that Redis knows nothing of and that is not on the list of the living: a
// batch that sat in the network while its server died and Redis lost
// everything. It can only look where the list and the bucket share a slot: in
// bucket 0, which is all there is without a cluster. Call it before use.
func (s *Store) RequireLease() { s.listed = true }

// Keys returns the names in use.
func (s *Store) Keys() Keys { return s.keys }

// Wait blocks until no call is under way any more, or ctx ends. Calls that
// were given up end when the client library's own timeouts run out.
func (s *Store) Wait(ctx context.Context) error {
	if !s.calls.Wait(ctx.Done()) {
		return fmt.Errorf("store: calls still under way: %w", ctx.Err())
	}
	return nil
}

// Ping asks Redis whether it is there.
func (s *Store) Ping(ctx context.Context) error {
	_, err := within(ctx, s, s.unqueued(), func(ctx context.Context) (string, error) { return s.client.Ping(ctx).Result() })
	return err
}

// Publish sends payload to a channel and returns how many listeners of the same
// node it went to.
func (s *Store) Publish(ctx context.Context, channel, payload string) (heard int64, err error) {
	return call(ctx, s, func(ctx context.Context) (int64, error) {
		return s.client.Publish(ctx, channel, payload).Result()
	})
}

type result[T any] struct {
	value T
	err   error
}

// call runs f and returns within ctx and callTimeout. go-redis does not
// interrupt a read when its context ends (unless told to), so f runs beside
// the caller, who stops waiting: the outcome is then unknown.
func call[T any](ctx context.Context, s *Store, f func(context.Context) (T, error)) (T, error) {
	return within(ctx, s, place{s.reads, nowhere, false}, f)
}

// read is call for a command of one key.
func read[T any](ctx context.Context, s *Store, key string, f func(context.Context) (T, error)) (T, error) {
	return within(ctx, s, s.at(key).read(), f)
}

func within[T any](ctx context.Context, s *Store, at place, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	// By the caller, never by the goroutine below when it has the answer: both
	// cases of the last select would be ready then, and every other answer lost.
	defer cancel()
	var none T
	select {
	case at.slots <- struct{}{}:
	case <-ctx.Done():
		return none, s.failed(ctx.Err()) // never sent: that says nothing about Redis
	}
	s.nCalls.Add(1)
	began := time.Now()
	done := make(chan result[T], 1)
	s.calls.Go(func() {
		r, replied := result[T]{err: errHook}, false
		defer func() {
			if value := recover(); value != nil {
				r = result[T]{err: hookPanic(value)}
			}
			<-at.slots
			if replied && at.bucket != nowhere {
				s.places[at.bucket].health.answer()
			}
			done <- r
		}()
		v, err := f(ctx) // calls the app's hooks of the client
		r, replied = result[T]{v, err}, answered(err)
	})
	select {
	case r := <-done:
		s.took.Observe(time.Since(began))
		if r.err != nil {
			s.suffered(ctx, at, time.Since(began), r.err)
			return none, s.failed(r.err)
		}
		return r.value, nil
	case <-ctx.Done():
		s.took.Observe(time.Since(began))
		if errors.Is(ctx.Err(), context.DeadlineExceeded) && time.Since(began) >= suspicious {
			s.suspect(ctx)
		}
		s.suffered(ctx, at, time.Since(began), ctx.Err())
		return none, s.failed(ctx.Err())
	}
}

// failed counts and marks an error of Redis or of the way to it. That the caller
// has gone, say with a client's connection, is no failure of Redis's.
func (s *Store) failed(err error) error {
	if !errors.Is(err, context.Canceled) {
		s.nFailures.Add(1)
	}
	for _, own := range []error{ErrFenced, ErrLate, ErrLost, ErrClock, errFormat} {
		if errors.Is(err, own) {
			return err
		}
	}
	err = s.explained(err)
	if !errors.Is(err, context.Canceled) {
		reload(s.client)
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, err)
}

// reload makes the client of a cluster look where everything is now. By itself
// it does so once a minute and where a node refers it to another one; a master
// that has died refers it nowhere, and it would go on asking that one. Many
// calls in short order have it look once.
func reload(client redis.UniversalClient) {
	if c, ok := client.(interface{ ReloadState(context.Context) }); ok {
		c.ReloadState(context.Background()) // it returns at once, and minds no context
	}
}

// run executes a script by its hash, with its text where Redis lacks it.
func run(ctx context.Context, s *Store, script *redis.Script, keys []string, args ...any) (any, error) {
	return runIn(ctx, s, s.at(keys[0]).write(), script, keys, args...)
}

// runIn is run with places other than those of the first key's bucket.
func runIn(ctx context.Context, s *Store, at place, script *redis.Script, keys []string, args ...any) (any, error) {
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
