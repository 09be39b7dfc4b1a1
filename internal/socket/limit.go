package socket

import "time"

const (
	burstFactor = 2  // how many seconds' worth may come at once
	floodFactor = 10 // how many times the rate of commands is a flood
)

// bucket is a token bucket. It is not safe for concurrent use.
type bucket struct {
	rate   float64 // per second; 0: no limit
	tokens float64
	last   time.Time
}

// newBucket returns a full bucket; perSecond not positive: one without limit.
func newBucket(now time.Time, perSecond int) bucket {
	rate := float64(max(perSecond, 0))
	return bucket{rate: rate, tokens: burstFactor * rate, last: now}
}

// take takes one token; false: there is none.
func (b *bucket) take(now time.Time) bool {
	if b.rate == 0 {
		return true
	}
	if since := now.Sub(b.last); since > 0 {
		b.tokens = min(b.tokens+since.Seconds()*b.rate, burstFactor*b.rate)
		b.last = now
	}
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}
