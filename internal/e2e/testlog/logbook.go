package testlog

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
)

// Logbook is a slog.Handler that keeps the lines that operators see, that is, Info and
// above.
type Logbook struct {
	Least slog.Level // Info by default
	mu    sync.Mutex
	lines []LogLine
}

// LogLine is a line of a Logbook.
type LogLine struct {
	at         time.Time
	Level      slog.Level
	Text       string // message and attributes
	Suppressed int64
}

func (b *Logbook) Enabled(_ context.Context, l slog.Level) bool { return l >= b.Least }

func (b *Logbook) WithAttrs([]slog.Attr) slog.Handler { return b }

func (b *Logbook) WithGroup(string) slog.Handler { return b }

func (b *Logbook) Handle(_ context.Context, r slog.Record) error {
	line := LogLine{at: r.Time, Level: r.Level, Text: r.Message}
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "suppressed" {
			line.Suppressed = a.Value.Int64()
		}
		if a.Key != "stack" {
			line.Text += fmt.Sprintf(" %s=%v", a.Key, a.Value)
		}
		return true
	})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, line)
	return nil
}

// Written returns the lines so far.
func (b *Logbook) Written() []LogLine {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lines)
}

// Told returns the number of failures that the lines with a text stand for.
func (b *Logbook) Told(text string) (n int64) {
	for _, l := range b.Written() {
		if strings.Contains(l.Text, text) {
			n += 1 + l.Suppressed
		}
	}
	return n
}

// Busiest returns the largest number of lines within limit.LogEvery.
func (b *Logbook) Busiest() (most int) {
	lines := b.Written()
	for i := range lines {
		n := 0
		for _, l := range lines[i:] {
			if l.at.Sub(lines[i].at) < limit.LogEvery {
				n++
			}
		}
		most = max(most, n)
	}
	return most
}
