package lease

import (
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// minTolerance is the lower bound of the tolerance between the clock of Redis and the
// monotonic clock.
const minTolerance = 100 * time.Millisecond

// reading is one reading of the clock of Redis. At some moment between sent and got the
// clock showed redis.
type reading struct {
	sent, got time.Time
	redis     int64 // unix ms
}

// span returns the bounds of the lead of the clock of Redis over the monotonic clock,
// counted from base. The millisecond is there because redis is rounded down.
func (r reading) span(base time.Time) (lo, hi time.Duration) {
	at := time.Duration(r.redis) * time.Millisecond
	return at - r.got.Sub(base), at + time.Millisecond - r.sent.Sub(base)
}

// apart returns the least by which the clocks moved apart between two readings. The
// uncertainty of the round trips does not count.
func (r reading) apart(q reading, base time.Time) time.Duration {
	rlo, rhi := r.span(base)
	qlo, qhi := q.span(base)
	return max(0, rlo-qhi, qlo-rhi)
}

// contact decides whether this server may declare others dead. For one TTL all renewals
// must have succeeded, with no gap above half a TTL and no clock step. Such a series of
// renewals is called a streak.
type contact struct {
	ttl       time.Duration
	tolerance time.Duration
	base      time.Time // origin of the monotonic clock

	mu           sync.Mutex // guards the fields below
	since        time.Time  // start of the streak; zero: there is none
	streak       []reading  // readings of the last TTL, oldest first
	clock        reading    // the best reading to extrapolate from
	known        bool       // clock holds a reading
	steps        uint64     // clock steps seen
	blocked      bool       // see Lease.Suspend
	blockedUntil time.Time  // no contact until then, even if blocked is false
}

func newContact(ttl time.Duration) *contact {
	return &contact{ttl: ttl, tolerance: max(ttl/10, minTolerance), base: time.Now()}
}

// slow reports whether a round trip was too slow for its reading to prove anything.
func (c *contact) slow(r reading) bool { return r.got.Sub(r.sent) > c.tolerance }

// note takes the reading of a successful renewal and reports whether it shows a clock
// step. A slow reading neither ends the streak nor counts in it, so slow readings alone
// end the streak by the gap. But if even its wide bounds contradict the streak, a clock
// has stepped.
func (c *contact) note(r reading) (step bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.streak {
		if r.apart(q, c.base) > c.tolerance {
			step = true
			break
		}
	}
	if step {
		c.steps++
		c.restartLocked()
		c.clock, c.known = r, true
	}
	if c.slow(r) {
		if !c.known {
			c.clock, c.known = r, true
		}
		return step
	}
	// The gap counts from before the last call to after this one.
	if n := len(c.streak); n > 0 && r.got.Sub(c.streak[n-1].sent) > c.ttl/2 {
		c.restartLocked()
	}
	if c.since.IsZero() {
		c.since = r.got
	}
	for len(c.streak) > 0 && r.got.Sub(c.streak[0].got) > c.ttl {
		c.streak = c.streak[1:]
	}
	c.streak = append(c.streak, r)
	c.clock, c.known = r, true
	return step
}

// restart ends the streak, after a failed renewal for example.
func (c *contact) restart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restartLocked()
}

// clockStepped ends the streak because a script found an unexpected clock in Redis. It
// reports whether there was a streak: several scripts may meet the same step.
func (c *contact) clockStepped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.since.IsZero() {
		return false
	}
	c.steps++
	c.restartLocked()
	return true
}

func (c *contact) restartLocked() {
	c.since = time.Time{}
	c.streak = nil
}

// suspend ends the contact, or allows it again.
func (c *contact) suspend(blocked bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.blocked = blocked
}

// suspended reports whether suspend has ended the contact.
func (c *contact) suspended() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.blocked
}

// blockUntil ends the contact until the given time.
func (c *contact) blockUntil(until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.blockedUntil = until
}

// proof returns the clock proof for the given time if there is contact. There is none
// after a stall since the last renewal. A stall after this call makes the script refuse,
// because the clock of Redis has gone on.
func (c *contact) proof(at time.Time) (store.ClockProof, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.blocked || at.Before(c.blockedUntil) || c.since.IsZero() || at.Sub(c.since) < c.ttl || at.Sub(c.streak[len(c.streak)-1].sent) > c.ttl/2 {
		return store.ClockProof{}, false
	}
	return store.ClockProof{Now: c.extrapolateLocked(at), Tolerance: c.tolerance}, true
}

// now extrapolates the clock of Redis to the given time.
func (c *contact) now(at time.Time) (int64, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.known {
		return 0, false
	}
	return c.extrapolateLocked(at), true
}

// past returns the earliest time after which the clock of Redis is sure to have passed
// redisUnixMs.
func (c *contact) past(redisUnixMs int64) (time.Time, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.known {
		return time.Time{}, false
	}
	lo, _ := c.clock.span(c.base)
	return c.base.Add(time.Duration(redisUnixMs)*time.Millisecond - lo), true
}

func (c *contact) extrapolateLocked(at time.Time) int64 {
	lo, hi := c.clock.span(c.base)
	return (at.Sub(c.base) + lo + (hi-lo)/2).Milliseconds()
}

// remaining returns the time from at until there can be contact at the earliest: 0 if
// there can be now, one TTL if there is no streak.
func (c *contact) remaining(at time.Time) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.since.IsZero() {
		return c.ttl
	}
	return max(0, c.since.Add(c.ttl).Sub(at))
}

// stepCount returns the number of clock steps seen.
func (c *contact) stepCount() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.steps
}
