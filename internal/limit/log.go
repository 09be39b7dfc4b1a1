package limit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"runtime"
	"sync"
	"time"
)

const (
	// LogEvery is the shortest time between two lines of one kind.
	LogEvery = 10 * time.Second
	// maxLogKinds bounds the kinds of lines. All further kinds are treated as one.
	maxLogKinds = 1024
	// maxLogText bounds the bytes of a text that is not the library's own.
	maxLogText = 256
)

// Log writes log lines that may repeat. It writes at most one line of a kind per
// LogEvery. Lines in between are suppressed: they are written at Debug, and the next
// line of the kind has their number as "suppressed". A Log is safe for concurrent use.
//
// The number is written with the next line of the kind, and not by itself. So a silent
// log means that nothing happens any more.
type Log struct {
	logger *slog.Logger

	mu    sync.Mutex // guards kinds
	kinds map[string]*kind
}

// kind is the state of one kind of line.
type kind struct {
	last       time.Time
	suppressed int
}

// NewLog returns a Log that writes to logger. If logger is nil, it discards its lines.
func NewLog(logger *slog.Logger) *Log {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Log{logger: logger, kinds: make(map[string]*kind)}
}

// Info writes a line at Info. Its kind is its text, which must be a constant. Info
// reports whether the line was written and not suppressed.
func (l *Log) Info(text string, args ...any) bool { return l.write(slog.LevelInfo, text, text, args) }

// Warn is like Info, at Warn.
func (l *Log) Warn(text string, args ...any) bool { return l.write(slog.LevelWarn, text, text, args) }

// Error is like Info, at Error.
func (l *Log) Error(text string, args ...any) bool {
	return l.write(slog.LevelError, text, text, args)
}

// As writes a line of the given kind, for lines with equal texts about different
// things. There must be few kinds, and clients must not be able to choose them.
func (l *Log) As(level slog.Level, kind, text string, args ...any) bool {
	return l.write(level, kind, text, args)
}

// write writes a line. Only the methods above may call it, because it takes their
// caller as the source of the line.
func (l *Log) write(level slog.Level, kind, text string, args []any) bool {
	now := time.Now()
	suppressed, ok := l.allow(kind, now)
	if !ok {
		level = slog.LevelDebug
	}
	ctx := context.Background() // as in slog's functions without a context
	if !l.logger.Enabled(ctx, level) {
		return ok
	}
	var caller [1]uintptr
	runtime.Callers(3, caller[:]) // Callers, write, Warn
	r := slog.NewRecord(now, level, text, caller[0])
	r.Add(args...)
	if suppressed > 0 {
		r.AddAttrs(slog.Int("suppressed", suppressed))
	}
	_ = l.logger.Handler().Handle(ctx, r) // slog ignores the error, too
	return ok
}

// allow reports whether a line of this kind may be written now, and the number of
// suppressed lines since the last one.
func (l *Log) allow(name string, now time.Time) (suppressed int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kinds[name]
	if k == nil && len(l.kinds) >= maxLogKinds {
		name = "" // the one kind of all further lines
		k = l.kinds[name]
	}
	if k == nil {
		l.kinds[name] = &kind{last: now}
		return 0, true
	}
	if now.Sub(k.last) < LogEvery {
		k.suppressed++
		return 0, false
	}
	suppressed, k.suppressed, k.last = k.suppressed, 0, now
	return suppressed, true
}

// plainError is the type of errors.New.
var plainError = reflect.TypeOf(errors.New(""))

// PanicText describes the value of a panic. It calls no methods of the app's types,
// because they may panic as well.
func PanicText(value any) string {
	if text, ok := value.(string); ok {
		return Shorten(text)
	}
	t := reflect.TypeOf(value)
	if t == plainError {
		return Shorten(fmt.Sprint(value))
	}
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch t.PkgPath() {
	case "runtime", "fmt":
		return Shorten(fmt.Sprint(value))
	case "": // a composite type may hold values of the app's types
		if k := t.Kind(); k <= reflect.Complex128 || k == reflect.String {
			return Shorten(fmt.Sprint(value))
		}
	}
	return Shorten(fmt.Sprintf("a value of type %T", value))
}

// Shorten cuts a text that is not the library's own to the length that a log line may
// hold.
func Shorten(text string) string {
	if len(text) <= maxLogText {
		return text
	}
	return text[:maxLogText] + "…"
}
