package guards

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/wait"
)

// retryPause is the pause before a question is asked again because its answer was outdated
// when it came. The first repetition is at once.
var retryPause = wait.Backoff{First: 5 * time.Millisecond, Last: 320 * time.Millisecond}

// Retry limits how long and how often guards are asked again because metadata or rules
// have changed before their answer came. Without it, a guard that changes the metadata
// that it reads would be asked for ever. A Retry is for one caller.
type Retry struct {
	name  string // of the callback
	limit time.Duration
	cache *Cache

	asked  int             // outdated answers
	ctx    context.Context // ends after limit; nil until there was something to wait for
	cancel context.CancelFunc
}

// NewRetry returns a Retry for the guards of rooms.
func (c *Cache) NewRetry() Retry {
	return Retry{name: callbacks.Guard, limit: c.guardTimeout, cache: c}
}

// within returns a context that ends when the time limit has passed since the first call
// of within.
func (r *Retry) within(ctx context.Context) context.Context {
	if r.ctx == nil {
		r.ctx, r.cancel = context.WithTimeoutCause(ctx, r.limit, &callbacks.TimeoutError{Name: r.name, After: r.limit})
	}
	return r.ctx
}

// await returns nil once the call has settled, the cause of ctx if that ended first, and a
// refusal if the time limit was first.
func (r *Retry) await(ctx context.Context, k *callbacks.Call) error {
	limited := r.within(ctx)
	select {
	case <-k.Settled():
		return nil
	case <-limited.Done():
	}
	return r.over(ctx)
}

// Again must be called after an outdated answer. It returns nil when the guards may be
// asked again, and otherwise an error as await does.
func (r *Retry) Again(ctx context.Context) error {
	limited := r.within(ctx)
	r.asked++
	if wait.For(limited, retryPause.After(r.asked-1)) != nil {
		return r.over(ctx)
	}
	return nil
}

// over returns the reason why the waiting ended without an answer.
func (r *Retry) over(ctx context.Context) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	err := r.cache.refusal(context.Cause(r.ctx))
	if r.asked == 0 {
		return err
	}
	const text = "mesh: guard has no lasting answer: metadata or rules change while it is asked"
	r.cache.calls.Log().As(slog.LevelWarn, r.name+text, text, slog.String("callback", r.name), slog.Int("asked", r.asked), slog.Duration("after", r.limit))
	return fmt.Errorf("%w (metadata or rules changed while the guards were asked, %d times)", err, r.asked)
}

// End releases the timer. The next question begins with a new limit.
func (r *Retry) End() {
	if r.cancel != nil {
		r.cancel()
	}
	r.asked, r.ctx, r.cancel = 0, nil, nil
}
