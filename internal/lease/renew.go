package lease

import (
	"context"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// renew renews the lease once and plans what follows from the answer.
func (lp *loop) renew(ctx context.Context) {
	inc := lp.Incarnation()
	sent := lp.detectStall()
	wantDead := lp.wantsDead(sent)
	text, n := lp.echoes.next()

	cctx, cancel := lp.bound(ctx)
	answer, err := lp.cfg.Store.Renew(cctx, inc, lp.cfg.TTL, text, wantDead)
	cancel()
	got := lp.detectStall()

	switch {
	case err == nil && !answer.Listed:
		lp.incarnationEnded("not on the list")
		return
	case got.Sub(sent) > lp.cfg.TTL:
		// The process stalled during the call, so the lease may be gone whatever the
		// answer says. detectStall has planned the next renewal.
		return
	case err != nil:
		lp.renewFailed(ctx, got, err)
		return
	}
	lp.published(n, byRenewal, answer.Receivers, sent, got)
	lp.echoAt = sent.Add(echoInterval)
	if wantDead {
		lp.deadAsked, lp.deadAt = sent, time.Time{}
	}
	lp.renewed(ctx, answer, reading{sent: sent, got: got, redis: answer.Now})
}

// renewFailed plans the next attempt. A failure for any reason ends the contact: if this
// server did not reach Redis, others may not have reached it either.
func (lp *loop) renewFailed(ctx context.Context, at time.Time, err error) {
	if ctx.Err() != nil {
		return
	}
	lp.failing++
	lp.contact.restart()
	lp.counters.add(func(c *counters) { c.failures++ })
	lp.away()
	lp.renewAt = at.Add(lp.retryDelay())
	lp.candidate = ""
	lp.log.Warn("mesh: renew lease", "error", err)
}

func (lp *loop) away() {
	if lp.cfg.OnAway != nil {
		lp.cfg.OnAway()
	}
}

// renewed handles a successful renewal.
func (lp *loop) renewed(ctx context.Context, answer store.Renewal, r reading) {
	recovered := lp.failing > 0
	lp.failing, lp.stalled = 0, false
	lp.counters.add(func(c *counters) { c.last = r.got })
	if lp.contact.note(r) {
		lp.log.Warn("mesh: redis clock stepped, not declaring servers dead for one LeaseTTL")
	}

	lp.renewAt = r.sent.Add(lp.cfg.TTL / 3)
	if lp.contact.slow(r) { // a better reading of the clock is needed soon
		lp.renewAt = r.got.Add(lp.retryDelay())
	}
	if !lp.deadAt.IsZero() && lp.deadAt.Before(lp.renewAt) {
		lp.renewAt = lp.deadAt
	}
	lp.planDeclare(answer, r.got)

	if slices.Contains(answer.Dead, lp.Incarnation()) {
		lp.incarnationEnded("on the dead list")
		return
	}
	if lp.deadAsked.Equal(r.sent) && len(answer.Dead) < maxDeadListed {
		lp.redeclare(ctx, answer.Dead)
	}
	for i, inc := range answer.Dead {
		lp.cleaner.add(ctx, inc, deadServer{leaseEnd: answer.DeadSince[i]})
	}
	if lp.cfg.OnRenew != nil {
		lp.cfg.OnRenew(Renewed{Now: answer.Now, Owned: answer.Owned, Recovered: recovered})
	}
}

// redeclare puts incarnations that this server is cleaning up after back on the list of
// dead servers. Either the list was lost, or another server has finished. In the second
// case this server finishes soon too.
func (lp *loop) redeclare(ctx context.Context, dead []string) {
	for _, inc := range lp.cleaner.working() {
		if slices.Contains(dead, inc) {
			continue
		}
		cctx, cancel := lp.bound(ctx)
		err := lp.cfg.Store.DeclareDead(cctx, inc)
		cancel()
		if lp.detectStall(); err != nil {
			lp.cfg.Logger.Debug("mesh: declare a dead server dead again", "incarnation", inc, "error", err)
			return // do not delay renewals; the next one reads the list again
		}
	}
}

// wantsDead reports whether a renewal sent now should read the list of dead servers. That
// is the first renewal, about every third one, each one during a cleanup, and one soon
// after another server declared the candidate dead. Reading the list every time would
// make idle servers expensive.
func (lp *loop) wantsDead(now time.Time) bool {
	if lp.deadAsked.IsZero() || len(lp.cleaner.working()) > 0 {
		return true
	}
	if now.Sub(lp.deadAsked) >= lp.cfg.TTL*5/6 {
		return true
	}
	return !lp.deadAt.IsZero() && !now.Before(lp.deadAt)
}

// maxDeadListed is the most dead servers that a renewal returns.
const maxDeadListed = 64

// incarnationEnded notes that the current incarnation is dead or lost.
func (lp *loop) incarnationEnded(why string) {
	if lp.ended {
		return
	}
	lp.ended, lp.declared = true, false
	lp.candidate = ""
	lp.contact.restart()
	lp.log.Warn("mesh: this server was declared dead or forgotten",
		"incarnation", lp.Incarnation(), "why", why, "stalled", lp.stalled)
}

// reregister puts the ended incarnation on the list of dead servers and registers a new
// one. It is repeated until both succeed. The old incarnation is declared dead even if
// that was done before: entries that it wrote after Redis lost it must be cleaned up too.
//
// Each attempt takes a new id. A failed attempt may still have registered its id, and
// other servers may have declared that id dead and fenced it since. Such an id owns
// nothing and is cleaned up like any other.
func (lp *loop) reregister(ctx context.Context) {
	old := lp.Incarnation()
	if !lp.declared {
		cctx, cancel := lp.bound(ctx)
		err := lp.cfg.Store.DeclareDead(cctx, old)
		cancel()
		if at := lp.detectStall(); err != nil {
			lp.reregisterFailed(ctx, at, err)
			return
		}
		lp.fenceOld(ctx, old)
		lp.declared = true
	}
	inc := lp.cfg.NewIncarnation()
	lp.contact.restart()
	sent, err := lp.register(ctx, inc)
	got := lp.detectStall()
	if err != nil {
		lp.reregisterFailed(ctx, got, err)
		return
	}
	if got.Sub(sent) > lp.cfg.TTL { // a stall: this one may be dead too
		lp.reregisterAt = got
		return
	}
	lp.installIncarnation(ctx, old, inc, sent, got)
}

// fenceOld fences the old incarnation of this server in every bucket before the new one
// begins, so that a late batch of the old one cannot replace what the new one has
// written. A failure does not matter: cleaning up after the old incarnation fences it
// too.
func (lp *loop) fenceOld(ctx context.Context, old string) {
	for first := 0; first < lp.cfg.Buckets; first += fencesAtOnce {
		n := min(fencesAtOnce, lp.cfg.Buckets-first)
		_ = wait.Each(ctx, n, n, func(i int) error {
			cctx, cancel := lp.bound(ctx)
			defer cancel()
			if err := lp.cfg.Store.Fence(cctx, first+i, old); err != nil {
				lp.cfg.Logger.Debug("mesh: fence incarnation", "incarnation", old, "bucket", first+i, "error", err)
			}
			return nil
		})
		lp.detectStall() // after each few, because all of them may take longer than the lease
	}
}

// fencesAtOnce is the number of buckets that are fenced at a time.
const fencesAtOnce = 8

func (lp *loop) reregisterFailed(ctx context.Context, at time.Time, err error) {
	lp.reregisterAt = at.Add(lp.retryDelay())
	if ctx.Err() != nil {
		return
	}
	lp.log.Warn("mesh: reregister server", "error", err)
}

// installIncarnation makes inc the current incarnation and calls OnReregistered. The
// first renewal and the next reregistration follow after a pause, so that a Redis that
// loses everything at once is not overloaded.
func (lp *loop) installIncarnation(ctx context.Context, old, inc string, sent, got time.Time) {
	stalled, cutOff := lp.stalled, lp.failing > 0
	lp.current.Store(&inc)
	lp.ended, lp.declared, lp.stalled, lp.failing = false, false, false, 0
	lp.renewAt = got.Add(lp.retryDelay())
	lp.reregisterAt = lp.renewAt
	lp.echoAt = sent.Add(echoInterval)
	lp.echoes.expectNone(got)
	lp.counters.add(func(c *counters) { c.reregistered++ })
	lp.log.Info("mesh: server has a new incarnation", "old", old, "new", inc, "stalled", stalled)
	if lp.cfg.OnReregistered != nil {
		lp.cfg.OnReregistered(old, inc, stalled)
	}
	// The server was cut off for a whole lease. The connection of the listener is
	// probably as dead as those of the renewals were, and only an echo would show that,
	// seconds later.
	if cutOff && lp.cfg.OnNoEcho != nil {
		lp.cfg.OnNoEcho()
	}
	lp.cleaner.add(ctx, old, deadServer{})
}
