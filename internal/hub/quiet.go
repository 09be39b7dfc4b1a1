package hub

import (
	"sync"
	"time"
)

// quietFor is how long a repeated warning is only counted.
const quietFor = 10 * time.Second

// quiet says when something that repeats may be logged again. There are as
// many lines as places in the code that warn.
type quiet struct {
	mu    sync.Mutex // guards the following
	lines map[string]*line
}

// line is one message that repeats.
type line struct {
	last    time.Time
	skipped int
}

// may reports whether it is time to log the message again, and how many were
// skipped.
func (q *quiet) may(message string, now time.Time) (skipped int, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.lines[message]
	if l == nil {
		if q.lines == nil {
			q.lines = make(map[string]*line)
		}
		q.lines[message] = &line{last: now}
		return 0, true
	}
	if now.Sub(l.last) < quietFor {
		l.skipped++
		return 0, false
	}
	skipped = l.skipped
	l.last, l.skipped = now, 0
	return skipped, true
}

// warn logs what went wrong with Redis: each message at most every 10 s, with
// a count of those left out. Nothing is logged of what ends because the hub
// stops. The message must be a constant.
func (h *Hub) warn(message string, args ...any) {
	if h.ctx.Err() != nil {
		return
	}
	if skipped, ok := h.failures.may(message, time.Now()); ok {
		h.cfg.Logger.Warn(message, append(args, "skipped", skipped)...)
	}
}
