package mesh

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// logEvery is how often a line of one kind is logged at most.
	logEvery = 10 * time.Second
	// logKinds bounds how many kinds of lines are told apart.
	logKinds = 1024
)

// logLimiter lets one line per key through every logEvery, with the number of
// those that were held back since. The zero logLimiter is ready. Safe for
// concurrent use.
type logLimiter struct {
	mu    sync.Mutex // guards lines
	lines map[string]*heldLine
}

// heldLine is what a logLimiter knows about one key.
type heldLine struct {
	last time.Time
	held int
}

// log writes the line, unless one of the same key was written lately.
func (l *logLimiter) log(ctx context.Context, logger *slog.Logger, level slog.Level, key, text string, attrs ...slog.Attr) {
	ok, held := l.allow(key)
	if !ok {
		return
	}
	if held > 0 {
		attrs = append(attrs, slog.Int("suppressed", held))
	}
	logger.LogAttrs(ctx, level, text, attrs...)
}

// allow reports whether a line of this key may be written now, and how many
// were held back since the last one.
func (l *logLimiter) allow(key string) (ok bool, held int) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	line := l.lines[key]
	if line == nil {
		if len(l.lines) >= logKinds {
			clear(l.lines) // cannot happen with keys from a fixed set
		}
		if l.lines == nil {
			l.lines = map[string]*heldLine{}
		}
		l.lines[key] = &heldLine{last: now}
		return true, 0
	}
	if now.Sub(line.last) < logEvery {
		line.held++
		return false, 0
	}
	held, line.held, line.last = line.held, 0, now
	return true, held
}
