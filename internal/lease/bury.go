package lease

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// buryJitter spreads the servers that all wait for the same deadline.
	buryJitter = 150 * time.Millisecond
	// lostRace is how long after a lost burial the dead list is read: whoever
	// won it should have cleaned up by then.
	lostRace = time.Second
)

// watch plans the burial of the incarnation whose lease runs out first. Where
// it lives it will have renewed by then, and some renewal of ours will have
// said so: the plan is made anew at each. After a won burial the next one that
// is overdue follows without jitter, so that one survivor of many gets through
// in time.
func (lp *loop) watch(answer store.Renewal, at time.Time) {
	lp.foreign, lp.leaseTo = answer.Next, at.Add(answer.NextIn)
	wait := max(answer.NextIn, 0) + time.Millisecond
	if !lp.hurry || answer.NextIn > 0 {
		wait += rand.N(buryJitter)
	}
	lp.hurry = false
	lp.dueAt = at.Add(wait)
}

// bury declares the foreign incarnation dead, if patience allows: the script
// still checks its deadline, and Redis's clock against the judgment. Whatever
// comes out, a renewal follows at once and says who is next.
func (lp *loop) bury(ctx context.Context) {
	inc := lp.foreign
	sent := time.Now()
	j, ok := lp.Judge()
	if !ok {
		lp.dueAt = sent.Add(max(lp.patience.left(sent), lp.retry()) + rand.N(buryJitter))
		return
	}
	cctx, cancel := lp.bound(ctx)
	won, err := lp.cfg.Store.Bury(cctx, j, inc)
	cancel()
	now := lp.awake()

	lp.foreign, lp.renewAt = "", now
	switch {
	case errors.Is(err, store.ErrClock):
		lp.ClockRefused(now.Sub(sent))
	case err != nil: // it may be dead now, with nobody to clean up but us
		lp.deadAt = now
		if ctx.Err() == nil {
			lp.log.Warn("mesh: bury", "incarnation", inc, "error", err)
		}
	case won:
		lp.hurry = true
		lp.tally.add(func(t *tally) { t.buried++ })
		lp.log.Info("mesh: a server's lease ran out, it was declared dead", "incarnation", inc)
		lp.reaper.add(ctx, inc, true, lp.leaseTo)
	default: // somebody else was first, or it renewed after all
		lp.deadAt = now.Add(lostRace)
	}
}
