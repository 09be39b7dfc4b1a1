package local

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
	// retryAfter is the pause before the retry of an op that Redis refused by itself.
	retryAfter = time.Second
	// refreshRetry is retryAfter for an entry whose key may run out. It is well below the
	// half second after which other servers act on that. If Redis will refuse the retry
	// as well, retryAfter applies, see entry.retryLater.
	refreshRetry = 150 * time.Millisecond
)

// returnDelay is the pause between a frame that ends a silence and the returns of its
// connection, if the frame itself is not a join or leave.
const returnDelay = 100 * time.Millisecond

// Link is the transport of a connection. Its methods must not block.
type Link interface {
	// MinTTL reports the shortest TTL of the connection's rooms; 0: none.
	MinTTL(time.Duration)
	// PingNow asks the client for a sign of life.
	PingNow()
}

// Conn is one connection of this server. It is safe for concurrent use.
type Conn struct {
	registry *Registry
	id       string
	link     Link
	reg      registration

	seen         atomic.Int64 // time of the last frame, since Registry.madeAt
	frameWaiters atomic.Int64 // entries that wait for the next frame
	closeBegun   atomic.Bool  // BeginClose was called
	returnArmed  atomic.Bool  // returnTimer is armed
	returnTimer  clock.Timer

	mu          sync.Mutex // guards the fields below, and all of entry and registration except inQueue
	entries     map[string]*entry
	meta        []byte
	user        *connUser // nil: there are no users
	metaVersion uint64
	minTTL      time.Duration
	closed      bool
	retry       clock.Timer
	rewriting   rewriting
}

// ID returns the id of the connection.
func (c *Conn) ID() string { return c.id }

// Touched notes a sign of life. It is one atomic store, unless the connection was silent:
// then its entries return.
func (c *Conn) Touched() {
	c.seen.Store(int64(time.Since(c.registry.madeAt)))
	if c.frameWaiters.Load() > 0 {
		c.frameSeen()
	}
}

// FrameSeen is Touched for a frame that is still to be read. The frame may ask to leave a
// room, so entries return only after returnDelay.
func (c *Conn) FrameSeen() {
	c.seen.Store(int64(time.Since(c.registry.madeAt)))
	if c.frameWaiters.Load() > 0 && c.returnArmed.CompareAndSwap(false, true) {
		c.registry.cfg.Wheel.Schedule(&c.returnTimer, returnDelay, func() {
			c.returnArmed.Store(false)
			c.frameSeen()
		})
	}
}

func (c *Conn) idle() time.Duration {
	return time.Since(c.registry.madeAt) - time.Duration(c.seen.Load())
}

func (c *Conn) frameSeen() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	for _, e := range c.entries {
		switch {
		case e.phase == returning:
			e.returnOnFrame()
		case e.lapsed:
			e.verifyLapsed()
		}
	}
	c.ttlChanged()
}

// Metadata returns the metadata of the connection and its version. The bytes must not be
// changed.
func (c *Conn) Metadata() ([]byte, uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.meta, c.metaVersion
}

// SetMeta takes the metadata that Redis holds under version, if it is newer than the
// local one, and rewrites the entries of the connection.
func (c *Conn) SetMeta(version uint64, meta []byte) {
	// The same version may come twice at the same time, from the caller that set it and
	// from its announcement. Neither goes on before MetaChanged was called.
	known, moved := c.takeMeta(version, meta)
	if known {
		c.registry.cfg.MetaChanged(c)
	}
	if moved && c.registry.cfg.UserMoved != nil {
		c.registry.cfg.UserMoved(c)
	}
}

// takeMeta takes the metadata if it is newer. known is false if it is older. moved says
// that the connection belongs to another user than before.
func (c *Conn) takeMeta(version uint64, meta []byte) (known, moved bool) {
	user := ""
	if c.user != nil {
		c.user.asking.Lock()
		defer c.user.asking.Unlock()
		if _, now := c.Metadata(); version > now {
			user = c.registry.cfg.UserOf(c.id, meta)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || version < c.metaVersion || version == 0 {
		return false, false
	}
	if version > c.metaVersion {
		c.metaVersion, c.meta = version, meta
		moved = c.setUser(user)
		c.rewrite()
	}
	return true, moved
}

// Registered waits until Redis holds the metadata of the connection.
func (c *Conn) Registered(ctx context.Context) error {
	t := time.NewTimer(c.reg.writer().waitLimit())
	defer t.Stop()
	select {
	case <-c.reg.ready:
		return nil
	case <-c.reg.gone:
		return ErrClosed
	case <-t.C:
		return c.reg.writer().unavailable()
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", c.reg.writer().unavailable(), ctx.Err())
	}
}

// Flush waits until Redis holds all changes so far, except states that wait for their
// interval. It does not wait for a rewriting of the entries that rewritePause delays.
func (c *Conn) Flush(ctx context.Context) error {
	c.mu.Lock()
	var all []Write
	for _, e := range c.entries {
		if e.wanted() && !c.rewriting.armed {
			all = append(all, e.wait())
			e.writer.enqueue(e, asked)
		}
	}
	c.mu.Unlock()
	return awaitAll(ctx, all)
}

// Leave takes the connection out of room. It returns false if the connection was not in
// the room. If a frame asked for it (see FrameSeen), the other rooms of the connection
// return at once, before Redis has the leave.
func (c *Conn) Leave(ctx context.Context, room string, cause store.Cause) (bool, error) {
	return c.LeaveIf(ctx, room, cause, func(uint64) bool { return true })
}

// LeaveIf is Leave if still returns true. still gets the version of the connection's
// metadata. It runs with the lock of the connection held, so that no change of metadata
// and no join comes between it and the leave. It must not block or call the Conn.
func (c *Conn) LeaveIf(ctx context.Context, room string, cause store.Cause, still func(metaVersion uint64) bool) (bool, error) {
	c.mu.Lock()
	e := c.entries[room]
	in := e != nil && e.in() && still(c.metaVersion)
	var w Write
	if in {
		e.leave(cause, false, asked)
		w = e.wait()
		e.writer.enqueue(e, asked)
	}
	c.mu.Unlock()
	if c.returnArmed.Load() {
		c.frameSeen()
	}
	if !in {
		return false, nil
	}
	return true, w.Await(ctx)
}

// In reports whether the connection is in room or returns to it at its next frame.
func (c *Conn) In(room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.in(room)
}

// in is In with the lock held.
func (c *Conn) in(room string) bool {
	e := c.entries[room]
	return e != nil && e.in()
}

// isOut reports whether the connection is not in room and Redis holds no entry of it
// there.
func (c *Conn) isOut(room string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[room]
	return e == nil || !e.wanted() && e.leaving.id == ""
}

// Rooms returns the rooms that the connection is in.
func (c *Conn) Rooms() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	rooms := make([]string, 0, len(c.entries))
	for room, e := range c.entries {
		if e.in() {
			rooms = append(rooms, room)
		}
	}
	slices.Sort(rooms)
	return rooms
}

// BeginClose returns true for its first caller only, which then closes the connection.
// That caller can first release what it keeps under the id. Close makes the id free for
// another connection.
func (c *Conn) BeginClose() bool { return c.closeBegun.CompareAndSwap(false, true) }

// Closing reports whether BeginClose was called.
func (c *Conn) Closing() bool { return c.closeBegun.Load() }

// Close ends every entry of the connection and removes it. keep: the connection did not
// ask to leave, so its user keeps the places in rooms with a grace. Close returns at
// once. Gone reports when Redis has everything.
func (c *Conn) Close(cause store.Cause, keep bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	c.closed = true
	for _, e := range c.entries {
		if e.in() {
			e.leave(cause, keep, routine)
		}
		e.writer.enqueue(e, routine) // even if it waits for a frame: it has to be removed
	}
	c.disconnectIfEmpty()
}

// Gone returns a channel that is closed when Redis no longer holds the closed connection.
func (c *Conn) Gone() <-chan struct{} { return c.reg.gone }

func (c *Conn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// disconnectIfEmpty queues the registration of a closed connection after its last entry
// has ended.
func (c *Conn) disconnectIfEmpty() {
	if c.closed && len(c.entries) == 0 {
		c.reg.enqueue(routine)
	}
}

func (c *Conn) reregistered(stalled bool) {
	c.mu.Lock()
	inc := c.registry.cfg.Incarnation()
	for _, e := range c.entries {
		switch {
		case !e.wanted():
		case stalled:
			// The entry may be written under the new incarnation already. Callers must
			// not hear of success for a state that ends here.
			e.answer(e.rev, ErrUnavailable)
			e.leaveSilent(routine)
		case e.tried() && e.incarnation == inc:
			// written again already, or queued for it
		default:
			// Other servers end the entries of the old incarnation within seconds.
			e.rejoin(min(e.restoring(), routine))
		}
	}
	if c.reg.incarnation != inc {
		c.reg.written = false
	}
	c.reg.enqueue(background)
	c.mu.Unlock()
	if stalled && c.link != nil {
		c.link.PingNow()
	}
}

// ttlChanged reports the shortest TTL to the link. c.mu is held.
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
