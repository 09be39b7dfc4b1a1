package limit

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// LogWait is the longest time for which a caller waits until its line is written.
const LogWait = 250 * time.Millisecond

// Shield protects the library from the app's slog.Handler, which may panic, end its
// goroutine, block, or call the library. Each call of the handler runs on its own
// goroutine, and the caller waits for it for at most LogWait. While a call is late, all
// further calls are dropped. A Shield is safe for concurrent use.
type Shield struct {
	late     atomic.Int64
	panics   atomic.Uint64
	timeouts atomic.Uint64
	dropped  atomic.Uint64
}

// ShieldCounts are the numbers of failed calls of the handler.
type ShieldCounts struct {
	Panics   uint64 // including runtime.Goexit
	Timeouts uint64
	Dropped  uint64 // not made, because another call was late
}

// Counts returns the counts so far.
func (s *Shield) Counts() ShieldCounts {
	return ShieldCounts{Panics: s.panics.Load(), Timeouts: s.timeouts.Load(), Dropped: s.dropped.Load()}
}

// Logger returns a logger that writes to logger's handler. If logger is nil, it
// discards its lines.
func (s *Shield) Logger(logger *slog.Logger) *slog.Logger {
	if logger == nil || logger.Handler() == slog.DiscardHandler {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(&shielded{next: logger.Handler(), shield: s})
}

// shielded is a slog.Handler that calls another one through a Shield.
type shielded struct {
	next   slog.Handler
	shield *Shield
}

// Enabled implements slog.Handler. It returns false if next fails.
func (h *shielded) Enabled(ctx context.Context, level slog.Level) bool {
	enabled, ok := shield(h.shield, func() bool { return h.next.Enabled(ctx, level) })
	return ok && enabled
}

// Handle implements slog.Handler.
func (h *shielded) Handle(ctx context.Context, r slog.Record) error {
	err, _ := shield(h.shield, func() error { return h.next.Handle(ctx, r) })
	return err
}

// WithAttrs implements slog.Handler. If next fails, the attributes are omitted.
func (h *shielded) WithAttrs(attrs []slog.Attr) slog.Handler {
	return h.with(func() slog.Handler { return h.next.WithAttrs(attrs) })
}

// WithGroup implements slog.Handler. If next fails, the group is omitted.
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

// The states of a call.
const (
	callRunning = iota
	callReturned
	callLate
)

// shield calls f and returns its result. ok is false if f panicked or did not return in
// time.
func shield[T any](s *Shield, f func() T) (value T, ok bool) {
	if s.late.Load() > 0 {
		s.dropped.Add(1)
		return value, false
	}
	var state atomic.Int32
	returned := make(chan *T, 1) // gets nil if f panicked
	go func() {                  // ends with f; a late one is counted
		var result *T
		defer func() {
			if _ = recover(); result == nil {
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
		s.late.Add(1) // before the state changes, because the late call subtracts itself
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
