package limit

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// LogWait is how long a line may take to be written before the code that logs
// it goes on without it.
const LogWait = 250 * time.Millisecond

// Shield lets the library log through a slog.Handler of the app's that may
// panic, end its goroutine, block, or call the library: each call of the handler
// runs on a goroutine of its own, which is waited for at most LogWait. While a
// call is late, nothing more is written. Safe for concurrent use.
type Shield struct {
	late     atomic.Int64
	panics   atomic.Uint64
	timeouts atomic.Uint64
	dropped  atomic.Uint64
}

// ShieldCounts counts the handler's calls by their outcome.
type ShieldCounts struct {
	Panics   uint64 // runtime.Goexit included
	Timeouts uint64
	Dropped  uint64 // not made, because another one was late
}

// Counts returns the counts so far.
func (s *Shield) Counts() ShieldCounts {
	return ShieldCounts{Panics: s.panics.Load(), Timeouts: s.timeouts.Load(), Dropped: s.dropped.Load()}
}

// Logger returns a logger that writes to logger's handler; nil: to none.
func (s *Shield) Logger(logger *slog.Logger) *slog.Logger {
	if logger == nil || logger.Handler() == slog.DiscardHandler {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(&shielded{next: logger.Handler(), shield: s})
}

// shielded is a slog.Handler that calls another one.
type shielded struct {
	next   slog.Handler
	shield *Shield
}

// Enabled implements slog.Handler. It is false if next fails.
func (h *shielded) Enabled(ctx context.Context, level slog.Level) bool {
	enabled, ok := shield(h.shield, func() bool { return h.next.Enabled(ctx, level) })
	return ok && enabled
}

// Handle implements slog.Handler.
func (h *shielded) Handle(ctx context.Context, r slog.Record) error {
	err, _ := shield(h.shield, func() error { return h.next.Handle(ctx, r) })
	return err
}

// WithAttrs implements slog.Handler. If next fails, the attributes are left out.
func (h *shielded) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.with(func() slog.Handler { return h.next.WithAttrs(attrs) })
}

// WithGroup implements slog.Handler. If next fails, there is no group.
func (h *shielded) WithGroup(name string) slog.Handler {
	return h.with(func() slog.Handler { return h.next.WithGroup(name) })
}

func (h *shielded) with(f func() slog.Handler) slog.Handler {
	next, ok := shield(h.shield, f)
	if !ok || next == nil {
		return h
	}
	return &shielded{next: next, shield: h.shield}
}

// How far a call has come.
const (
	callRunning = iota
	callReturned
	callLate
)

// shield calls f and returns its result. Ok is false if f did not return in time,
// or at all.
func shield[T any](s *Shield, f func() T) (value T, ok bool) {
	if s.late.Load() > 0 {
		s.dropped.Add(1)
		return value, false
	}
	var state atomic.Int32
	returned := make(chan *T, 1) // nil: it panicked
	go func() {                  // ends with the call; a late one is counted
		var result *T
		defer func() {
			if recover(); result == nil {
				s.panics.Add(1)
			}
			if !state.CompareAndSwap(callRunning, callReturned) {
				s.late.Add(-1)
			}
			returned <- result
		}()
		v := f()
		result = &v
	}()
	t := time.NewTimer(LogWait)
	defer t.Stop()
	var result *T
	select {
	case result = <-returned:
	case <-t.C:
		s.late.Add(1) // before it is known to be late: it counts itself out
		if state.CompareAndSwap(callRunning, callLate) {
			s.timeouts.Add(1)
			return value, false
		}
		s.late.Add(-1)
		result = <-returned
	}
	if result == nil {
		return value, false
	}
	return *result, true
}
