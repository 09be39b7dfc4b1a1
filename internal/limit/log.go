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
	// LogEvery is how often a line of one kind is logged at most.
	LogEvery = 10 * time.Second
	// logKinds bounds how many kinds of lines are told apart; those beyond are
	// one kind.
	logKinds = 1024
	// logText bounds the bytes of a text that is not the library's own.
	logText = 256
)

// Log writes log lines that may repeat: of one kind at most one every LogEvery,
// with the number of those that were held back since the last one, as
// "suppressed". What is held back is written at Debug. Safe for concurrent use.
//
// The number comes with the next line of the kind, and not by itself: a log
// that has fallen silent says that nothing happens any more.
type Log struct {
	logger *slog.Logger

	mu    sync.Mutex // guards kinds
	kinds map[string]*kind
}

// kind is what a Log knows about one kind of line.
type kind struct {
	last time.Time
	held int
}

// NewLog returns a Log that writes to logger; nil: to nobody.
func NewLog(logger *slog.Logger) *Log {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	return &Log{logger: logger, kinds: make(map[string]*kind)}
}

// Info writes a line at Info; its kind is its text, which must be a constant.
// It reports whether the line was written, not held back.
func (l *Log) Info(text string, args ...any) bool { return l.write(slog.LevelInfo, text, text, args) }

// Warn is Info at Warn.
func (l *Log) Warn(text string, args ...any) bool { return l.write(slog.LevelWarn, text, text, args) }

// Error is Info at Error.
func (l *Log) Error(text string, args ...any) bool {
	return l.write(slog.LevelError, text, text, args)
}

// As writes a line of a kind that is not its text: for lines of one text that
// are about different things. There must be few kinds, none of them a client's
// to choose.
func (l *Log) As(level slog.Level, kind, text string, args ...any) bool {
	return l.write(level, kind, text, args)
}

// write is called by the functions above alone, which have been called by
// whoever the line is to name as its source.
func (l *Log) write(level slog.Level, kind, text string, args []any) bool {
	now := time.Now()
	held, ok := l.allow(kind, now)
	if !ok {
		level = slog.LevelDebug
	}
	ctx := context.Background() // as slog's own functions without one
	if !l.logger.Enabled(ctx, level) {
		return ok
	}
	var caller [1]uintptr
	runtime.Callers(3, caller[:]) // Callers, write, Warn
	r := slog.NewRecord(now, level, text, caller[0])
	r.Add(args...)
	if held > 0 {
		r.AddAttrs(slog.Int("suppressed", held))
	}
	_ = l.logger.Handler().Handle(ctx, r) // as slog's own functions
	return ok
}

// allow reports whether a line of this kind may be written now, and how many
// were held back since the last one.
func (l *Log) allow(name string, now time.Time) (held int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := l.kinds[name]
	if k == nil && len(l.kinds) >= logKinds {
		name = "" // the rest, together
		k = l.kinds[name]
	}
	if k == nil {
		l.kinds[name] = &kind{last: now}
		return 0, true
	}
	if now.Sub(k.last) < LogEvery {
		k.held++
		return 0, false
	}
	held, k.held, k.last = k.held, 0, now
	return held, true
}

// plainError is the type of errors.New.
var plainError = reflect.TypeOf(errors.New(""))

// PanicText describes the value of a panic. It calls no methods of types that
// may be an app's: those may panic as well.
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
	case "": // a list or the like may hold an app's values
		if k := t.Kind(); k <= reflect.Complex128 || k == reflect.String {
			return Shorten(fmt.Sprint(value))
		}
	}
	return Shorten(fmt.Sprintf("a value of type %T", value))
}

// Shorten cuts a text that is not the library's own down to what a log line may
// hold of it.
func Shorten(text string) string {
	if len(text) <= logText {
		return text
	}
	return text[:logText] + "…"
}
