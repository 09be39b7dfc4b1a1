package limit

import (
	"sync"
	"time"
)

// repeatEvery is how often a line that repeats is logged.
const repeatEvery = 10 * time.Second

// Repeats keeps a log line that repeats down to one per 10 s, with a count. The
// zero Repeats is ready. It is safe for concurrent use.
type Repeats struct {
	mu   sync.Mutex // guards the fields below
	last time.Time
	n    int
}

// Allow reports whether to log now, and how often it happened since the last
// time.
func (r *Repeats) Allow(now time.Time) (count int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n++
	if !r.last.IsZero() && now.Sub(r.last) < repeatEvery {
		return 0, false
	}
	count = r.n
	r.last, r.n = now, 0
	return count, true
}
