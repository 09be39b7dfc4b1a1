package local

import "time"

// frameAction is what the next frame of a connection does to one of its entries.
type frameAction uint8

const (
	// frameIgnored: nothing. The entry is present, or it has left for good.
	frameIgnored frameAction = iota
	// frameJoins: it joins an entry that is not wanted. The entry ended by silence, or
	// waits for permission to return (see Config.MayReturn).
	frameJoins
	// frameRefreshes: it refreshes a wanted entry that is silent past its TTL.
	frameRefreshes
)

// setOnFrame sets the action of the next frame. Conn.mu is held.
func (e *entry) setOnFrame(a frameAction) {
	switch {
	case e.onFrame == frameIgnored && a != frameIgnored:
		e.c.frameWaiters.Add(1)
	case e.onFrame != frameIgnored && a == frameIgnored:
		e.c.frameWaiters.Add(-1)
	}
	e.onFrame = a
}

// returnOnFrame joins an ended entry again after a sign of life of its connection, unless
// MayReturn defers the decision. Conn.mu is held.
func (e *entry) returnOnFrame() {
	if e.c.registry.cfg.MayReturn(e.c, e.room) {
		e.join()
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
	if c.closed || e == nil || e.onFrame != frameJoins {
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
	if c.closed || e == nil || e.onFrame != frameJoins || !still(c.metaVersion) {
		return false
	}
	e.setOnFrame(frameIgnored)
	e.removeIfEnded()
	return true
}
