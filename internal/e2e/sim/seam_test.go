package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/lease"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// simSeam is between the parts of a server and its store. It causes faults that a
// network cannot show.
type simSeam struct {
	s *sim

	mu     sync.Mutex // guards the fields below
	rng    *rand.Rand
	gate   chan struct{} // closed when calls may continue; nil if they may
	fails  float64       // fraction of calls that fail
	refuse float64       // fraction of batches with one refused entry
	text   string        // the error of Redis
	cost   time.Duration // duration of each op of a batch
}

var simRefusals = []string{
	"OOM command not allowed when used memory > 'maxmemory'.", "TRYAGAIN Multiple keys request during rehashing of slot",
	"LOADING Redis is loading the dataset in memory", "READONLY You can't write against a read only replica.",
}

// stop blocks the start and the return of all calls, as if the process stood still,
// until the returned function is called.
func (e *simSeam) stop() (goOn func()) {
	gate := make(chan struct{})
	e.mu.Lock()
	e.gate = gate
	e.mu.Unlock()
	return sync.OnceFunc(func() {
		e.mu.Lock()
		e.gate = nil
		e.mu.Unlock()
		close(gate)
	})
}

func (e *simSeam) wait() {
	e.mu.Lock()
	gate := e.gate
	e.mu.Unlock()
	if gate != nil {
		<-gate
	}
}

// setCost sets the duration of each op of a batch.
func (e *simSeam) setCost(cost time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.cost = cost
}

// work waits for the duration of a batch.
func (e *simSeam) work(ctx context.Context, ops int) {
	e.mu.Lock()
	d := e.cost * time.Duration(ops)
	e.mu.Unlock()
	if d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
}

func (e *simSeam) set(fails, refuse float64, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fails, e.refuse, e.text = fails, refuse, text
}

// fate decides whether a call fails. With before, the call fails without being carried
// out. With after, it fails although it was carried out.
func (e *simSeam) fate() (before, after error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fails == 0 || e.rng.Float64() >= e.fails {
		return nil, nil
	}
	err := fmt.Errorf("%w: %s", store.ErrUnavailable, e.text)
	if e.rng.IntN(2) == 0 {
		return nil, err
	}
	return err, nil
}

// victim returns the index of the refused entry of a batch, or -1.
func (e *simSeam) victim(n int) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.refuse == 0 || e.rng.Float64() >= e.refuse {
		return -1
	}
	return e.rng.IntN(n)
}

// simCall makes a call through the seam.
func simCall[T any](e *simSeam, call func() (T, error)) (T, error) {
	e.wait()
	before, after := e.fate()
	if before != nil {
		var none T
		return none, before
	}
	v, err := call()
	e.wait()
	if err == nil && after != nil {
		var none T
		return none, after
	}
	return v, err
}

func simDo(e *simSeam, call func() error) error {
	_, err := simCall(e, func() (struct{}, error) { return struct{}{}, call() })
	return err
}

// simLocalStore is the store of the local entries.
type simLocalStore struct {
	local.Store
	e *simSeam
}

func (o simLocalStore) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	return simCall(o.e, func() ([]store.OpResult, error) {
		o.e.work(ctx, len(ops))
		i := o.e.victim(len(ops))
		if i < 0 {
			return o.Store.Commit(ctx, bucket, inc, number, known, ops)
		}
		// The op is not sent, because an op that Redis refuses changes nothing.
		rest := append(append([]store.Op(nil), ops[:i]...), ops[i+1:]...)
		results, err := o.Store.Commit(ctx, bucket, inc, number, known, rest)
		if err != nil {
			return nil, err
		}
		refused := store.OpResult{Err: fmt.Errorf("%w: simulated refusal", store.ErrUnavailable)}
		return append(append(append([]store.OpResult(nil), results[:i]...), refused), results[i:]...), nil
	})
}

func (o simLocalStore) OwnedSize(ctx context.Context, bucket int, inc string) (int64, error) {
	return simCall(o.e, func() (int64, error) { return o.Store.OwnedSize(ctx, bucket, inc) })
}

// simLeaseStore is the store of the lease.
type simLeaseStore struct {
	lease.Store
	e *simSeam
}

func (l simLeaseStore) Register(ctx context.Context, inc string, ttl time.Duration) (int64, error) {
	return simCall(l.e, func() (int64, error) { return l.Store.Register(ctx, inc, ttl) })
}

func (l simLeaseStore) Renew(ctx context.Context, inc string, ttl time.Duration, echo string, wantDead bool) (store.Renewal, error) {
	return simCall(l.e, func() (store.Renewal, error) { return l.Store.Renew(ctx, inc, ttl, echo, wantDead) })
}

func (l simLeaseStore) DeclareDeadIfExpired(ctx context.Context, j store.ClockProof, inc string) (bool, error) {
	return simCall(l.e, func() (bool, error) { return l.Store.DeclareDeadIfExpired(ctx, j, inc) })
}

func (l simLeaseStore) DeclareDead(ctx context.Context, inc string) error {
	return simDo(l.e, func() error { return l.Store.DeclareDead(ctx, inc) })
}

func (l simLeaseStore) Fence(ctx context.Context, bucket int, inc string) error {
	return simDo(l.e, func() error { return l.Store.Fence(ctx, bucket, inc) })
}

func (l simLeaseStore) CleanUp(ctx context.Context, j store.ClockProof, items []store.CleanUpItem) ([]store.CleanUpStatus, error) {
	return simCall(l.e, func() ([]store.CleanUpStatus, error) { return l.Store.CleanUp(ctx, j, items) })
}

func (l simLeaseStore) Publish(ctx context.Context, channel, payload string) (int64, error) {
	return simCall(l.e, func() (int64, error) { return l.Store.Publish(ctx, channel, payload) })
}

func (e *simSeam) of(st *store.Store) testhook.Seams {
	return testhook.Seams{Local: simLocalStore{st, e}, Lease: simLeaseStore{st, e}, Hub: st, Batch: simBatch}
}
