package owner

import (
	"time"

	"github.com/meshpresence/mesh/internal/clock"
)

const (
	// rewritePause is the shortest time between two rewritings of a connection's
	// entries because its metadata has changed. Changes that come faster are
	// written together. The first one after a pause is written at once.
	rewritePause = 100 * time.Millisecond
	// rewriteAtOnce is how many entries are so few that each change is written at
	// once.
	rewriteAtOnce = 4
)

// rewriting paces the rewriting of a connection's entries. Its fields are guarded
// by Conn.mu.
type rewriting struct {
	last  time.Duration // when it began, since Owner.born; 0: never
	timer *clock.Timer
	armed bool
}

// rewrite marks the entries as changed because the metadata has, and offers them
// to their lanes now or when rewritePause is over. Conn.mu is held.
func (c *Conn) rewrite() {
	now := time.Since(c.o.born)
	wait := c.rewriting.last + rewritePause - now
	if c.rewriting.last == 0 || wait <= 0 || len(c.entries) <= rewriteAtOnce {
		c.rewriting.last = max(now, 1)
		for _, e := range c.entries {
			if e.want {
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
	c.o.cfg.Wheel.Schedule(c.rewriting.timer, wait, c.rewriteNow)
}

// rewriteNow runs on the wheel.
func (c *Conn) rewriteNow() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rewriting.armed = false
	if c.closed {
		return
	}
	c.rewriting.last = time.Since(c.o.born)
	for _, e := range c.entries {
		if e.want {
			e.changed(asked)
		}
	}
}
