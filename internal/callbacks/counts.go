package callbacks

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/limit"
)

// Counts counts the outcomes of the callbacks of one name.
type Counts struct {
	Calls    uint64 // started
	Errors   uint64 // returned an error that is not an answer to the client
	Panics   uint64
	Timeouts uint64
}

// Stats returns the counts of each name that has been called.
func (r *Runner) Stats() map[string]Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make(map[string]Counts, len(r.counts))
	for name, n := range r.counts {
		all[name] = *n
	}
	return all
}

// NotePanic counts and logs a panic of the app's code that does not run as a callback. It
// must be called by a deferred function.
func (r *Runner) NotePanic(name string, value any) {
	r.mu.Lock()
	r.countsOf(name)
	r.mu.Unlock()
	thrown := &PanicError{Name: name, Value: limit.PanicText(value), Stack: debug.Stack()}
	r.count(name, thrown)
	r.logFailure(name, thrown)
}

// countsOf returns the counts of a name. The caller holds mu.
func (r *Runner) countsOf(name string) *Counts {
	n := r.counts[name]
	if n == nil {
		n = &Counts{}
		r.counts[name] = n
	}
	return n
}

// failed reports whether an error of a callback is a failure, and not an answer that the
// app has chosen for the client.
func (r *Runner) failed(err error) bool {
	if err == nil || errors.Is(err, errs.Refused) || errors.Is(err, errs.Closed) {
		return false
	}
	return !r.IsAnswer(err)
}

// IsAnswer reports whether an error is an answer that the app has chosen for the client.
func (r *Runner) IsAnswer(err error) bool { return r.isAnswer != nil && r.isAnswer(err) }

// count counts the failure of a callback.
func (r *Runner) count(name string, err error) {
	if !r.failed(err) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.counts[name]
	switch {
	case errs.Has[*TimeoutError](err):
		n.Timeouts++
	case errs.Has[*PanicError](err):
		n.Panics++
	case answersClient[name] && !errors.Is(err, ErrNotEncoded):
	default:
		n.Errors++
	}
}

// logFailure logs the failure of a callback.
func (r *Runner) logFailure(name string, err error) {
	if !r.failed(err) {
		return
	}
	late, isLate := errors.AsType[*TimeoutError](err)
	thrown, isPanic := errors.AsType[*PanicError](err)
	switch {
	case isLate:
		r.log.As(slog.LevelWarn, name+" timeout", "mesh: callback timed out",
			slog.String("callback", name), slog.Duration("after", late.After))
	case isPanic:
		r.log.As(slog.LevelError, name+" panic", "mesh: callback panicked",
			slog.String("callback", name), slog.String("panic", fmt.Sprint(thrown.Value)),
			slog.String("stack", string(thrown.Stack)))
	case answersClient[name] && !errors.Is(err, ErrNotEncoded):
	default:
		r.log.As(slog.LevelWarn, name+" error", "mesh: callback failed",
			slog.String("callback", name), slog.String("error", limit.Shorten(err.Error())))
	}
}
