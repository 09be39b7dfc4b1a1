package mesh

import (
	"sync"
	"sync/atomic"
	"time"
)

// failoverPause is the least time between two comparisons of everything for
// failovers of a cluster's nodes. Who cannot keep a connection to one of them
// suspects a failover at each loss.
const failoverPause = 3 * time.Second

// failovers is what a node knows of those in its cluster.
type failovers struct {
	pending atomic.Bool // somebody sees to it, or will when the pause is over
	seenTo  time.Time   // only who set pending touches it
}

// failover is told that a node of the cluster may have lost what was written
// last, or may have been away while what is kept there ran out. What has run out
// says nothing about its owner then: hints rest for one lease. Leases do not, as
// long as each master is the process that it was: a connection that comes and
// goes, from here alone, must not keep the dead from being buried.
func (n *node) failover() {
	n.hints.rest(time.Now().Add(n.opts.LeaseTTL))
	if !n.shifts.pending.CompareAndSwap(false, true) {
		return
	}
	n.work.Go(func() {
		t := time.NewTimer(time.Until(n.shifts.seenTo.Add(failoverPause)))
		defer t.Stop()
		select {
		case <-t.C:
		case <-n.begun.Done():
			return
		}
		n.shifts.seenTo = time.Now()
		n.shifts.pending.Store(false) // what comes from now on is another one
		n.trouble.Store(true)
		n.hub.Resync()
		n.checkMasters()
	})
}

// checkMasters asks whether each master is the process that it was. Where that
// cannot be learned nothing is concluded: the failover that follows will be seen.
func (n *node) checkMasters() {
	if id, ok := n.store.Generation(n.life); ok {
		n.identified(id)
	}
}

// checkProcess asks whether the same Redis process answers as before, now that
// the connection stands again that had been lost so many times. One that was
// lost again meanwhile is asked about by the next. No answer, where there has
// been one before, is as good as another process: connections that die while it
// is asked are those of a failover.
func (n *node) checkProcess(losses uint64) {
	id, ok := n.store.Generation(n.life)
	switch {
	case ok:
		n.identified(id)
	case n.process.Load() != nil:
		n.lease.Distrust()
	}
	n.contact.regain(losses, n.lease.Trust)
}

// identified notes which process answers. If it is another one than before, it
// may have lost what was written last, leases among it: nobody is judged on that
// before everybody has had time to renew.
func (n *node) identified(id string) {
	was := n.process.Swap(&id)
	if was == nil || *was == id {
		return
	}
	n.lease.Distrust()
	if n.expiry != nil {
		n.expiry.Recreate()
	}
}

// contact counts the losses of the connection that events come over.
type contact struct {
	mu     sync.Mutex // guards losses, and keeps what is done in their order
	losses uint64
}

func (c *contact) lost() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.losses
}

func (c *contact) lose(do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.losses++
	do()
}

// regain calls do unless there were more losses than that.
func (c *contact) regain(losses uint64, do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.losses == losses {
		do()
	}
}
