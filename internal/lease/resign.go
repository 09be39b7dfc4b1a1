package lease

import (
	"context"
	"fmt"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// certain is the tolerance of a judgment about oneself: no clock matters.
const certain = 100 * 365 * 24 * time.Hour

// Resign takes this server off the list of the living, ends what is left of its
// entries, and takes it off the dead list. Call it after Stop, and after the
// owner has ended its entries. It tries once, within ctx; what it could not do
// others do when they find the incarnation on the list of the dead, or its
// lease run out. It may be called repeatedly.
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
	if err := l.reaper.call(ctx, func(ctx context.Context) error { return l.cfg.Store.DeclareDead(ctx, inc) }); err != nil {
		return fmt.Errorf("mesh: resign: %w", err)
	}
	_, err := l.reaper.everywhere(ctx, func(bucket int) (int, error) {
		return l.reaper.bucket(ctx, bucket, inc, l.ownJudge)
	})
	if err != nil {
		return fmt.Errorf("mesh: resign: %w", err)
	}
	if err := l.reaper.call(ctx, func(ctx context.Context) error { return l.cfg.Store.Cleaned(ctx, inc) }); err != nil {
		return fmt.Errorf("mesh: resign: %w", err)
	}
	return nil
}

// ownJudge judges this server itself: of its own end it is certain, whatever
// the clocks say.
func (l *Lease) ownJudge(context.Context) (store.Judgment, error) {
	now, ok := l.Now()
	if !ok {
		now = time.Now().UnixMilli()
	}
	return store.Judgment{Now: now, Tolerance: certain}, nil
}
