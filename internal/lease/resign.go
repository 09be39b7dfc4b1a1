package lease

import (
	"context"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// ownTolerance makes the clock irrelevant for the proof of a server about itself.
const ownTolerance = 100 * 365 * 24 * time.Hour

// A connection that broke earlier may fail at its next use. That must not keep this
// server on the list of live servers, so Resign tries again for a while.
const (
	resignWithin = 2 * time.Second
	resignPause  = 100 * time.Millisecond
)

// Resign takes this server off the list of live servers, ends the rest of its entries,
// and takes it off the list of dead servers. Call it after Stop, and after the local
// registry has ended its entries. If a step fails, Resign tries again for resignWithin
// and within ctx. After that other servers do the rest: when they find the incarnation on
// the list of dead servers, or when its lease runs out. Resign may be called repeatedly.
func (l *Lease) Resign(ctx context.Context) error {
	l.mu.Lock()
	done, never := l.done, l.cancel == nil
	l.mu.Unlock()
	inc := l.Incarnation()
	if inc == "" {
		return nil
	}
	if !never {
		select {
		case <-done:
		default:
			return ErrRunning
		}
	}
	for began := time.Now(); ; {
		err := l.resign(ctx, inc)
		if err == nil {
			return nil
		}
		if time.Since(began) >= resignWithin || wait.For(ctx, resignPause) != nil {
			return fmt.Errorf("mesh: resign: %w", err)
		}
	}
}

// resign is one attempt of Resign. A repeated step does no harm.
func (l *Lease) resign(ctx context.Context, inc string) error {
	if err := l.cleaner.call(ctx, func(ctx context.Context) error { return l.cfg.Store.DeclareDead(ctx, inc) }); err != nil {
		return err
	}
	_, err := l.cleaner.eachBucket(ctx, func(bucket int) (tally, error) {
		return l.cleaner.bucket(ctx, bucket, inc, l.ownProof)
	})
	if err != nil {
		return err
	}
	return l.cleaner.call(ctx, func(ctx context.Context) error { return l.cfg.Store.RemoveDead(ctx, inc) })
}

// ownProof returns a clock proof of this server about itself. It holds whatever the
// clocks say.
func (l *Lease) ownProof(context.Context) (store.ClockProof, error) {
	now, ok := l.Now()
	if !ok {
		now = time.Now().UnixMilli()
	}
	return store.ClockProof{Now: now, Tolerance: ownTolerance}, nil
}
