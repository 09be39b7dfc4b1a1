package testlog

import (
	"bytes"
	"log/slog"
	"sync"
)

// Output keeps the output of a logger as text, which a test can read while others log.
type Output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Logger returns a logger that writes to the output.
func (o *Output) Logger() *slog.Logger { return slog.New(slog.NewTextHandler(o, nil)) }

func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
