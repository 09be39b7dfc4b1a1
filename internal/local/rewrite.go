package local

import (
	"time"

	"github.com/meshpresence/mesh/internal/clock"
)

const (
	// rewritePause is the shortest time between two rewritings of a connection's entries
	// because of new metadata. Changes that come faster are written together. The first
	// change after a pause is written at once.
	rewritePause = 100 * time.Millisecond
	// rewriteAtOnce is the most entries for which each change is written at once.
	rewriteAtOnce = 4
)

// rewriting paces the rewriting of a connection's entries. Its fields are guarded by
// Conn.mu.
type rewriting struct {
	last  time.Duration // when it began, since Registry.madeAt; 0: never
	timer *clock.Timer
	armed bool
}

// rewrite queues the entries because the metadata has changed, now or after rewritePause.
// Conn.mu is held.
func (c *Conn) rewrite() {
	now := time.Since(c.registry.madeAt)
	wait := c.rewriting.last + rewritePause - now
	if c.rewriting.last == 0 || wait <= 0 || len(c.entries) <= rewriteAtOnce {
		c.rewriting.last = max(now, 1)
		for _, e := range c.entries {
			if e.wanted() {
				e.changed(asked)
			}
		}
		return
	}
	if c.rewriting.armed {
		return
	}
	if c.rewriting.timer == nil {
		c.rewriting.timer = new(clock.Timer)
	}
	c.rewriting.armed = true
	c.registry.cfg.Wheel.Schedule(c.rewriting.timer, wait, c.rewriteNow)
}

// rewriteNow runs on the wheel.
func (c *Conn) rewriteNow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rewriting.armed = false
	if c.closed {
		return
	}
	c.rewriting.last = time.Since(c.registry.madeAt)
	for _, e := range c.entries {
		if e.wanted() {
			e.changed(asked)
		}
	}
}
