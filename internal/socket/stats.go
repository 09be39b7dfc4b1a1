package socket

import (
	"sync"
	"sync/atomic"
)

// Stats counts what happened to all sockets that share it. The zero Stats is
// ready; its methods are safe for concurrent use.
type Stats struct {
	closes    [causes]atomic.Uint64
	coalesced atomic.Uint64
	dropped   atomic.Uint64
	busy      atomic.Uint64
	limited   atomic.Uint64
	panics    atomic.Int64

	shelves [shelves]shelf
	next    atomic.Uint64 // shelf for the next socket
}

// shelves is how many parts the sockets are kept in. Whoever looks at all of
// them holds one part at a time, which keeps nothing waiting but sockets that
// come or go, one in so many.
const shelves = 64

// shelf is some of the sockets that run.
type shelf struct {
	mu   sync.Mutex // guards list, and place of the sockets in it
	list []*Socket
}

// Counts is what a [Stats] has counted.
type Counts struct {
	Closes    map[string]uint64 // connections that ended, by the name of the cause; each is there
	Coalesced uint64            // states left out because a later one waited too
	Dropped   uint64            // frames thrown away with the connection they waited for
	Busy      uint64            // commands answered with EBUSY
	Limited   uint64            // commands answered with ELIMIT
	Panics    int64             // panics recovered
	Queued    int64             // bytes that wait in the queues of all sockets now, as Socket.QueueBytes has them
	Longest   int64             // of them in the queue that holds most
}

// Counts returns the counters as they are now. It looks at every socket, and
// takes no lock that a frame needs.
func (s *Stats) Counts() Counts {
	c := Counts{
		Closes:    make(map[string]uint64, causes),
		Coalesced: s.coalesced.Load(),
		Dropped:   s.dropped.Load(),
		Busy:      s.busy.Load(),
		Limited:   s.limited.Load(),
		Panics:    s.panics.Load(),
	}
	for i := range s.closes {
		c.Closes[Cause(i).String()] = s.closes[i].Load()
	}
	for i := range s.shelves {
		s.shelves[i].measure(&c)
	}
	return c
}

// measure adds what waits on the sockets of a shelf.
func (sh *shelf) measure(c *Counts) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for _, s := range sh.list {
		n := s.bytes.Load()
		c.Queued += n
		c.Longest = max(c.Longest, n)
	}
}

// enter takes a socket that begins to run.
func (s *Stats) enter(it *Socket) {
	it.shelf = uint8(s.next.Add(1) % shelves)
	sh := &s.shelves[it.shelf]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	it.place = uint32(len(sh.list))
	sh.list = append(sh.list, it)
}

// exit lets go of a socket that has ended.
func (s *Stats) exit(it *Socket) {
	sh := &s.shelves[it.shelf]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	last := len(sh.list) - 1
	sh.list[it.place] = sh.list[last]
	sh.list[it.place].place = it.place
	sh.list[last] = nil
	sh.list = sh.list[:last]
}
