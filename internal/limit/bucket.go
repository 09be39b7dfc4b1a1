// Package limit holds what comes per second, and what is logged, within bounds.
package limit

import "time"

// Bucket is a token bucket. It is not safe for concurrent use.
type Bucket struct {
	rate   float64 // per second; 0: no limit
	burst  float64
	tokens float64
	last   time.Time
}

// NewBucket returns a full bucket that lets perSecond through in the long run,
// and that of burst seconds at once; perSecond not positive: one without limit.
func NewBucket(now time.Time, perSecond int, burst float64) Bucket {
	rate := float64(max(perSecond, 0))
	return Bucket{rate: rate, burst: burst * rate, tokens: burst * rate, last: now}
}

// Take takes one token; false: there is none.
func (b *Bucket) Take(now time.Time) bool {
	if !b.Has(now) {
		return false
	}
	b.tokens--
	return true
}

// Has reports whether there is a token to take.
func (b *Bucket) Has(now time.Time) bool {
	if b.rate == 0 {
		return true
	}
	if since := now.Sub(b.last); since > 0 {
		b.tokens = min(b.tokens+since.Seconds()*b.rate, b.burst)
		b.last = now
	}
	return b.tokens >= 1
}

// Return puts back a token that was taken.
func (b *Bucket) Return() { b.tokens = min(b.tokens+1, b.burst) }
