package testlog

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
)

// Warnings is a slog.Handler that keeps the texts of warnings and errors.
type Warnings struct {
	mu   sync.Mutex // guards list
	list []string
}

func (w *Warnings) Texts() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.list...)
}

func (w *Warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (w *Warnings) Handle(_ context.Context, r slog.Record) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := r.Message
	r.Attrs(func(a slog.Attr) bool { text += fmt.Sprintf(" %s=%v", a.Key, a.Value); return true })
	w.list = append(w.list, text)
	return nil
}

func (w *Warnings) WithAttrs([]slog.Attr) slog.Handler { return w }

func (w *Warnings) WithGroup(string) slog.Handler { return w }
