package lease

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// declareJitter spreads the attempts of servers that wait for the same deadline.
	declareJitter = 150 * time.Millisecond
	// rivalCleanUp is the time until the list of dead servers is read after another
	// server won the attempt. That server should have cleaned up by then.
	rivalCleanUp = time.Second
)

// planDeclare plans to declare the candidate dead, that is the server whose lease runs
// out first. A live candidate renews before that, and the plan is replaced at each
// renewal of this server. After a won attempt the next overdue candidate follows without
// jitter, so that the one survivor of many servers is done in time.
func (lp *loop) planDeclare(answer store.Renewal, at time.Time) {
	lp.candidate, lp.candidateUntil = answer.Next, at.Add(answer.NextIn)
	lp.candidateEnd = answer.Now + answer.NextIn.Milliseconds()
	wait := max(answer.NextIn, 0) + time.Millisecond
	if !lp.skipJitter || answer.NextIn > 0 {
		wait += rand.N(declareJitter)
	}
	lp.skipJitter = false
	lp.declareAt = at.Add(wait)
}

// declareDead declares the candidate dead if this server is in contact. The script still
// checks the lease of the candidate, and the clock of Redis against the proof. In any
// case a renewal follows at once and names the next candidate.
func (lp *loop) declareDead(ctx context.Context) {
	inc := lp.candidate
	sent := time.Now()
	proof, ok := lp.ClockProof()
	if !ok {
		lp.declareAt = sent.Add(max(lp.contact.remaining(sent), lp.retryDelay()) + rand.N(declareJitter))
		return
	}
	cctx, cancel := lp.bound(ctx)
	won, err := lp.cfg.Store.DeclareDeadIfExpired(cctx, proof, inc)
	cancel()
	now := lp.detectStall()

	lp.candidate, lp.renewAt = "", now
	switch {
	case errors.Is(err, store.ErrClock):
		lp.ClockRefused(now.Sub(sent))
	case err != nil: // it may be dead now, and only this server knows
		lp.deadAt = now
		if ctx.Err() == nil {
			lp.log.Warn("mesh: declare dead", "incarnation", inc, "error", err)
		}
	case won:
		lp.skipJitter = true
		lp.counters.add(func(c *counters) { c.declaredDead++ })
		lp.log.Info("mesh: a server's lease ran out, it was declared dead", "incarnation", inc)
		lp.cleaner.add(ctx, inc, deadServer{declaredHere: true, leaseUntil: lp.candidateUntil, leaseEnd: lp.candidateEnd})
	default: // another server was first, or the candidate renewed
		lp.deadAt = now.Add(rivalCleanUp)
	}
}
