// Package limit holds rate limits, a limited log, a shield around the app's log
// handler, and a group of goroutines whose wait can be given up.
package limit

import "time"

// Bucket is a token bucket. It is not safe for concurrent use.
type Bucket struct {
	rate   float64 // per second; 0: no limit
	burst  float64
	tokens float64
	last   time.Time
}

// NewBucket returns a full bucket. It gets perSecond tokens per second and holds the
// tokens of burst seconds. If perSecond is not positive, there is no limit.
func NewBucket(now time.Time, perSecond int, burst float64) Bucket {
	rate := float64(max(perSecond, 0))
	return Bucket{rate: rate, burst: burst * rate, tokens: burst * rate, last: now}
}

// Take takes one token. It returns false if there is none.
func (b *Bucket) Take(now time.Time) bool {
	if !b.Has(now) {
		return false
	}
	b.tokens--
	return true
}

// Has reports whether there is a token.
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

// Wait returns the time until there is a token, counted from the last Take or Has.
func (b *Bucket) Wait() time.Duration {
	if b.rate == 0 || b.tokens >= 1 {
		return 0
	}
	return time.Duration((1 - b.tokens) / b.rate * float64(time.Second))
}

// Return puts back a taken token.
func (b *Bucket) Return() { b.tokens = min(b.tokens+1, b.burst) }
