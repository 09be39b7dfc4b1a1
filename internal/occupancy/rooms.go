package occupancy

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
)

// Errors of Watch.
var (
	// ErrStopped means that Rooms was stopped.
	ErrStopped = errors.New("mesh: occupancy is stopped")
	// ErrUnwatched means that Unwatch or UnwatchAll ended the watch before it began.
	ErrUnwatched = errors.New("mesh: the watch of the numbers was ended")
)

// Store is the part of the store that reads numbers.
type Store interface {
	// Occupancy reads the numbers of rooms, in the order of the argument. It returns soon
	// after the end of ctx, also if Redis does not answer.
	Occupancy(ctx context.Context, rooms ...string) ([]store.Occupancy, error)
}

// Reading is the numbers of a room in Redis. All fields are of one moment.
type Reading struct {
	Position    store.Position
	Connections int
	Users       int
	// Rebuilding says that Redis has lost a part of the room, so that its servers write it
	// again or its users must be counted again. The numbers may be wrong.
	Rebuilding bool
}

// ReadingOf converts what the store has read. If the users have to be counted again, it
// takes each connection as a user of its own.
func ReadingOf(o *store.Occupancy) Reading {
	r := Reading{
		Position: o.Position, Connections: o.Connections, Users: o.Users, Rebuilding: o.Rebuilding || o.Incomplete,
	}
	if o.Users < 0 {
		r.Users, r.Rebuilding = o.Connections, true
	}
	return r
}

// Listener subscribes to rooms' events. It reports through HandleSubscribed, HandleEvent
// and HandleDisconnect. Its methods must not block, and must not call Rooms before they
// return.
type Listener interface {
	Add(room string)
	Remove(room string)
}

// Config holds the settings of Rooms. Store, Listener and Wheel are required.
type Config struct {
	Store    Store
	Listener Listener
	// Wheel runs the timers. It belongs to the caller.
	Wheel *clock.Wheel
	// Interval returns the shortest time between two pushes of a room, as its rule says.
	// It must not block. After a change, call ApplyRules. Nil, or a result of 0: 1 s.
	Interval func(room string) time.Duration
	// Bucket returns the bucket of a room. If the Redis node of one bucket does not
	// answer, rooms of other buckets are still read. Nil: all rooms are in one bucket.
	Bucket func(room string) int
	// StaleAfter is the time without an answer of Redis, or without a subscription, after
	// which numbers are stale. Defaults to 250 ms, the time that the hub waits before it
	// shows a stale view.
	StaleAfter time.Duration
	// UncertainFor is the longest time for which the last numbers stay if Redis has lost
	// a room and nothing says that servers write it again. Defaults to 11 s.
	UncertainFor time.Duration
	// CompareEvery is the longest time between two readings of a watched room. A random
	// part of a fifth is left out. Defaults to 10 s.
	CompareEvery time.Duration
	// Linger is the time for which a room stays after its last watcher. Defaults to 5 s;
	// negative: 0.
	Linger time.Duration
	// Logger receives log output. Defaults to none.
	Logger *slog.Logger
}

// withDefaults returns c with its zero fields set to the defaults.
func (c Config) withDefaults() Config {
	if c.Interval == nil {
		c.Interval = func(string) time.Duration { return 0 }
	}
	if c.Bucket == nil {
		c.Bucket = func(string) int { return 0 }
	}
	if c.StaleAfter <= 0 {
		c.StaleAfter = 250 * time.Millisecond
	}
	if c.UncertainFor <= 0 {
		c.UncertainFor = 11 * time.Second
	}
	if c.CompareEvery <= 0 {
		c.CompareEvery = 10 * time.Second
	}
	if c.Linger == 0 {
		c.Linger = 5 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Rooms keeps the numbers of all rooms that are watched on this server. All methods are
// safe for concurrent use, except that the listener must call HandleEvent,
// HandleSubscribed and HandleDisconnect in the order in which things happened.
//
// It has goroutines only while there is work. Stop ends them.
type Rooms struct {
	cfg      Config
	began    time.Time
	queue    *readQueue
	due      dueList
	counters counters
	updates  atomic.Uint64 // number of the last update
	log      *limit.Log

	ctx    context.Context // ends when Rooms stops
	cancel context.CancelFunc
	wg     sync.WaitGroup // the goroutines of queue and due

	registry sync.Mutex // guards stopped, watched, and refs of every room
	stopped  bool
	watched  map[Watcher]map[*room]struct{}

	mu     sync.RWMutex // guards byName, which changes only with registry held
	byName map[string]*room
}

// New makes Rooms without rooms.
func New(cfg Config) *Rooms {
	cfg = cfg.withDefaults()
	rs := &Rooms{
		cfg: cfg, began: time.Now(), log: limit.NewLog(cfg.Logger),
		watched: make(map[Watcher]map[*room]struct{}), byName: make(map[string]*room),
	}
	// The start of a lifetime: the readings belong to no caller.
	rs.ctx, rs.cancel = context.WithCancel(context.Background())
	rs.queue = newReadQueue(rs)
	return rs
}

// Stop ends all work and waits for its end. Calls of Watch that wait return ErrStopped,
// and watchers get no more updates. Further calls only wait.
func (rs *Rooms) Stop() {
	rs.registry.Lock()
	rs.stopped = true
	rs.registry.Unlock()
	rs.cancel()
	rs.queue.close()
	rs.due.close()
	for _, r := range rs.all() {
		r.close()
	}
	rs.wg.Wait()
}

// now returns the time since Rooms was made. It is never 0.
func (rs *Rooms) now() time.Duration { return time.Since(rs.began) + 1 }

// interval returns the shortest time between two pushes of a room.
func (rs *Rooms) interval(name string) time.Duration {
	if d := rs.cfg.Interval(name); d > 0 {
		return d
	}
	return time.Second
}

// room returns the named room, or nil if there is none.
func (rs *Rooms) room(name string) *room {
	rs.mu.RLock()
	defer rs.mu.RUnlock()
	return rs.byName[name]
}

// all returns every room.
func (rs *Rooms) all() []*room {
	rs.mu.RLock()
	defer rs.mu.RUnlock()
	list := make([]*room, 0, len(rs.byName))
	for _, r := range rs.byName {
		list = append(list, r)
	}
	return list
}
