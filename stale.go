package mesh

import (
	"slices"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
	"github.com/meshpresence/mesh/internal/wire"
)

const (
	// staleAfter is the time for which a room is stale before its subscribers are told.
	staleAfter = time.Second
	// staleStep is the interval between two looks at the rooms.
	staleStep = 250 * time.Millisecond
	// staleShare limits the share of the time that looking takes: one part in this many.
	staleShare = 20
	// maxStaleRooms bounds the rooms that a push names. If more are stale, it means all.
	maxStaleRooms = 32
)

// staleWatch tells the sockets of a server that it is without Redis, and that it has it
// back. Its goroutine runs only while a room is stale, or while a client believes that.
type staleWatch struct {
	s     *Server
	since map[string]time.Time // rooms that are stale; only the goroutine uses it

	mu      sync.Mutex // guards the fields below
	running bool
	again   bool // look was called since the last look of the goroutine
}

// staleTold is what a client has been told and was not taken back.
type staleTold struct {
	all   bool     // all its rooms are stale
	rooms []string // otherwise these
}

// covers reports whether the client knows that these rooms are stale.
func (t *staleTold) covers(rooms []string) bool {
	if t == nil {
		return len(rooms) == 0
	}
	return t.all || !slices.ContainsFunc(rooms, func(room string) bool { return !slices.Contains(t.rooms, room) })
}

// look starts the goroutine, because a room may be stale. It does not block.
func (w *staleWatch) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.again = true
	life := &w.s.n.life
	if !w.running && life.running.Err() == nil {
		w.running = true
		life.work.Go(w.run)
	}
}

// run looks at the rooms until none is stale and each client knows it.
func (w *staleWatch) run() {
	for {
		w.mu.Lock()
		w.again = false
		w.mu.Unlock()
		began := time.Now()
		if !w.tell(began) && w.rest() {
			return
		}
		// A room can be stale for ever, for example because its key has another type.
		if wait.For(w.s.n.life.running, max(staleStep, staleShare*time.Since(began))) != nil {
			return // the server stops
		}
	}
}

// rest ends the goroutine, unless look was called in between.
func (w *staleWatch) rest() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.running = w.again
	return !w.running
}

// tell looks at all rooms and sends the pushes that are due. It returns false if nothing is
// stale.
func (w *staleWatch) tell(now time.Time) (busy bool) {
	stale, away := w.staleRooms(now)
	w.s.mu.RLock()
	conns := make([]*Connection, 0, len(w.s.conns))
	for _, c := range w.s.conns {
		conns = append(conns, c)
	}
	w.s.mu.RUnlock()
	for _, c := range conns {
		if c.tellStale(stale, away) {
			busy = true
		}
	}
	return busy || len(stale) > 0
}

// staleRooms returns the subscribed rooms that are stale, and those of them that have been
// for staleAfter. A room counts as stale as well if this server cannot write there.
func (w *staleWatch) staleRooms(now time.Time) (stale, away map[string]bool) {
	n := w.s.n
	stale, away = make(map[string]bool), make(map[string]bool)
	since := make(map[string]time.Time)
	for _, room := range n.access.Rooms() {
		if status, ok := n.hub.RoomStatus(room); (!ok || !status.Stale) && !n.local.Away(n.keys.RoomBucket(room)) {
			continue
		}
		began, known := w.since[room]
		if !known {
			began = now
		}
		since[room], stale[room] = began, true
		if now.Sub(began) >= staleAfter {
			away[room] = true
		}
	}
	w.since = since
	return stale, away
}

// tellStale sends the push that is due to a socket: that some of its rooms have been stale
// for a while, or that none is any more. It reports whether a push has to be taken back
// later. Only the goroutine of the staleWatch calls it.
func (c *Connection) tellStale(stale, away map[string]bool) (told bool) {
	p, due, told := c.stalePush(stale, away)
	if !due {
		return told
	}
	if f, err := wire.Push(wire.PushPresenceStale, p); err == nil {
		_ = c.sock.Send(f) // fails only if the connection ends
	}
	return told
}

// stalePush returns the push that is due, and whether the client has been told that a room
// is stale.
func (c *Connection) stalePush(stale, away map[string]bool) (p wire.PresenceStale, due, told bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stale == nil && len(away) == 0 {
		return p, false, false
	}
	var lost []string // its rooms that are away
	recovered := true
	known := 0 // rooms with an answered subscription
	for room, s := range c.subs {
		recovered = recovered && !stale[room]
		if o, ok := s.Out.(*socketOutlet); !ok || !o.begun.Load() {
			continue // its answer will tell
		}
		known++
		if away[room] {
			lost = append(lost, room)
		}
	}
	switch {
	case c.stale != nil && recovered:
		c.stale = nil
		return p, true, false
	case !c.stale.covers(lost):
		c.stale = &staleTold{all: len(lost) == known || len(lost) > maxStaleRooms}
		if !c.stale.all {
			slices.Sort(lost)
			c.stale.rooms = lost
		}
		return wire.PresenceStale{Stale: true, RoomNames: c.stale.rooms}, true, true
	}
	return p, false, c.stale != nil
}

// answeredStale notes that the client was told by the answer to a subscription, so that it
// is also told of the recovery. It may be called with the lock of a subscription held.
func (c *Connection) answeredStale(o *socketOutlet) {
	c.noteStale(o)
	c.s.stale.look()
}

// noteStale notes that a client was told that a room is stale. It does nothing if the
// subscription with that output is gone.
func (c *Connection) noteStale(o *socketOutlet) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.subs[o.room]; s == nil || s.Out != o {
		return
	}
	if c.stale == nil {
		c.stale = new(staleTold)
	}
	if c.stale.covers([]string{o.room}) {
		return
	}
	rooms := slices.DeleteFunc(slices.Clone(c.stale.rooms), func(room string) bool { return c.subs[room] == nil })
	c.stale.rooms = append(rooms, o.room) // a new list, because a push may share the old one
}
