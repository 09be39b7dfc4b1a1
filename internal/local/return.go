package local

import (
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// returnOnFrame joins an ended entry again after a sign of life of its connection, unless
// MayReturn defers the decision. Conn.mu is held.
func (e *entry) returnOnFrame() {
	if e.c.registry.cfg.MayReturn(e.c, e.room) {
		e.join()
		e.promised = true
	}
}

// Return joins the connection again to a room that it is out of until it may return (see
// Config.MayReturn), if accept returns no error. It does not wait for Redis. accept is
// called in the same way as by JoinIf. Return reports whether the connection was waiting
// to return.
func (c *Conn) Return(room string, accept func(metaVersion uint64) error) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || e.phase != returning {
		return false, nil
	}
	if err := accept(c.metaVersion); err != nil {
		return true, err
	}
	e.applyRules()
	if e.ttl > 0 && c.idle() >= e.ttl {
		return true, nil // silent again: the next frame joins again
	}
	e.join()
	e.promised = true
	e.idleFrom = time.Duration(c.seen.Load()) // the silence counts from the frame
	e.armTTL()
	c.ttlChanged()
	return true, nil
}

// StayOut makes a connection that is out of a room until it may return leave the room for
// good, if still returns true. still is called in the same way as by LeaveIf. StayOut
// reports whether it has done so.
func (c *Conn) StayOut(room string, still func(metaVersion uint64) bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || e.phase != returning || !still(c.metaVersion) {
		return false
	}
	e.leave(store.CauseRemoved, false, asked)
	if e.leaving.id == "" {
		e.removeIfEnded()
	}
	return true
}
