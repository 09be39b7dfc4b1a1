package hub

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

// ErrStopped is what Watch returns once the hub has been stopped.
var ErrStopped = errors.New("mesh: hub is stopped")

// Store is what the hub reads from Redis.
type Store interface {
	// Snapshot reads a whole room.
	Snapshot(ctx context.Context, room string) (store.Snapshot, error)
	// Positions reads where rooms stand, in the order asked for.
	Positions(ctx context.Context, rooms []string) ([]store.Position, error)
	// Generation identifies the Redis process; false: it could not be learned.
	Generation(ctx context.Context) (string, bool)
}

// Listener subscribes to rooms' events for the hub. It reports through
// HandleSubscribed, HandleEvent and HandleLost. Add and Remove come in the
// order in which they are meant; they must not block, and must not call the
// hub before they return.
type Listener interface {
	Add(room string)
	Remove(room string)
}

// Sink is a subscriber. Its dynamic type must be comparable (a pointer).
type Sink interface {
	// Deliver is called for each update of a watched room, in order per room,
	// from any goroutine. It must not block, and must not call the hub: the
	// mirror is locked. A sink that wants no more has to be taken off by
	// another goroutine (Hub.Unwatch); none is delivered after that returned.
	Deliver(u *wire.Update)
}

// Config is what a Hub needs. Store and Listener are required.
type Config struct {
	Store    Store
	Listener Listener

	// Ask asks the owner, an incarnation, which of these connections are not in
	// the room any more, and calls gone with them, from any goroutine, at most
	// once; never if the owner does not answer. It must not block. Nil: nobody
	// is asked.
	Ask func(room, owner string, conns []string, gone func([]string))
	// Unconfirmed is how long members that Redis lost are listed on, waiting
	// for their owners to write them again. Defaults to 11 s.
	Unconfirmed time.Duration
	// Linger is how long a mirror outlives its last watcher, and the last join
	// that was answered from it. Defaults to 5 s; negative: not at all.
	Linger time.Duration
	// Listed is how many members a view lists at most. 0 or less: all.
	Listed int
	// CompareEvery is how often the positions of all watched rooms are
	// compared with Redis. Defaults to 10 s.
	CompareEvery time.Duration
	// Bucket says which rooms are kept in one place: where one place does not
	// answer, the rooms of the others are read and compared all the same. Nil:
	// all are.
	Bucket func(room string) int
	// Snapshots is how many snapshots are read at once; where rooms are kept in
	// several places, at most two of each. Defaults to 8.
	Snapshots int
	// Now is Redis's clock, in unix ms, for the times of repairs. It must not
	// block. Defaults to this machine's clock.
	Now func() int64
	// Logger gets what an operator may want to know. Defaults to none.
	Logger *slog.Logger
}

// withDefaults returns c with its zero fields filled in.
func (c Config) withDefaults() Config {
	if c.Unconfirmed <= 0 {
		c.Unconfirmed = 11 * time.Second
	}
	if c.Linger == 0 {
		c.Linger = 5 * time.Second
	}
	if c.CompareEvery <= 0 {
		c.CompareEvery = 10 * time.Second
	}
	if c.Bucket == nil {
		c.Bucket = func(string) int { return 0 }
	}
	if c.Snapshots <= 0 {
		c.Snapshots = 8
	}
	if c.Now == nil {
		c.Now = func() int64 { return time.Now().UnixMilli() }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Hub holds the mirrors of all rooms that are watched on this server, and of
// some that many join (see joins.go). All
// methods are safe for concurrent use, except that HandleEvent,
// HandleSubscribed and HandleLost are the listener's, called in the order in
// which things happened.
type Hub struct {
	cfg        Config
	born       time.Time
	generation *generation
	alarms     *alarms
	jobs       *jobs
	suspects   *suspects
	joins      *joins
	counters   counters
	log        *limit.Log

	ctx    context.Context // ends when the hub stops
	cancel context.CancelFunc
	wg     sync.WaitGroup // the goroutines that Start started
	start  sync.Once

	mu      sync.RWMutex // guards the following, and refs of every mirror
	mirrors map[string]*mirror
	burst   burst
}

// New makes a hub. It does nothing before Start.
func New(cfg Config) *Hub {
	h := &Hub{
		cfg:      cfg.withDefaults(),
		born:     time.Now(),
		alarms:   newAlarms(),
		suspects: newSuspects(),
		joins:    new(joins),
		mirrors:  make(map[string]*mirror),
	}
	// A lifetime begins: the hub's work belongs to no caller.
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.log = limit.NewLog(h.cfg.Logger)
	h.generation = newGeneration(h.cfg.Store)
	h.jobs = newJobs(h.cfg.Snapshots, h.cfg.Bucket, h.takeSnapshot)
	return h
}

// warn logs what went wrong with Redis, and nothing of what ends because the hub
// stops.
func (h *Hub) warn(message string, args ...any) {
	if h.ctx.Err() == nil {
		h.log.Warn(message, args...)
	}
}

// Start lets the hub work. Further calls do nothing.
func (h *Hub) Start() {
	h.start.Do(func() {
		h.wg.Go(func() { h.alarms.run(h.ctx) })
		h.wg.Go(h.compareLoop)
	})
}

// Stop ends the hub's work and waits for it. Watches that wait return
// ErrStopped, sinks are told nothing any more. A stopped hub cannot be
// started again; further calls only wait.
func (h *Hub) Stop() {
	h.start.Do(func() {}) // a Start that comes now is too late
	h.cancel()
	h.jobs.close()
	h.wg.Wait()
}

// mirror returns the room's mirror, nil if nobody watches the room.
func (h *Hub) mirror(room string) *mirror {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.mirrors[room]
}

// all returns every mirror.
func (h *Hub) all() []*mirror {
	h.mu.RLock()
	defer h.mu.RUnlock()
	list := make([]*mirror, 0, len(h.mirrors))
	for _, m := range h.mirrors {
		list = append(list, m)
	}
	return list
}

// hold returns the room's mirror, made if there is none, with a reference
// that keeps it; release gives that back.
func (h *Hub) hold(room string) (*mirror, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ctx.Err() != nil {
		return nil, ErrStopped
	}
	m := h.mirrors[room]
	if m == nil {
		m = newMirror(h, room)
		h.mirrors[room] = m
		// Under the lock, so that it cannot overtake the Remove of an earlier
		// mirror of this room, or be overtaken by it.
		h.cfg.Listener.Add(room)
	}
	if m.refs++; m.refs == 1 {
		h.alarms.cancel(&m.linger)
	}
	return m, nil
}

// release gives back a reference. The last one lets the mirror linger.
func (h *Hub) release(m *mirror) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.refs--; m.refs == 0 {
		h.alarms.set(&m.linger, time.Now().Add(h.linger()))
	}
}

// linger is how long a mirror goes on that nobody watches any more.
func (h *Hub) linger() time.Duration { return max(h.cfg.Linger, 0) }

// drop forgets a mirror that nobody came back to. One that joins were answered
// from meanwhile goes on.
func (h *Hub) drop(m *mirror) {
	h.mu.Lock()
	gone := m.refs == 0 && h.mirrors[m.room] == m
	if until := m.lingers(); gone && time.Now().Before(until) {
		gone = false
		h.alarms.set(&m.linger, until)
	}
	if gone {
		delete(h.mirrors, m.room)
		h.cfg.Listener.Remove(m.room)
	}
	h.mu.Unlock()
	if gone {
		m.close()
	}
}
