package testlog

import (
	"bytes"
	"log/slog"
	"sync"
)

// TextLog is a logger whose lines a test can read while others write.
type TextLog struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *TextLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *TextLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *TextLog) Logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }
