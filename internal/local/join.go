package local

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

// Joined is the result of Join.
type Joined struct {
	Position store.Position // of the room after the join
	Total    int            // members of the room after the join
	Users    int            // users of the room after the join; -1: unknown
	Replaced string         // connection whose place the join has taken, perhaps itself; "": none
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
	return c.JoinIf(ctx, room, JoinOptions{})
}

// JoinOptions are the options of a join.
type JoinOptions struct {
	// Within is the longest time to wait for Redis. Defaults to answerTimeout.
	Within time.Duration
	// Accept decides whether to join. If it returns an error, JoinIf returns that error.
	// It gets the version of the connection's metadata. It runs with the lock of the
	// connection held, so that no change of metadata and no leave comes between it and
	// the join. It must not block or call the Conn. Defaults to nil: join always.
	Accept func(metaVersion uint64) error
	// Replaces is a connection of the same user whose place the join takes. It counts
	// until Redis has acknowledged the join, and not if the connection is in the room.
	Replaces string
	OverCap  bool // the caps of the room do not apply
}

// JoinIf is Join with options. It returns a *FullError if the room is full.
func (c *Conn) JoinIf(ctx context.Context, room string, opts JoinOptions) (Joined, error) {
	e, w, again, err := c.beginJoin(room, opts)
	if err != nil {
		return Joined{Users: -1}, err
	}
	began := time.Now()
	err = w.await(ctx, cmp.Or(opts.Within, answerTimeout))
	joined := Joined{Again: again, Users: -1, Waited: time.Since(began)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		_, full := errors.AsType[*FullError](err)
		joined.Kept = !full && c.in(room) // a later call may have asked for the room again
		if joined.Kept && c.entries[room] == e && !e.written() {
			e.promised = true
		}
		return joined, err
	}
	joined.Position, joined.Total, joined.Users = e.position, int(e.total), int(e.users)
	if !again {
		joined.Replaced = e.took()
	}
	return joined, nil
}

// beginJoin makes the entry wanted and queues it. again: it was wanted before.
func (c *Conn) beginJoin(room string, opts JoinOptions) (e *entry, w Write, again bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, w, false, ErrClosed
	}
	if opts.Accept != nil {
		if err := opts.Accept(c.metaVersion); err != nil {
			return nil, w, false, err
		}
	}
	if !c.in(room) && c.isFull() {
		return nil, w, false, ErrTooMany
	}
	if e = c.entries[room]; e == nil {
		e = &entry{c: c, room: room, writer: c.registry.writers[c.registry.cfg.RoomBucket(room)]}
		c.entries[room] = e
	}
	if again = e.wanted(); !again {
		e.join()
		e.overCap = opts.OverCap
		e.setReplaces(opts.Replaces)
		c.ttlChanged()
	} else if !e.acknowledged { // it may wait for Redis since another call
		e.overCap = e.overCap || opts.OverCap
		e.setReplaces(cmp.Or(opts.Replaces, e.replaces()))
	}
	w = e.wait()
	e.writer.enqueue(e, asked)
	return e, w, again, nil
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
