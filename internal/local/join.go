package local

import (
	"context"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// Joined is the result of Join.
type Joined struct {
	Position store.Position // of the room after the join
	Total    int            // members of the room after the join
	Again    bool           // the connection was in the room already
	// Kept is set beside ErrUnavailable if this is a kept join: the connection is in the
	// room, or joins it at its next frame, and Redis gets the entry as soon as it can.
	Kept   bool
	Waited time.Duration // time spent waiting for Redis
}

// Join brings the connection into room and waits until Redis has it, at most
// answerTimeout. After ErrUnavailable the entry stays wanted, and is written when Redis
// is back, unless the connection leaves before (see Joined.Kept).
func (c *Conn) Join(ctx context.Context, room string) (Joined, error) {
	return c.JoinIf(ctx, room, answerTimeout, nil)
}

// JoinIf is Join with another time limit and a condition. It joins if accept (nil:
// always) returns no error. Otherwise it returns that error. accept gets the version of
// the connection's metadata. It runs with the lock of the connection held, so that no
// change of metadata and no leave comes between it and the join. It must not block or
// call the Conn.
func (c *Conn) JoinIf(ctx context.Context, room string, within time.Duration, accept func(metaVersion uint64) error) (Joined, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return Joined{}, ErrClosed
	}
	if accept != nil {
		if err := accept(c.metaVersion); err != nil {
			c.mu.Unlock()
			return Joined{}, err
		}
	}
	if !c.in(room) && c.isFull() {
		c.mu.Unlock()
		return Joined{}, ErrTooMany
	}
	e := c.entries[room]
	again := e != nil && e.wanted()
	if e == nil {
		e = &entry{c: c, room: room, writer: c.registry.writers[c.registry.cfg.RoomBucket(room)]}
		c.entries[room] = e
	}
	if !again {
		e.join()
		c.ttlChanged()
	}
	w := e.wait()
	e.writer.enqueue(e, asked)
	c.mu.Unlock()
	began := time.Now()
	err := w.await(ctx, within)
	waited := time.Since(began)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		return Joined{Again: again, Kept: c.in(room), Waited: waited}, err
	}
	return Joined{Position: e.position, Total: e.total, Again: again, Waited: waited}, nil
}

// maxLeaving is the most rooms that a connection has left and whose leave Redis does not
// have yet.
const maxLeaving = 128

// isFull reports whether the connection may join no more rooms. Rooms that it has left do
// not count, because Redis may be away while the client goes from room to room. But they
// are kept until Redis is back, so their number is limited too. c.mu is held.
func (c *Conn) isFull() bool {
	limit := c.registry.cfg.MaxRooms
	if limit < 0 || len(c.entries) < limit {
		return false
	}
	in := 0
	for _, e := range c.entries {
		in += one(e.in())
	}
	return in >= limit || len(c.entries)-in >= maxLeaving
}
