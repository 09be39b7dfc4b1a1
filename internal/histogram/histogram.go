// Package histogram counts durations in fixed buckets. An observation costs two atomic
// additions and no lock.
package histogram

import (
	"slices"
	"sync/atomic"
	"time"
)

// Histogram counts durations. Make it with New; its methods are safe for
// concurrent use.
type Histogram struct {
	bounds []time.Duration // ascending; never changed
	counts []atomic.Uint64 // one more than bounds; the last counts durations above all bounds
	sum    atomic.Int64    // ns
}

// New returns a histogram with these upper bounds. A bound belongs to its bucket. The
// bounds must ascend.
func New(bounds ...time.Duration) *Histogram {
	return &Histogram{bounds: bounds, counts: make([]atomic.Uint64, len(bounds)+1)}
}

// Observe counts a duration. A negative duration, which only a clock step can cause,
// counts as 0.
func (h *Histogram) Observe(d time.Duration) { h.ObserveN(d, 1) }

// ObserveN counts a duration n times. It does nothing if n is below 1.
func (h *Histogram) ObserveN(d time.Duration, n int) {
	if n < 1 {
		return
	}
	d = max(d, 0)
	i, _ := slices.BinarySearch(h.bounds, d)
	h.counts[i].Add(uint64(n))
	h.sum.Add(int64(d) * int64(n))
}

// Counts are the counts of a [Histogram] at one time. They do not change.
type Counts struct {
	Bounds  []time.Duration // shared; callers must not change it
	Buckets []uint64        // not cumulative; one more than Bounds
	Sum     time.Duration
}

// Counts returns the current counts. A concurrent observation may be in the buckets and
// not in the sum, or the reverse.
func (h *Histogram) Counts() Counts {
	c := Counts{Bounds: h.bounds, Buckets: make([]uint64, len(h.counts)), Sum: time.Duration(h.sum.Load())}
	for i := range h.counts {
		c.Buckets[i] = h.counts[i].Load()
	}
	return c
}

// Calls returns bounds for calls to Redis and other operations over a network: from 0.1
// ms to 2 s, when they are given up.
func Calls() []time.Duration {
	return []time.Duration{
		100 * time.Microsecond, 250 * time.Microsecond, 500 * time.Microsecond,
		time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond,
		10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
		100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
		time.Second, 2 * time.Second,
	}
}

// Lags returns bounds for the delay of operations that are promised within a second:
// from 10 ms to a minute.
func Lags() []time.Duration {
	return []time.Duration{
		10 * time.Millisecond, 25 * time.Millisecond, 50 * time.Millisecond,
		100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond,
		time.Second, 2500 * time.Millisecond, 5 * time.Second,
		10 * time.Second, 30 * time.Second, time.Minute,
	}
}
