package mesh

import (
	"encoding/json"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
)

// Histogram says how often durations fell into buckets that never change. It
// is a copy: nothing alters it any more, and it is safe for concurrent use.
// The zero Histogram has no buckets and holds nothing.
type Histogram struct {
	c     histogram.Counts
	total uint64
}

// NewHistogram returns a histogram of the given bounds, which ascend and belong
// to their buckets, and of how many durations each bucket holds by itself: one
// number more than there are bounds, the last for what is above all of them.
// Sum is that of all durations. Both slices are copied. It is for tests of what
// shows a [Stats]; those of a server come from [Server.Stats]. An error wraps
// ErrInvalidOptions.
func NewHistogram(bounds []time.Duration, counts []uint64, sum time.Duration) (Histogram, error) {
	if len(counts) != len(bounds)+1 {
		return Histogram{}, fmt.Errorf("%w: histogram of %d bounds and %d counts", ErrInvalidOptions, len(bounds), len(counts))
	}
	for i := 1; i < len(bounds); i++ {
		if bounds[i] <= bounds[i-1] {
			return Histogram{}, fmt.Errorf("%w: bounds of a histogram do not ascend: %v", ErrInvalidOptions, bounds)
		}
	}
	return histogramOf(histogram.Counts{Bounds: slices.Clone(bounds), Buckets: slices.Clone(counts), Sum: sum}), nil
}

func histogramOf(c histogram.Counts) Histogram {
	h := Histogram{c: c}
	for _, n := range c.Buckets {
		h.total += n
	}
	return h
}

// Count returns how many durations there were.
func (h Histogram) Count() uint64 { return h.total }

// Sum returns the sum of all durations. Of a server that is at work it may lack
// the last few that Count has, or have a few more.
func (h Histogram) Sum() time.Duration { return h.c.Sum }

// Buckets yields each bound with the number of durations that were at most
// that long, in ascending order. What was longer than the last bound is in
// Count only.
func (h Histogram) Buckets() iter.Seq2[time.Duration, uint64] {
	return func(yield func(time.Duration, uint64) bool) {
		var n uint64
		for i, bound := range h.c.Bounds {
			n += h.c.Buckets[i]
			if !yield(bound, n) {
				return
			}
		}
	}
}

// Quantile returns the bound below which the share q of the durations lies, 0.5
// the median. It is no more exact than the buckets are: the true value is at
// most that, and above the bound before it. Where it is above all bounds the
// last one is returned, and 0 where there were none. q is cut to 0 … 1.
func (h Histogram) Quantile(q float64) time.Duration {
	if h.total == 0 || len(h.c.Bounds) == 0 {
		return 0
	}
	rank := uint64(math.Ceil(min(max(q, 0), 1) * float64(h.total)))
	for bound, n := range h.Buckets() {
		if n >= max(rank, 1) {
			return bound
		}
	}
	return h.c.Bounds[len(h.c.Bounds)-1]
}

// MarshalJSON encodes the histogram as {"count", "sum", "buckets": [{"le",
// "count"}]}, sum and le in seconds, count as Buckets has it.
func (h Histogram) MarshalJSON() ([]byte, error) {
	type bucket struct {
		LE    float64 `json:"le"`
		Count uint64  `json:"count"`
	}
	buckets := make([]bucket, 0, len(h.c.Bounds))
	for bound, n := range h.Buckets() {
		buckets = append(buckets, bucket{bound.Seconds(), n})
	}
	return json.Marshal(struct {
		Count   uint64   `json:"count"`
		Sum     float64  `json:"sum"`
		Buckets []bucket `json:"buckets"`
	}{h.total, h.c.Sum.Seconds(), buckets})
}
