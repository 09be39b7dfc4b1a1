package owner

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

const (
	// retryAfter is the wait before an op that Redis refused alone is tried again.
	retryAfter = time.Second
	// refreshRetry is retryAfter for an entry whose key may run out: well below
	// the half second after which other servers act on that. It is retryAfter if
	// Redis will refuse it again soon, see entry.later.
	refreshRetry = 150 * time.Millisecond
)

// wakeAfter is how long after a frame that ended a silence rooms are joined
// again, where the frame itself did not say what it wants.
const wakeAfter = 100 * time.Millisecond

// Link is the transport behind a connection, where there is one. Its methods
// must not block.
type Link interface {
	// MinTTL tells the shortest TTL among the connection's rooms, 0: none.
	MinTTL(time.Duration)
	// PingNow asks the peer for a sign of life.
	PingNow()
}

// Conn is one connection of this server. It is safe for concurrent use.
type Conn struct {
	o    *Owner
	id   string
	link Link
	reg  registration

	seen     atomic.Int64 // time of the last frame, since Owner.born
	sleepers atomic.Int64 // entries that wait for the next frame
	claimed  atomic.Bool  // somebody is closing it
	waking   atomic.Bool  // wake is armed
	wake     clock.Timer

	mu          sync.Mutex // guards the fields below, and all of entry and registration but marked
	entries     map[string]*entry
	meta        []byte
	metaVersion uint64
	minTTL      time.Duration
	closed      bool
	retry       clock.Timer
	rewriting   rewriting
}

// ID returns the connection's id.
func (c *Conn) ID() string { return c.id }

// Seen notes a sign of life. It is one atomic store, unless the connection had
// fallen silent: then its rooms are joined again.
func (c *Conn) Seen() {
	c.seen.Store(int64(time.Since(c.o.born)))
	if c.sleepers.Load() > 0 {
		c.revive()
	}
}

// Stamp is Seen for a frame that is still to be read: it may ask to leave, so
// that rooms are joined again only after a moment, if they still are to be.
func (c *Conn) Stamp() {
	c.seen.Store(int64(time.Since(c.o.born)))
	if c.sleepers.Load() > 0 && c.waking.CompareAndSwap(false, true) {
		c.o.cfg.Wheel.Schedule(&c.wake, wakeAfter, func() {
			c.waking.Store(false)
			c.revive()
		})
	}
}

func (c *Conn) idle() time.Duration {
	return time.Since(c.o.born) - time.Duration(c.seen.Load())
}

func (c *Conn) revive() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	for _, e := range c.entries {
		switch {
		case e.asleep:
			e.comeBack()
		case e.lapsed:
			e.unlapse()
		}
	}
	c.ttlChanged()
}

// Metadata returns the connection's metadata and its version. The bytes must
// not be changed.
func (c *Conn) Metadata() ([]byte, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.meta, c.metaVersion
}

// SetMeta takes metadata that stands in Redis under that version, if it is
// newer than what is held, and rewrites the connection's entries.
func (c *Conn) SetMeta(version uint64, meta []byte) {
	c.mu.Lock()
	// The same version may come twice, from who set it and from its
	// announcement, at the same time: neither goes on before it is known to
	// those who act on it.
	known := version == c.metaVersion && version > 0 && !c.closed
	newer := version > c.metaVersion && !c.closed
	if newer {
		c.metaVersion, c.meta = version, meta
		c.rewrite()
	}
	c.mu.Unlock()
	if newer || known {
		c.o.cfg.MetaChanged(c)
	}
}

// Registered waits until the connection's metadata is in Redis.
func (c *Conn) Registered(ctx context.Context) error {
	t := time.NewTimer(c.reg.lane().patience())
	defer t.Stop()
	select {
	case <-c.reg.ready:
		return nil
	case <-c.reg.gone:
		return ErrClosed
	case <-t.C:
		return c.reg.lane().unavailable()
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", c.reg.lane().unavailable(), ctx.Err())
	}
}

// Flush waits until everything asked for so far is in Redis, but for states that
// wait for their interval. It does not wait if the rewriting of the entries has to
// wait for rewritePause.
func (c *Conn) Flush(ctx context.Context) error {
	c.mu.Lock()
	var all []Write
	for _, e := range c.entries {
		if e.want && !c.rewriting.armed {
			all = append(all, e.wait())
			e.lane.offer(e, asked)
		}
	}
	c.mu.Unlock()
	return awaitAll(ctx, all)
}

// Joined answers Join.
type Joined struct {
	Position store.Position // of the room after the join
	Total    int            // members then
	Again    bool           // it was in already
}

// Join brings the connection into room and waits until Redis has it, at most
// answerWithin. With ErrUnavailable it goes on being wanted, and is made true
// when Redis is back.
func (c *Conn) Join(ctx context.Context, room string) (Joined, error) {
	return c.JoinIf(ctx, room, nil)
}

// JoinIf is Join if accept (nil: always) returns no error, and returns that error
// otherwise. accept gets the version of the connection's metadata. It is called
// with the connection's lock held, so that no change of metadata and no leave
// comes between it and the join. It must not block or call the Conn.
func (c *Conn) JoinIf(ctx context.Context, room string, accept func(metaVersion uint64) error) (Joined, error) {
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
	e := c.entries[room]
	again := e != nil && e.want
	if e == nil {
		if c.o.cfg.MaxRooms >= 0 && len(c.entries) >= c.o.cfg.MaxRooms {
			c.mu.Unlock()
			return Joined{}, ErrTooMany
		}
		e = &entry{c: c, room: room, lane: c.o.lanes[c.o.cfg.RoomBucket(room)]}
		c.entries[room] = e
	}
	if !again {
		e.join()
		c.ttlChanged()
	}
	w := e.wait()
	e.lane.offer(e, asked)
	c.mu.Unlock()
	if err := w.Await(ctx); err != nil {
		return Joined{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return Joined{Position: e.position, Total: e.total, Again: again}, nil
}

// Leave takes the connection out of room; false: it was not in. Where a frame
// is what asks for it (see Stamp), that it did not mean the other rooms is
// known now: they are joined again without waiting for Redis to have the leave.
func (c *Conn) Leave(ctx context.Context, room string, cause store.Cause) (bool, error) {
	return c.LeaveIf(ctx, room, cause, func(uint64) bool { return true })
}

// LeaveIf is Leave if still returns true. still gets the version of the
// connection's metadata. It is called with the connection's lock held, so that no
// change of metadata and no join comes between it and the leave. It must not block
// or call the Conn.
func (c *Conn) LeaveIf(ctx context.Context, room string, cause store.Cause, still func(metaVersion uint64) bool) (bool, error) {
	c.mu.Lock()
	e := c.entries[room]
	in := e != nil && (e.want || e.asleep) && still(c.metaVersion)
	var w Write
	if in {
		e.wake() // asleep: it had left already, and now it will not come back
		e.leave(cause, asked)
		w = e.wait()
		e.lane.offer(e, asked)
	}
	c.mu.Unlock()
	if c.waking.Load() {
		c.revive()
	}
	if !in {
		return false, nil
	}
	return true, w.Await(ctx)
}

// In reports whether the connection is in room, or will be at its next frame.
func (c *Conn) In(room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	return e != nil && (e.want || e.asleep)
}

// isOut reports whether the connection is not in room and what Redis held of
// it there has been ended.
func (c *Conn) isOut(room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	return e == nil || !e.want && e.ending == ""
}

// Rooms returns the rooms that the connection is in.
func (c *Conn) Rooms() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	rooms := make([]string, 0, len(c.entries))
	for room, e := range c.entries {
		if e.want || e.asleep {
			rooms = append(rooms, room)
		}
	}
	slices.Sort(rooms)
	return rooms
}

// Claim reports whether the caller is the one to close the connection: true
// once. What else is kept under its id can then be let go before Close makes
// the id free for another connection.
func (c *Conn) Claim() bool { return c.claimed.CompareAndSwap(false, true) }

// Claimed reports whether somebody is closing the connection.
func (c *Conn) Claimed() bool { return c.claimed.Load() }

// Close ends every entry of the connection and forgets it. It returns at once;
// Gone tells when Redis has all of it.
func (c *Conn) Close(cause store.Cause) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	for _, e := range c.entries {
		e.wake()
		e.leave(cause, routine)
		e.lane.offer(e, routine) // also one that slept: it has nothing to write but itself to remove
	}
	c.closeIfOver()
}

// Gone is closed when the closed connection is out of Redis.
func (c *Conn) Gone() <-chan struct{} { return c.reg.gone }

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// closeIfOver: the registration goes when the last entry has gone.
func (c *Conn) closeIfOver() {
	if c.closed && len(c.entries) == 0 {
		c.reg.offer(routine)
	}
}

func (c *Conn) reborn(stalled bool) {
	c.mu.Lock()
	inc := c.o.cfg.Incarnation()
	for _, e := range c.entries {
		switch {
		case !e.want:
		case stalled:
			// Also one that the lane was quick to write anew already. Whoever
			// waits is not told that a state has been set that ends here.
			e.answer(e.rev, ErrUnavailable)
			e.leave(store.CauseSilent, routine)
			e.sleep()
		case e.tried && e.incarnation == inc:
			// Written anew already, or about to be.
		default:
			// Other servers end what the old incarnation has, seconds from now.
			e.rejoin(min(e.restoring(), routine))
		}
	}
	if c.reg.incarnation != inc {
		c.reg.written = false
	}
	c.reg.offer(background)
	c.mu.Unlock()
	if stalled && c.link != nil {
		c.link.PingNow()
	}
}

// ttlChanged tells the link how often a sign of life is needed. c.mu is held.
func (c *Conn) ttlChanged() {
	shortest := time.Duration(0)
	for _, e := range c.entries {
		if e.ttl > 0 && (shortest == 0 || e.ttl < shortest) {
			shortest = e.ttl
		}
	}
	if shortest != c.minTTL && c.link != nil {
		c.link.MinTTL(shortest)
	}
	c.minTTL = shortest
}
