package lease

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	minRetry = 50 * time.Millisecond
	maxRetry = time.Second
	// stallThreshold is the delay of the loop's timer that counts as a stall.
	stallThreshold = 500 * time.Millisecond
	// unheardStep is the pause before the next attempt to declare a server dead while an
	// echo without a receiver is awaited.
	unheardStep = 20 * time.Millisecond
)

// loop is the state of the goroutine that renews. Only that goroutine uses it. Each step
// does one thing, so that a stall is detected before each of them.
type loop struct {
	*Lease

	ranAt   time.Time // when the process was last known to run
	stalled bool      // a stall was longer than the lease, and no renewal has succeeded since

	renewAt   time.Time
	failing   int       // failed renewals in a row
	deadAsked time.Time // when the list of dead servers was last read; zero: never
	deadAt    time.Time // when to read it before its time; zero: no need

	candidate      string    // the server whose lease runs out first; "": there is no other
	candidateUntil time.Time // when its lease runs out
	candidateEnd   int64     // the same in Redis time (unix ms)
	declareAt      time.Time // when to declare it dead
	skipJitter     bool      // this server won the last attempt and goes on without jitter

	ended        bool      // the current incarnation is dead or lost
	declared     bool      // it is also on the list of dead servers
	reregisterAt time.Time // no earlier than this

	echoAt time.Time // of the next extra echo
}

// newLoop returns the loop of a lease that was registered at the given time.
func newLoop(l *Lease, born time.Time) *loop {
	return &loop{
		Lease:   l,
		ranAt:   born,
		renewAt: born, // the answer names the candidate and the dead servers
		echoAt:  born.Add(echoInterval),
	}
}

// run is the goroutine of the loop. It ends with ctx, after the cleaner.
func (lp *loop) run(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	defer lp.cleaner.wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	planned := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-lp.wake:
		}
		now := lp.detectStall()
		if now.Sub(planned) > stallThreshold {
			lp.echoes.reset()
		}
		lp.step(ctx, now)
		planned = lp.next()
		timer.Reset(time.Until(planned))
	}
}

// detectStall notes that the process runs now, and detects a stall that was longer than
// the lease: SIGSTOP, a frozen container, a machine that swaps. The monotonic clock goes
// on during a stall, and no call to Redis may take that long.
func (lp *loop) detectStall() time.Time {
	now := time.Now()
	if gap := now.Sub(lp.ranAt); gap > lp.cfg.TTL {
		lp.stalled = true
		lp.renewAt = now
		lp.contact.restart()
		lp.echoes.reset()
		lp.log.Warn("mesh: process stood still past its lease", "for", gap)
	}
	lp.ranAt = now
	return now
}

// step does the one thing that is due first.
func (lp *loop) step(ctx context.Context, now time.Time) {
	if ctx.Err() != nil {
		return
	}
	if inc := lp.fenced.Swap(nil); inc != nil && *inc == lp.Incarnation() {
		lp.incarnationEnded("fenced")
	}
	if lp.renewSoon.Swap(false) && lp.failing == 0 {
		lp.renewAt = now
	}
	switch {
	case lp.ended:
		if !now.Before(lp.reregisterAt) {
			lp.reregister(ctx)
		}
	case !now.Before(lp.renewAt):
		lp.renew(ctx)
	case lp.echoes.overdue(now):
		lp.resetListener(now)
	case lp.candidate != "" && !now.Before(lp.declareAt):
		if lp.echoes.unheard() { // this may be another Redis
			lp.declareAt = now.Add(unheardStep)
			return
		}
		lp.declareDead(ctx)
	case lp.echoing() && !now.Before(lp.echoAt):
		lp.sendEcho(ctx)
	}
}

// next returns the time of the next step.
func (lp *loop) next() time.Time {
	if lp.ended {
		return lp.reregisterAt
	}
	at := lp.renewAt
	sooner := func(t time.Time) {
		if t.Before(at) {
			at = t
		}
	}
	if lp.candidate != "" {
		sooner(lp.declareAt)
	}
	if t, ok := lp.echoes.deadline(); ok {
		sooner(t)
	}
	if lp.echoing() {
		sooner(lp.echoAt)
	}
	return at
}

// echoing reports whether extra echoes are sent. They pause while Redis is away.
func (lp *loop) echoing() bool {
	return lp.cfg.Watching != nil && lp.cfg.Channel != nil && lp.failing == 0
}

// sendEcho publishes an extra echo if rooms are watched here. Each renewal publishes one
// too and moves echoAt.
func (lp *loop) sendEcho(ctx context.Context) {
	sent := time.Now()
	lp.echoAt = sent.Add(echoInterval)
	if !lp.cfg.Watching() {
		return
	}
	text, n := lp.echoes.next()
	cctx, cancel := lp.bound(ctx)
	defer cancel()
	receivers, err := lp.cfg.Store.Publish(cctx, lp.cfg.Channel(lp.Incarnation()), text)
	got := lp.detectStall()
	if err != nil { // contact depends on renewals only
		lp.away()
		lp.cfg.Logger.Debug("mesh: publish echo", "error", err)
		return
	}
	lp.published(n, byPublish, receivers, sent, got)
}

// published notes that Redis took an echo. If Redis counted no receiver although the
// listener is connected, the echo may have gone to another Redis than the listener's.
// After a failover commands find the new master at once, but a subscription stays at the
// old one for as long as that lives. Or the echo went to another node of the same
// cluster, and comes back from there.
func (lp *loop) published(n uint64, by route, receivers int64, sent, at time.Time) {
	lp.echoes.published(n, by, receivers, !lp.contact.suspended(), sent, at)
}

// resetListener requests a new listener. Until it is known which Redis the listener
// finds, this server declares no other dead: after a failover, the other servers may not
// have reached the new master, and it lacks what they wrote last.
func (lp *loop) resetListener(now time.Time) {
	lp.contact.blockUntil(now.Add(echoTimeout))
	lp.log.Warn("mesh: own echo did not come back, reconnecting the listener")
	if lp.cfg.OnNoEcho != nil {
		lp.cfg.OnNoEcho()
	}
}

// retryDelay returns the pause after a failure.
func (lp *loop) retryDelay() time.Duration {
	d := min(max(lp.cfg.TTL/20, minRetry), maxRetry)
	return d + rand.N(d/4)
}
