package owner

import "time"

// comeBack joins an entry again that has ended, now that the connection has given
// a sign of life, unless MayReturn wants to decide about it first. Conn.mu is held.
func (e *entry) comeBack() {
	if e.c.o.cfg.MayReturn(e.c, e.room) {
		e.join()
	}
}

// Return joins the connection again to a room that it is out of until it may
// return (see Config.MayReturn), if accept returns no error, and does not wait for
// Redis. accept is called as that of JoinIf is. Return reports whether the
// connection was out so.
func (c *Conn) Return(room string, accept func(metaVersion uint64) error) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || !e.asleep {
		return false, nil
	}
	if err := accept(c.metaVersion); err != nil {
		return true, err
	}
	e.obey()
	if e.ttl > 0 && c.idle() >= e.ttl {
		return true, nil // silent again: the next frame joins again
	}
	e.join()
	e.since = time.Duration(c.seen.Load()) // the silence counts from the frame
	e.armLife()
	c.ttlChanged()
	return true, nil
}

// StayOut makes the connection leave for good a room that it is out of until it
// may return, if still returns true. It is called as that of LeaveIf is. StayOut
// reports whether it has done so.
func (c *Conn) StayOut(room string, still func(metaVersion uint64) bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	if c.closed || e == nil || !e.asleep || !still(c.metaVersion) {
		return false
	}
	e.wake()
	e.settle()
	return true
}
