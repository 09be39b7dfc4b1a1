package mesh

import (
	"fmt"
	"hash/maphash"
	"slices"
	"sync"
	"time"
)

const (
	// newRoomsEvery is the time that Limits.NewRoomsPerMinute is about.
	newRoomsEvery = time.Minute
	// roomsRemembered is the number of names of rooms, new in a minute, that a
	// connection remembers, and how many of those that it used again. A name that
	// does not fit is new the next time.
	roomsRemembered = 512
)

// nameSeed makes the hashes of names unpredictable: no client can choose names
// that count as one.
var nameSeed = maphash.MakeSeed()

// newRooms counts the rooms that one connection begins to use. Each of them makes
// Redis remember a position and this server a mirror, for seconds after it was
// left, so a client that makes up names must not use as many as it may send
// commands. Safe for concurrent use; the zero value is ready.
//
// Names are kept as hashes, in the order of their use, and searched one by one:
// there are few, and an idle connection must not cost a map.
type newRooms struct {
	mu       sync.Mutex // guards the fields below
	begun    time.Time  // of the current minute
	count    int        // of new rooms in it
	again    int        // of names in now that are in old, too
	now, old []uint64   // names that were used in this minute, and in the one before
}

// use notes that a connection uses a room; false: it has begun to use limit others
// in this minute (negative: no limit).
func (n *newRooms) use(room string, limit int, at time.Time) bool {
	if limit < 0 {
		return true
	}
	name := maphash.String(nameSeed, room)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.turn(at)
	if slices.Contains(n.now, name) {
		return true
	}
	of := &n.again
	if !slices.Contains(n.old, name) {
		if n.count >= limit {
			return false
		}
		of = &n.count
	}
	if *of++; *of <= roomsRemembered {
		n.now = append(n.now, name)
	}
	return true
}

// turn begins a new minute if the current one is over. The caller holds mu.
func (n *newRooms) turn(at time.Time) {
	passed := at.Sub(n.begun)
	if passed < newRoomsEvery {
		return
	}
	n.old, n.now = n.now, nil
	if passed >= 2*newRoomsEvery {
		n.old = nil
	}
	n.begun, n.count, n.again = at, 0, 0
}

// admitRoom returns an ErrLimit if the connection would begin to use a room and
// may not. A room that it is in, or subscribed to, is not new. A request that is
// refused later has counted: the guards were asked for it.
func (c *Connection) admitRoom(room string) error {
	if c.own.In(room) || c.isSubscribed(room) {
		return nil
	}
	limit := c.s.n.opts.Limits.NewRoomsPerMinute
	if c.newRooms.use(room, limit, time.Now()) {
		return nil
	}
	return fmt.Errorf("%w: %d new rooms per minute", ErrLimit, limit)
}

func (c *Connection) isSubscribed(room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.subs[room] != nil
}
