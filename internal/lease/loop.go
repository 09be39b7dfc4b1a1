package lease

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	minRetry = 50 * time.Millisecond
	maxRetry = time.Second
	// late is how far behind its timer the loop may wake before the process is
	// taken to have stood still as a whole.
	late = 500 * time.Millisecond
	// doubtStep is how often a burial looks whether it still has to wait for a
	// beat that went to nobody.
	doubtStep = 20 * time.Millisecond
)

// loop is what the renewing goroutine knows; nothing else touches it. Each step
// does one thing, so that the look whether the process had stood still comes
// before each of them.
type loop struct {
	*Lease

	seen    time.Time // when the process was last known to run
	stalled bool      // it stood still past its lease, and no renewal has succeeded since

	renewAt   time.Time
	failing   int       // failed renewals in a row
	deadAsked time.Time // when the dead list was last read; zero: never
	deadAt    time.Time // when to read it out of turn; zero: not

	foreign string    // who dies next, "" if there is nobody else
	leaseTo time.Time // when its lease runs out
	dueAt   time.Time // when to bury it
	hurry   bool      // the last one was buried by this server: go on without jitter

	absent   bool      // the current incarnation is dead or forgotten
	declared bool      // and has been put on the dead list
	rebearAt time.Time // not before

	beatAt time.Time // of the next extra beat
}

// newLoop makes the loop of a lease that was registered at born.
func newLoop(l *Lease, born time.Time) *loop {
	return &loop{
		Lease:   l,
		seen:    born,
		renewAt: born, // at once: it tells whom to wait for, and who is dead already
		beatAt:  born.Add(beatEvery),
	}
}

// run is the loop's goroutine. It ends with ctx, after the reapers.
func (lp *loop) run(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	defer lp.reaper.wait()
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
		now := lp.awake()
		if now.Sub(planned) > late {
			lp.beats.forgive()
		}
		lp.step(ctx, now)
		planned = lp.next()
		timer.Reset(time.Until(planned))
	}
}

// awake notes that the process runs now, and finds out whether it stood still
// for longer than its lease before: SIGSTOP, a frozen container, a machine that
// swaps. The monotonic clock goes on meanwhile. No call may take that long, so
// nothing else explains it.
func (lp *loop) awake() time.Time {
	now := time.Now()
	if gap := now.Sub(lp.seen); gap > lp.cfg.TTL {
		lp.stalled = true
		lp.renewAt = now
		lp.patience.restart()
		lp.beats.forgive()
		lp.log.Warn("mesh: process stood still past its lease", "for", gap)
	}
	lp.seen = now
	return now
}

// step does the one thing that is due first.
func (lp *loop) step(ctx context.Context, now time.Time) {
	if ctx.Err() != nil {
		return
	}
	if inc := lp.fenced.Swap(nil); inc != nil && *inc == lp.Incarnation() {
		lp.lost("fenced")
	}
	if lp.look.Swap(false) && lp.failing == 0 {
		lp.renewAt = now
	}
	switch {
	case lp.absent:
		if !now.Before(lp.rebearAt) {
			lp.rebear(ctx)
		}
	case !now.Before(lp.renewAt):
		lp.renew(ctx)
	case lp.beats.overdue(now):
		lp.deaf(now)
	case lp.foreign != "" && !now.Before(lp.dueAt):
		if lp.beats.doubtful() { // this may be another Redis: soon it is known
			lp.dueAt = now.Add(doubtStep)
			return
		}
		lp.bury(ctx)
	case lp.beating() && !now.Before(lp.beatAt):
		lp.beat(ctx)
	}
}

// next says when the next step is due.
func (lp *loop) next() time.Time {
	if lp.absent {
		return lp.rebearAt
	}
	at := lp.renewAt
	sooner := func(t time.Time) {
		if t.Before(at) {
			at = t
		}
	}
	if lp.foreign != "" {
		sooner(lp.dueAt)
	}
	if t, ok := lp.beats.deafAt(); ok {
		sooner(t)
	}
	if lp.beating() {
		sooner(lp.beatAt)
	}
	return at
}

// beating reports whether extra beats are wanted: none while Redis is away.
func (lp *loop) beating() bool {
	return lp.cfg.Busy != nil && lp.cfg.Control != nil && lp.failing == 0
}

// beat publishes an extra beat if rooms are watched here. Renewals publish one
// each and move beatAt.
func (lp *loop) beat(ctx context.Context) {
	sent := time.Now()
	lp.beatAt = sent.Add(beatEvery)
	if !lp.cfg.Busy() {
		return
	}
	text, n := lp.beats.mint()
	cctx, cancel := lp.bound(ctx)
	defer cancel()
	heard, err := lp.cfg.Store.Publish(cctx, lp.cfg.Control(lp.Incarnation()), text)
	got := lp.awake()
	if err != nil { // a beat is no renewal: patience does not suffer from it
		lp.away()
		lp.cfg.Logger.Debug("mesh: publish beat", "error", err)
		return
	}
	lp.published(n, byPublish, heard, sent, got)
}

// published notes that Redis took a beat. Where it had nobody to pass it on to,
// though the listener is not known to be without connection, the beat may have
// gone to another Redis than the one that is listened to: after a failover
// commands find the new master at once, and a subscription stays at the old one
// for as long as that lives. Or it went to another node of the same cluster, and
// will come back from there.
func (lp *loop) published(n uint64, by way, heard int64, sent, at time.Time) {
	lp.beats.published(n, by, heard, !lp.patience.suspended(), sent, at)
}

// deaf has the listener made anew. Until it is known which Redis that comes out
// at, nobody is judged: after a failover others may not have got through to
// the new master, which lacks what they last told the old one.
func (lp *loop) deaf(now time.Time) {
	lp.patience.hold(now.Add(deafAfter))
	lp.log.Warn("mesh: own beat did not come back, listener is made anew")
	if lp.cfg.OnDeaf != nil {
		lp.cfg.OnDeaf()
	}
}

// retry is how long to wait after a failure.
func (lp *loop) retry() time.Duration {
	d := min(max(lp.cfg.TTL/20, minRetry), maxRetry)
	return d + rand.N(d/4)
}
