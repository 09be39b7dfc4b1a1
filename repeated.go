package mesh

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
)

const (
	// firstPause is the wait before the same question is asked for the third time, after
	// two answers that were out of date when they came. Each later one waits twice
	// as long, at most lastPause.
	firstPause = 5 * time.Millisecond
	lastPause  = 320 * time.Millisecond
)

// repeated limits how long and how often guards are asked again because metadata or
// rules have changed before their answer came. Otherwise a guard that changes the
// metadata that it reads would be asked for ever. It is for one caller.
type repeated struct {
	name  string // of the callback
	limit time.Duration
	log   *limit.Log

	asked  int             // answers that were out of date
	ctx    context.Context // ends after limit; nil until there was something to wait for
	cancel context.CancelFunc
}

// within returns a context that ends when the time limit has passed since the
// first call of within.
func (r *repeated) within(ctx context.Context) context.Context {
	if r.ctx == nil {
		r.ctx, r.cancel = context.WithTimeoutCause(ctx, r.limit, &timeoutError{r.name, r.limit})
	}
	return r.ctx
}

// await returns nil once the call has settled, the cause of ctx if that ended
// first, and a refusal if the time limit did.
func (r *repeated) await(ctx context.Context, k *call) error {
	limited := r.within(ctx)
	select {
	case <-k.settled:
		return nil
	case <-limited.Done():
	}
	return r.over(ctx)
}

// again is called after an answer that was out of date. It returns when the
// guards may be asked again, with errors as those of await. The first repetition
// is at once.
func (r *repeated) again(ctx context.Context) error {
	limited := r.within(ctx)
	pause := time.Duration(0)
	if r.asked++; r.asked > 1 {
		pause = min(firstPause<<min(r.asked-2, 16), lastPause)
	}
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-limited.Done():
		return r.over(ctx)
	case <-t.C:
	}
	if limited.Err() != nil {
		return r.over(ctx)
	}
	return nil
}

// over returns why the waiting ended without an answer.
func (r *repeated) over(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	err := refusedBecause(context.Cause(r.ctx))
	if r.asked == 0 {
		return err
	}
	const text = "mesh: guard has no lasting answer: metadata or rules change while it is asked"
	r.log.As(slog.LevelWarn, r.name+text, text, slog.String("callback", r.name), slog.Int("asked", r.asked), slog.Duration("after", r.limit))
	return fmt.Errorf("%w (metadata or rules changed while the guards were asked, %d times)", err, r.asked)
}

// end releases what within has made. The next question begins with a new limit.
func (r *repeated) end() {
	if r.cancel != nil {
		r.cancel()
	}
	r.asked, r.ctx, r.cancel = 0, nil, nil
}
