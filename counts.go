package mesh

import (
	"encoding/json"
	"fmt"
	"iter"
	"math"
	"net/http"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/wire"
)

// addTo counts one event under its key. A key that is not in keys counts as other,
// which must be in keys. Safe for concurrent use.
func addTo(counters []atomic.Uint64, keys []string, key, other string) {
	at := slices.Index(keys, key)
	if at < 0 {
		at = slices.Index(keys, other)
	}
	counters[at].Add(1)
}

// countsOf returns the counters by key, including zeros.
func countsOf(counters []atomic.Uint64, keys []string) map[string]uint64 {
	counts := make(map[string]uint64, len(keys))
	for i, key := range keys {
		counts[key] = counters[i].Load()
	}
	return counts
}

// Histogram counts durations in fixed buckets. It is a copy that never changes, and
// safe for concurrent use. The zero Histogram has no buckets and is empty.
type Histogram struct {
	c     histogram.Counts
	total uint64
}

// NewHistogram returns a histogram for tests of code that shows [Stats]. [Server.Stats]
// returns those of a server. bounds are the upper bounds of the buckets, in ascending
// order. counts has the number of durations in each bucket alone, and one more number
// for durations above all bounds. sum is the sum of all durations. Both slices are
// copied. Errors wrap ErrInvalidOptions.
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

// Count returns the number of durations.
func (h Histogram) Count() uint64 { return h.total }

// Sum returns the sum of all durations. While the server is working, it may not include
// the last few that Count includes, or include a few more.
func (h Histogram) Sum() time.Duration { return h.c.Sum }

// Buckets yields each bound, in ascending order, with the number of durations up to
// that bound. Durations above the last bound are only in Count.
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

// Quantile returns the bound below which the share q of the durations lies. For
// example, 0.5 is the median. It is as exact as the buckets: the true value is at most
// the result and above the previous bound. If it is above all bounds, the last bound is
// returned. Without durations the result is 0. q is limited to 0 … 1.
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

// MarshalJSON encodes the histogram as {"count", "sum", "buckets": [{"le", "count"}]}.
// sum and le are in seconds, and count is cumulative as in Buckets.
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

// failedCodes are the codes by which failed commands are counted. Other codes count as
// the last one.
var failedCodes = [...]string{
	wire.CodeInvalid, wire.CodeTooLarge, wire.CodeLimit, wire.CodeNotFound, wire.CodeRefused,
	wire.CodeBusy, wire.CodeUnavailable, wire.CodeConflict, wire.CodeTimeout, wire.CodeClosed, wire.CodeServer, codeOther,
}

// codeOther stands for codes of the app.
const codeOther = "other"

// failedCommands counts failed commands for which answersFalse is true.
type failedCommands [len(failedCodes)]atomic.Uint64

func (f *failedCommands) add(code string) { addTo(f[:], failedCodes[:], code, codeOther) }

// counts returns the numbers by code.
func (f *failedCommands) counts() map[string]uint64 { return countsOf(f[:], failedCodes[:]) }

// refusedStatuses are the keys of Stats.RefusedUpgrades. The last two stand for all
// other statuses that the app can choose.
var refusedStatuses = [...]string{"400", "401", "403", "404", "405", "429", "499", "500", "503", "505", "4xx", "5xx"}

// refusedUpgrades counts refused requests by status. Safe for concurrent use.
type refusedUpgrades [len(refusedStatuses)]atomic.Uint64

func (c *refusedUpgrades) count(status int) {
	other := "5xx"
	if status < http.StatusInternalServerError {
		other = "4xx"
	}
	addTo(c[:], refusedStatuses[:], strconv.Itoa(status), other)
}

func (c *refusedUpgrades) counts() map[string]uint64 { return countsOf(c[:], refusedStatuses[:]) }
