package lease

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// renew renews the lease once and plans what follows from the answer.
func (lp *loop) renew(ctx context.Context) {
	inc := lp.Incarnation()
	sent := lp.awake()
	wantDead := lp.wantsDead(sent)
	text, n := lp.beats.mint()

	cctx, cancel := lp.bound(ctx)
	answer, err := lp.cfg.Store.Renew(cctx, inc, lp.cfg.TTL, text, wantDead)
	cancel()
	got := lp.awake()

	switch {
	case err == nil && !answer.Present:
		lp.lost("not on the list")
		return
	case got.Sub(sent) > lp.cfg.TTL:
		// The process stood still during the call: whatever the answer was,
		// the lease may be gone since. awake has planned the next renewal.
		return
	case err != nil:
		lp.renewFailed(ctx, got, err)
		return
	}
	lp.published(n, byRenewal, answer.Heard, sent, got)
	lp.beatAt = sent.Add(beatEvery)
	if wantDead {
		lp.deadAsked, lp.deadAt = sent, time.Time{}
	}
	lp.renewed(ctx, answer, reading{sent: sent, got: got, redis: answer.Now})
}

// renewFailed plans the next attempt. A failure breaks patience whatever its
// reason: where one server did not get through, others may not have either.
func (lp *loop) renewFailed(ctx context.Context, at time.Time, err error) {
	if ctx.Err() != nil {
		return
	}
	lp.failing++
	lp.patience.restart()
	lp.tally.add(func(t *tally) { t.failures++ })
	lp.away()
	lp.renewAt = at.Add(lp.retry())
	lp.foreign = ""
	lp.log.Warn("mesh: renew lease", "error", err)
}

// away tells that Redis did not answer.
func (lp *loop) away() {
	if lp.cfg.OnAway != nil {
		lp.cfg.OnAway()
	}
}

// renewed takes in a renewal that succeeded.
func (lp *loop) renewed(ctx context.Context, answer store.Renewal, r reading) {
	recovered := lp.failing > 0
	lp.failing, lp.stalled = 0, false
	lp.tally.add(func(t *tally) { t.renewals++; t.last = r.got })
	if lp.patience.note(r) {
		lp.log.Warn("mesh: redis clock stepped, judging nobody for one lease")
	}

	lp.renewAt = r.sent.Add(lp.cfg.TTL / 3)
	if lp.patience.slow(r) { // a better reading is wanted soon
		lp.renewAt = r.got.Add(lp.retry())
	}
	if !lp.deadAt.IsZero() && lp.deadAt.Before(lp.renewAt) {
		lp.renewAt = lp.deadAt
	}
	lp.watch(answer, r.got)

	if slices.Contains(answer.Dead, lp.Incarnation()) {
		lp.lost("on the dead list")
		return
	}
	if lp.deadAsked.Equal(r.sent) && len(answer.Dead) < deadListed {
		lp.relist(ctx, answer.Dead)
	}
	for _, inc := range answer.Dead {
		lp.reaper.add(ctx, inc, false, time.Time{})
	}
	if lp.cfg.OnRenew != nil {
		lp.cfg.OnRenew(Renewed{Now: answer.Now, Owned: answer.Owned, Recovered: recovered})
	}
}

// relist puts incarnations back on the list of the dead that this server is
// cleaning up after and that are not on it any more. Either the list was lost, or
// another server has finished; then the cleaning here soon does, too.
func (lp *loop) relist(ctx context.Context, dead []string) {
	for _, inc := range lp.reaper.working() {
		if slices.Contains(dead, inc) {
			continue
		}
		cctx, cancel := lp.bound(ctx)
		err := lp.cfg.Store.DeclareDead(cctx, inc)
		cancel()
		if lp.awake(); err != nil {
			lp.cfg.Logger.Debug("mesh: list a dead server again", "incarnation", inc, "error", err)
			return // renewals must not wait for the others, and the next one asks again
		}
	}
}

// wantsDead reports whether a renewal sent now should ask for the dead list: the
// first one, about each third, each while this server cleans up after others, and
// if a burial was left to another server. Asking every time would cost an idle
// server its frugality.
func (lp *loop) wantsDead(now time.Time) bool {
	if lp.deadAsked.IsZero() || len(lp.reaper.working()) > 0 {
		return true
	}
	if now.Sub(lp.deadAsked) >= lp.cfg.TTL*5/6 {
		return true
	}
	return !lp.deadAt.IsZero() && !now.Before(lp.deadAt)
}

// deadListed limits how many dead servers a renewal returns.
const deadListed = 64

// lost notes that the current incarnation has ended.
func (lp *loop) lost(why string) {
	if lp.absent {
		return
	}
	lp.absent, lp.declared = true, false
	lp.foreign = ""
	lp.patience.restart()
	lp.log.Warn("mesh: this server was declared dead or forgotten",
		"incarnation", lp.Incarnation(), "why", why, "stalled", lp.stalled)
}

// rebear puts the ended incarnation on the dead list and registers a new one;
// it is repeated until both have succeeded. The old one is declared dead even
// where somebody did so before: what it had written after Redis forgot it must
// be cleaned up too.
//
// Each attempt takes a fresh id. An attempt whose outcome is unknown may have
// registered, run out and been buried by the next one; its id, fenced, would be
// of no use. Such an id owns nothing and is buried like any other.
func (lp *loop) rebear(ctx context.Context) {
	old := lp.Incarnation()
	if !lp.declared {
		cctx, cancel := lp.bound(ctx)
		err := lp.cfg.Store.DeclareDead(cctx, old)
		cancel()
		if at := lp.awake(); err != nil {
			lp.rebearFailed(ctx, at, err)
			return
		}
		lp.lockOut(ctx, old)
		lp.declared = true
	}
	inc := lp.cfg.NewIncarnation()
	lp.patience.restart()
	sent, err := lp.register(ctx, inc)
	got := lp.awake()
	if err != nil {
		lp.rebearFailed(ctx, got, err)
		return
	}
	if got.Sub(sent) > lp.cfg.TTL { // it stood still: this one may be dead too
		lp.rebearAt = got
		return
	}
	lp.born(ctx, old, inc, sent, got)
}

// lockOut fences an incarnation of this server in every bucket before the next
// one begins: a batch of the old one that is still on its way must not replace
// what the new one has written. Where that fails nobody waits for it: whoever
// cleans up after the old one fences it too.
func (lp *loop) lockOut(ctx context.Context, old string) {
	for bucket := 0; bucket < lp.cfg.Buckets; bucket += fencesAtOnce {
		var wg sync.WaitGroup
		for b := bucket; b < min(bucket+fencesAtOnce, lp.cfg.Buckets); b++ {
			wg.Go(func() {
				cctx, cancel := lp.bound(ctx)
				defer cancel()
				if err := lp.cfg.Store.Fence(cctx, b, old); err != nil {
					lp.cfg.Logger.Debug("mesh: lock out", "incarnation", old, "bucket", b, "error", err)
				}
			})
		}
		wg.Wait()
		lp.awake()
	}
}

// fencesAtOnce is how many buckets are locked at once.
const fencesAtOnce = 8

// rebearFailed plans the next attempt to be reborn.
func (lp *loop) rebearFailed(ctx context.Context, at time.Time, err error) {
	lp.rebearAt = at.Add(lp.retry())
	if ctx.Err() != nil {
		return
	}
	lp.log.Warn("mesh: register anew", "error", err)
}

// born puts inc in the place of old and tells the owner. The first renewal
// follows after a moment, and no rebirth can follow earlier: a Redis that
// forgets at once must not be run hot.
func (lp *loop) born(ctx context.Context, old, inc string, sent, got time.Time) {
	stalled, cutOff := lp.stalled, lp.failing > 0
	lp.current.Store(&inc)
	lp.absent, lp.declared, lp.stalled, lp.failing = false, false, false, 0
	lp.renewAt = got.Add(lp.retry())
	lp.rebearAt = lp.renewAt
	lp.beatAt = sent.Add(beatEvery)
	lp.beats.quiet(got)
	lp.tally.add(func(t *tally) { t.reborn++ })
	lp.log.Info("mesh: server lives under a new incarnation", "old", old, "new", inc, "stalled", stalled)
	if lp.cfg.OnReborn != nil {
		lp.cfg.OnReborn(old, inc, stalled)
	}
	// Out of touch for a whole lease: what the subscriptions go over is as dead
	// as what renewals went over, and would be found out by beats only, seconds
	// after everything else is well.
	if cutOff && lp.cfg.OnDeaf != nil {
		lp.cfg.OnDeaf()
	}
	lp.reaper.add(ctx, old, false, time.Time{})
}
