package lease

import (
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// minTolerance is the least by which Redis's clock and the monotonic clock may
// disagree before the disagreement counts.
const minTolerance = 100 * time.Millisecond

// reading is one look at Redis's clock: at some moment between sent and got it
// showed redis.
type reading struct {
	sent, got time.Time
	redis     int64 // unix ms
}

// span says between which bounds Redis's clock was ahead of the monotonic
// clock, counted from base. The millisecond is for redis being rounded down.
func (r reading) span(base time.Time) (lo, hi time.Duration) {
	at := time.Duration(r.redis) * time.Millisecond
	return at - r.got.Sub(base), at + time.Millisecond - r.sent.Sub(base)
}

// apart is the least by which the clocks parted between two readings: what the
// uncertainty of the round trips explains does not count.
func (r reading) apart(q reading, base time.Time) time.Duration {
	rlo, rhi := r.span(base)
	qlo, qhi := q.span(base)
	return max(0, rlo-qhi, qlo-rhi)
}

// patience decides whether this server may judge others. A streak of good
// renewals, none failed, no gap above half a TTL, the clocks in step with each
// other, must have lasted one TTL.
type patience struct {
	ttl       time.Duration
	tolerance time.Duration
	base      time.Time // origin of the monotonic clock

	mu     sync.Mutex // guards the fields below
	since  time.Time  // when the streak began; zero: there is none
	streak []reading  // its readings of the last TTL, oldest first
	clock  reading    // the best reading to extrapolate from
	known  bool       // clock holds one
	steps  uint64     // clock steps seen
	held   bool       // see Lease.Suspend
	until  time.Time  // judgments are held back until then, whatever held says
}

func newPatience(ttl time.Duration) *patience {
	return &patience{ttl: ttl, tolerance: max(ttl/10, minTolerance), base: time.Now()}
}

// slow reports whether a round trip took too long for its reading of the clock
// to prove anything.
func (p *patience) slow(r reading) bool { return r.got.Sub(r.sent) > p.tolerance }

// note takes in a renewal that succeeded and reports whether it shows that a
// clock stepped. A slow one neither breaks the streak nor counts in it, so that
// slow ones alone let it break by the gap; but if even its wide bounds
// contradict the streak, a clock has stepped.
func (p *patience) note(r reading) (step bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, q := range p.streak {
		if r.apart(q, p.base) > p.tolerance {
			step = true
			break
		}
	}
	if step {
		p.steps++
		p.restartLocked()
		p.clock, p.known = r, true
	}
	if p.slow(r) {
		if !p.known {
			p.clock, p.known = r, true
		}
		return step
	}
	// The wide view of the gap: from before the last call to after this one.
	if n := len(p.streak); n > 0 && r.got.Sub(p.streak[n-1].sent) > p.ttl/2 {
		p.restartLocked()
	}
	if p.since.IsZero() {
		p.since = r.got
	}
	for len(p.streak) > 0 && r.got.Sub(p.streak[0].got) > p.ttl {
		p.streak = p.streak[1:]
	}
	p.streak = append(p.streak, r)
	p.clock, p.known = r, true
	return step
}

// restart ends the streak: a renewal failed, or something else gives reason to
// doubt.
func (p *patience) restart() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.restartLocked()
}

// stepped ends the streak because a script found Redis's clock elsewhere, and
// reports whether there was one: several scripts may meet the same step.
func (p *patience) stepped() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		return false
	}
	p.steps++
	p.restartLocked()
	return true
}

func (p *patience) restartLocked() {
	p.since = time.Time{}
	p.streak = nil
}

// suspend holds judgments back, or lets them go on.
func (p *patience) suspend(held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held = held
}

// suspended reports whether suspend holds judgments back.
func (p *patience) suspended() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held
}

// hold holds judgments back until the given time.
func (p *patience) hold(until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = until
}

// judge gives a judgment for the moment at, if patience allows one. A process
// that stood still between its last renewal and now does not get one; one that
// stands still after this is refused by the script, whose clock has gone on.
func (p *patience) judge(at time.Time) (store.Judgment, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held || at.Before(p.until) || p.since.IsZero() || at.Sub(p.since) < p.ttl || at.Sub(p.streak[len(p.streak)-1].sent) > p.ttl/2 {
		return store.Judgment{}, false
	}
	return store.Judgment{Now: p.extrapolateLocked(at), Tolerance: p.tolerance}, true
}

// now extrapolates Redis's clock to the moment at.
func (p *patience) now(at time.Time) (int64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.known {
		return 0, false
	}
	return p.extrapolateLocked(at), true
}

func (p *patience) extrapolateLocked(at time.Time) int64 {
	lo, hi := p.clock.span(p.base)
	return (at.Sub(p.base) + lo + (hi-lo)/2).Milliseconds()
}

// left says how long, from at, until patience could allow a judgment: 0 if it
// does now, about one TTL if there is no streak.
func (p *patience) left(at time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		return p.ttl
	}
	return max(0, p.since.Add(p.ttl).Sub(at))
}

// stepCount returns how many clock steps were seen.
func (p *patience) stepCount() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.steps
}
