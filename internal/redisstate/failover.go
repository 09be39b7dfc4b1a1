package redisstate

import (
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
)

// failoverPause is the least time between two reactions to suspected failovers. A server
// that cannot keep a connection to one node suspects a failover at each loss.
const failoverPause = 3 * time.Second

// failover is the state of the reaction to suspected failovers.
type failover struct {
	pending   atomic.Bool // a goroutine reacts now, or when the pause is over
	handledAt time.Time   // only the goroutine that pending stands for uses it
}

// FailoverSuspected notes that a node of the cluster may have lost the newest writes, or
// may have been away while its keys expired. Such keys say nothing about their owners, so
// expired hints pause for one lease. Leases count as long as each master is the process
// that it was: if only this server keeps losing a connection, dead servers are still
// declared dead.
func (s *State) FailoverSuspected() {
	s.cfg.PauseExpired(time.Now().Add(s.cfg.LeaseTTL))
	if !s.failover.pending.CompareAndSwap(false, true) {
		return
	}
	s.cfg.Go(func() {
		if wait.For(s.cfg.Running, time.Until(s.failover.handledAt.Add(failoverPause))) != nil {
			return
		}
		s.failover.handledAt = time.Now()
		s.failover.pending.Store(false) // a later suspicion is another one
		s.missed.Store(true)
		s.cfg.Resync()
		s.checkMasters()
	})
}

// checkMasters asks whether each master is the process that it was. If that cannot be
// learned, it concludes nothing: a failover that follows will be noticed.
func (s *State) checkMasters() {
	if id, ok := s.cfg.Generation(s.cfg.Life); ok {
		s.NoteGeneration(id)
	}
}
