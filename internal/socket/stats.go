package socket

import (
	"sync"
	"sync/atomic"
)

// Stats counts the events of all sockets that share it. The zero Stats is ready. Its
// methods are safe for concurrent use.
type Stats struct {
	closes    [causes]atomic.Uint64
	coalesced atomic.Uint64
	dropped   atomic.Uint64
	limited   atomic.Uint64
	delayed   atomic.Uint64
	paused    atomic.Uint64
	panics    atomic.Int64

	superseded atomic.Uint64

	shards [shards]statsShard
	next   atomic.Uint64 // number of the next socket, which selects its shard
}

// shards is the number of parts that hold the sockets. A look at all sockets locks one
// part at a time, which delays only sockets of that part that begin or end.
const shards = 64

// statsShard is a part of the running sockets.
type statsShard struct {
	mu   sync.Mutex // guards list, and shardIndex of the sockets in it
	list []*Socket
}

// Counts holds the counters of a [Stats].
type Counts struct {
	Closes    map[string]uint64 // connections that ended, by cause; each cause is there
	Coalesced uint64            // states left out because a newer one waited too
	Dropped   uint64            // frames discarded because their connection ended
	Limited   uint64            // commands answered with ELIMIT, each the last of a flood
	Delayed   uint64            // commands that waited for a token
	Paused    uint64            // times that a reader waited for space for a command
	Panics    int64             // panics recovered
	// Superseded counts waiting commands that were superseded.
	Superseded uint64
	Queued     int64 // bytes that now wait in the queues of all sockets, as in Socket.QueueBytes
	Longest    int64 // bytes in the longest of these queues
}

// Counts returns the current counters. It looks at every socket, but takes no lock that a
// frame needs.
func (s *Stats) Counts() Counts {
	c := Counts{
		Closes:    make(map[string]uint64, causes),
		Coalesced: s.coalesced.Load(),
		Dropped:   s.dropped.Load(),
		Limited:   s.limited.Load(),
		Delayed:   s.delayed.Load(),
		Paused:    s.paused.Load(),
		Panics:    s.panics.Load(),

		Superseded: s.superseded.Load(),
	}
	for i := range s.closes {
		c.Closes[Cause(i).String()] = s.closes[i].Load()
	}
	for i := range s.shards {
		s.shards[i].measure(&c)
	}
	return c
}

// measure adds the waiting bytes of the sockets of a shard.
func (sh *statsShard) measure(c *Counts) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for _, s := range sh.list {
		n := s.bytes.Load()
		c.Queued += n
		c.Longest = max(c.Longest, n)
	}
}

// enter adds a socket that begins to run.
func (s *Stats) enter(it *Socket) {
	it.shard = uint8(s.next.Add(1) % shards)
	sh := &s.shards[it.shard]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	it.shardIndex = uint32(len(sh.list))
	sh.list = append(sh.list, it)
}

// exit removes a socket that has ended.
func (s *Stats) exit(it *Socket) {
	sh := &s.shards[it.shard]
	sh.mu.Lock()
	defer sh.mu.Unlock()
	last := len(sh.list) - 1
	sh.list[it.shardIndex] = sh.list[last]
	sh.list[it.shardIndex].shardIndex = it.shardIndex
	sh.list[last] = nil
	sh.list = sh.list[:last]
}
