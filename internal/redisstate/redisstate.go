// Package redisstate holds the knowledge of a server about its Redis: which process
// answers, whether events may have been missed, and when the lease was last renewed. After
// a lost connection, a failover or a late renewal it tells the other parts how to react.
package redisstate

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Config configures a State. The functions must not block, except for Generation. All
// fields are required, except for Recreate.
type Config struct {
	// Generation returns the identity of the Redis process, or of all masters, that
	// answers. It is not ok if that is not known.
	Generation func(ctx context.Context) (id string, ok bool)
	// Suspend ends the contact of this server until Resume.
	Suspend, Resume func()
	// ResetContact begins the time again after which this server is in contact.
	ResetContact func()
	// PauseExpired lets the queue of expired hints act on none before the given time.
	PauseExpired func(until time.Time)
	// Recreate subscribes to expired events again. Nil: there are none.
	Recreate func()
	// Resync compares all mirrors with Redis.
	Resync func()
	// Away marks the mirrors as stale until Redis has been asked.
	Away func()
	// Recheck asks the guards again about all that connections see.
	Recheck func()
	// Go runs a function on a goroutine that the server waits for when it stops.
	Go       func(func())
	LeaseTTL time.Duration
	// Life ends when the server has stopped, and Running when it begins to stop.
	Life, Running context.Context
}

// State is the knowledge of a server about its Redis. It is safe for concurrent use.
type State struct {
	cfg         Config
	generation  atomic.Pointer[string] // as last seen; nil: not known
	missed      atomic.Bool            // see TakeMissed
	disconnects disconnects
	failover    failover

	awayAt time.Time // of the last call of Away; only RedisAway uses it

	madeAt    time.Time
	renewedAt atomic.Int64 // time of the last renewal of the lease, since madeAt
	rechecked atomic.Bool  // the guards have been asked again since then
}

// New returns the state of a server that has not talked to Redis yet.
func New(cfg Config) *State { return &State{cfg: cfg, madeAt: time.Now()} }

// TakeMissed reports whether events may have been missed since its last call, so that
// everything is to be compared.
func (s *State) TakeMissed() bool { return s.missed.Swap(false) }

// RedisAway marks the mirrors as stale after a heartbeat that Redis did not answer, at
// most once a second. Its calls follow each other.
func (s *State) RedisAway() {
	if now := time.Now(); now.Sub(s.awayAt) >= time.Second {
		s.awayAt = now
		s.cfg.Away()
	}
}

// LeaseRenewed notes that the lease has just been renewed.
func (s *State) LeaseRenewed() {
	s.renewedAt.Store(int64(time.Since(s.madeAt)))
	s.rechecked.Store(false)
}

// RecheckIfLeaseLapsed is called before each delivery of an event. If the lease may have
// run out, other servers may have declared this one dead, and their rechecks did not reach
// it. Then it asks all guards again before the event is delivered. It does not block.
func (s *State) RecheckIfLeaseLapsed() {
	if time.Since(s.madeAt)-time.Duration(s.renewedAt.Load()) > s.cfg.LeaseTTL && s.rechecked.CompareAndSwap(false, true) {
		s.cfg.Recheck()
	}
}

// Disconnected notes that the connection for events is lost. The server has no contact
// until it is known whether the same Redis process answers: see Connected.
func (s *State) Disconnected() {
	s.missed.Store(true)
	s.disconnects.add(s.cfg.Suspend)
}

// Connected notes that the server's own channel is subscribed to. That includes the first
// time: after the server has reregistered, messages may have come before.
func (s *State) Connected() {
	s.missed.Store(true)
	seen := s.disconnects.count()
	s.cfg.Go(func() { s.checkGeneration(seen) })
}

// checkGeneration asks whether the same Redis process answers as before, after the
// connection was lost the given number of times and is back. If it has been lost again
// since, the next call decides. If no process answers and one did before, that counts as
// another process: connections that break at this moment are those of a failover.
func (s *State) checkGeneration(losses uint64) {
	id, ok := s.cfg.Generation(s.cfg.Life)
	switch {
	case ok:
		s.NoteGeneration(id)
	case s.generation.Load() != nil:
		s.cfg.ResetContact()
	}
	s.disconnects.ifUnchanged(losses, s.cfg.Resume)
}

// NoteGeneration notes which process answers. Another process than before may have lost
// the newest writes, leases among them. So this server declares no other dead before all
// of them have had time to renew.
func (s *State) NoteGeneration(id string) {
	was := s.generation.Swap(&id)
	if was == nil || *was == id {
		return
	}
	s.cfg.ResetContact()
	if s.cfg.Recreate != nil {
		s.cfg.Recreate()
	}
}

// disconnects counts the losses of the connection for events.
type disconnects struct {
	mu sync.Mutex // guards n, and keeps the calls of the functions in the order of the losses
	n  uint64
}

func (c *disconnects) count() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

func (c *disconnects) add(do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
	do()
}

// ifUnchanged calls do unless there have been more losses.
func (c *disconnects) ifUnchanged(losses uint64, do func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n == losses {
		do()
	}
}
