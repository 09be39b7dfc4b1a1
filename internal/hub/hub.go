package hub

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
)

// ErrStopped is returned by Watch, WatchNow and Load after the hub was stopped.
var ErrStopped = errors.New("mesh: hub is stopped")

// Store is the part of the store that the hub reads from.
type Store interface {
	// Snapshot reads a whole room.
	Snapshot(ctx context.Context, room string) (store.Snapshot, error)
	// Positions reads the positions of rooms, in the order of the argument.
	Positions(ctx context.Context, rooms []string) ([]store.Position, error)
	// Generation returns the generation of Redis, or false if it is unknown.
	Generation(ctx context.Context) (string, bool)
}

// Listener subscribes to rooms' events for the hub. It reports through
// HandleSubscribed, HandleEvent and HandleDisconnect. Calls of Add and Remove come
// in their intended order. They must not block, and must not call the hub before
// they return.
type Listener interface {
	Add(room string)
	Remove(room string)
}

// Config holds the settings of a Hub. Store and Listener are required.
type Config struct {
	Store    Store
	Listener Listener

	// AskOwner asks an owner (an incarnation) which of these connections are no
	// longer in the room. It calls gone with them at most once, from any goroutine,
	// and never if the owner does not answer. It must not block. Nil: owners are not
	// asked.
	AskOwner func(room, owner string, conns []string, gone func([]string))
	// UnconfirmedFor is the time for which unconfirmed members stay listed.
	// Defaults to 11 s.
	UnconfirmedFor time.Duration
	// Overdue is called for the disconnected members of a room whose places should have
	// ended UnconfirmedFor ago, at most once for each comparison. The index of kept
	// places may have lost them. It must not block. Optional.
	Overdue func(room string, o Overdue)
	// Linger is the time for which a mirror stays after its last watcher, and after
	// the last join that was answered from it. Defaults to 5 s; negative: 0.
	Linger time.Duration
	// CountUsers says that the users of connections count. If not, members have no user.
	CountUsers bool
	// Listed is the maximum number of members in a view. 0 or less: no limit.
	Listed int
	// CompareEvery is the interval between comparisons of all watched rooms with
	// Redis. Defaults to 10 s.
	CompareEvery time.Duration
	// Bucket returns the bucket of a room. If the Redis node of one bucket does not
	// answer, rooms of other buckets are still read and compared. Nil: all rooms are
	// in one bucket.
	Bucket func(room string) int
	// Snapshots is the maximum number of snapshots that are read at once. If several
	// buckets are in use, the limit is two per bucket. Defaults to 8.
	Snapshots int
	// Now returns the time of Redis in unix ms, for the times of repairs. It must not
	// block. Defaults to this machine's clock.
	Now func() int64
	// Logger receives log output. Defaults to none.
	Logger *slog.Logger
}

// Overdue is a place that should have ended.
type Overdue struct {
	Conn, Entry string
	Until       int64 // Redis time, unix ms
}

// withDefaults returns c with its zero fields set to the defaults.
func (c Config) withDefaults() Config {
	if c.UnconfirmedFor <= 0 {
		c.UnconfirmedFor = 11 * time.Second
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

// Hub holds the mirrors of all rooms that are watched on this server, and of some
// rooms that many connections join (see recentJoins). All methods are safe for
// concurrent use, except that the listener must call HandleEvent, HandleSubscribed
// and HandleDisconnect in the order in which things happened.
type Hub struct {
	cfg        Config
	madeAt     time.Time
	generation *generationCache
	timers     *timers
	toRead     *snapshotQueue
	toCompare  *compareQueue
	joins      *recentJoins
	counters   counters
	log        *limit.Log
	pageList   string        // identifies the hub in the cursors of pages
	orders     atomic.Uint64 // orders of members in pages so far

	ctx    context.Context // ends when the hub stops
	cancel context.CancelFunc
	wg     sync.WaitGroup // the goroutines of Start
	start  sync.Once

	mu      sync.RWMutex // guards the following, and refs of every mirror
	mirrors map[string]*mirror
	burst   burst
}

// New makes a hub. It does nothing before Start.
func New(cfg Config) *Hub {
	cfg = cfg.withDefaults()
	h := &Hub{
		cfg:        cfg,
		madeAt:     time.Now(),
		generation: newGenerationCache(cfg.Store.Generation),
		timers:     newTimers(),
		toRead:     newSnapshotQueue(cfg.Snapshots, cfg.Bucket),
		toCompare:  newCompareQueue(),
		joins:      new(recentJoins),
		log:        limit.NewLog(cfg.Logger),
		pageList:   newPageList(),
		mirrors:    make(map[string]*mirror),
	}
	// The start of a lifetime: the hub's work belongs to no caller.
	h.ctx, h.cancel = context.WithCancel(context.Background())
	return h
}

// CountsUsers reports whether users are counted.
func (h *Hub) CountsUsers() bool { return h.cfg.CountUsers }

// warn logs a failure of Redis, unless the failure is due to the end of the hub.
func (h *Hub) warn(message string, args ...any) {
	if h.ctx.Err() == nil {
		h.log.Warn(message, args...)
	}
}

// Start starts the hub's goroutines. Further calls do nothing.
func (h *Hub) Start() {
	h.start.Do(func() {
		h.wg.Go(func() { h.timers.run(h.ctx) })
		h.wg.Go(h.compareLoop)
	})
}

// Stop ends the hub's work and waits for its end. Calls of Watch that wait return
// ErrStopped, and sinks get no more updates. A stopped hub cannot be started again.
// Further calls only wait.
func (h *Hub) Stop() {
	h.start.Do(func() {}) // a later Start does nothing
	h.cancel()
	h.toRead.close()
	h.wg.Wait()
}

// mirror returns the room's mirror, or nil if there is none.
func (h *Hub) mirror(room string) *mirror {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.mirrors[room]
}

// allMirrors returns every mirror.
func (h *Hub) allMirrors() []*mirror {
	h.mu.RLock()
	defer h.mu.RUnlock()
	list := make([]*mirror, 0, len(h.mirrors))
	for _, m := range h.mirrors {
		list = append(list, m)
	}
	return list
}

// acquire returns the room's mirror, made if there is none, with a reference that
// keeps it. The caller gives the reference back with release.
func (h *Hub) acquire(room string) (*mirror, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ctx.Err() != nil {
		return nil, ErrStopped
	}
	m := h.mirrors[room]
	if m == nil {
		m = newMirror(h, room)
		h.mirrors[room] = m
		// The lock keeps the order of Add and the Remove of an earlier mirror of this
		// room.
		h.cfg.Listener.Add(room)
	}
	if m.refs++; m.refs == 1 {
		h.timers.cancel(&m.linger)
	}
	return m, nil
}

// release gives back a reference. After the last one the mirror lingers.
func (h *Hub) release(m *mirror) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if m.refs--; m.refs == 0 {
		h.timers.set(&m.linger, time.Now().Add(h.linger()))
	}
}

// linger returns the time for which an unwatched mirror stays.
func (h *Hub) linger() time.Duration { return max(h.cfg.Linger, 0) }

// drop removes a mirror whose linger is over, unless it is referenced again or recent
// joins keep it.
func (h *Hub) drop(m *mirror) {
	h.mu.Lock()
	remove := m.refs == 0 && h.mirrors[m.room] == m
	if until := m.lingerUntil(); remove && time.Now().Before(until) {
		remove = false
		h.timers.set(&m.linger, until)
	}
	if remove {
		delete(h.mirrors, m.room)
		h.cfg.Listener.Remove(m.room)
	}
	h.mu.Unlock()
	if remove {
		m.close()
	}
}
