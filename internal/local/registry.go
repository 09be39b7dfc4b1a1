// Package local holds the connections of this server with their rooms, states and
// metadata, and writes them to Redis.
//
// It works like a controller. Each local entry knows its desired state, set by the app or
// the client, and the stored state that Redis is known to have. While the two differ, the
// entry waits in the queue of its bucket's writer, which writes batches of entries, one
// batch at a time. A lost reply, a refusal, an outage or a new incarnation only changes
// what is known of the stored state, and the difference is written again. The phases of an
// entry and the transitions between them are listed in phase.go.
//
// If connections have users, an entry also has the user and the grace of its room. The end
// of an entry whose connection did not ask to leave asks Redis to keep the place of its
// user. The server remembers such a hand-over until the place has ended (handovers.go).
// A join may take the place of another connection, which its server then forgets
// (replace.go), or find the room full (full.go).
package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
)

// Errors of the registry and its connections.
var (
	ErrUnavailable    = errors.New("local: not written to redis yet")
	ErrClosed         = errors.New("local: closed")
	ErrExists         = errors.New("local: connection exists")
	ErrNotPresent     = errors.New("local: connection is not in the room")
	ErrTooMany        = errors.New("local: connection is in too many rooms")
	ErrOwnedElsewhere = errors.New("local: the connection has joined on another server")
)

// answerTimeout is the longest time that a caller waits for Redis.
const answerTimeout = 1900 * time.Millisecond

// Registry holds the connections of one server. It is safe for concurrent use.
type Registry struct {
	cfg     Config
	madeAt  time.Time // base of the times that are kept as a time.Duration
	writers []*bucketWriter
	maxOps  int // ops of a batch
	// maxRoutineOps is the most ops of a batch that are routine or background.
	maxRoutineOps int

	stop    context.Context // ends when the writers must give up
	giveUp  context.CancelFunc
	workers sync.WaitGroup

	mu        sync.RWMutex // guards the fields below
	conns     map[string]*Conn
	closed    bool
	paceWheel *clock.Wheel // for states that wait for their interval; nil before the first

	roomsMu sync.RWMutex // guards rooms and entries; taken while Conn.mu is held, never the other way round
	rooms   map[string]*roomEntries
	entries int // in all of rooms
	inUse   int // rooms with an entry

	tickets         sync.Pool   // of *waitTicket that are not in use
	ownIncarnations sync.Map    // incarnations that this server has written under
	reconciling     atomic.Bool // only one comparison runs at a time
	reconcileAll    atomic.Bool // the next comparison covers everything
	lastReconcile   time.Time   // of everything; guarded by reconciling
	heartbeats      uint64      // heartbeats with a key check; guarded by reconciling
	seed            maphash.Seed

	handed  handOvers
	stats   counters
	log     *limit.Log
	illegal func(transition string) // of an entry; tests replace logIllegal
}

// New returns a Registry. It needs no start.
func New(cfg Config) *Registry {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.RenewLease == nil {
		cfg.RenewLease = func() {}
	}
	if cfg.StateInterval == nil {
		cfg.StateInterval = func(string) time.Duration { return 0 }
	}
	if cfg.MayReturn == nil {
		cfg.MayReturn = func(*Conn, string) bool { return true }
	}
	if cfg.OnPosition == nil {
		cfg.OnPosition = func(string, store.Position) {}
	}
	if cfg.MetaChanged == nil {
		cfg.MetaChanged = func(*Conn) {}
	}
	if cfg.Caps == nil {
		cfg.Caps = func(string) (int, int) { return 0, 0 }
	}
	if cfg.Kept == nil {
		cfg.Kept = func(string, string, string, string, int64) {}
	}
	if cfg.Full == nil {
		cfg.Full = func(*Conn, string, store.Bound) {}
	}
	if cfg.Replaced == nil {
		cfg.Replaced = func(string, string, string, *Conn, store.Position) {}
	}
	r := &Registry{
		log:           limit.NewLog(cfg.Logger),
		cfg:           cfg,
		maxOps:        cmp.Or(cfg.BatchOps, store.MaxOps),
		madeAt:        time.Now(),
		lastReconcile: time.Now(),
		conns:         make(map[string]*Conn),
		rooms:         make(map[string]*roomEntries),
		seed:          maphash.MakeSeed(),
		stats:         counters{late: histogram.New(histogram.Lags()...)},
	}
	r.illegal = r.logIllegal
	if r.maxRoutineOps = r.maxOps; cfg.Buckets > 1 {
		r.maxRoutineOps = min(r.maxOps, clusterMaxRoutineOps)
	}
	// The lifetime of the writers begins here. They write until Stop.
	r.stop, r.giveUp = context.WithCancel(context.Background())
	r.writers = make([]*bucketWriter, cfg.Buckets)
	for i := range r.writers {
		r.writers[i] = &bucketWriter{registry: r, bucket: i}
	}
	return r
}

// Connect registers a connection under id with its first metadata (nil: none) and returns
// without waiting for Redis. link may be nil. known is called before the connection can
// be found by its id. It must not call the registry.
func (r *Registry) Connect(id string, meta []byte, link Link, known func()) (*Conn, error) {
	c := &Conn{registry: r, id: id, link: link, entries: make(map[string]*entry), meta: meta}
	if meta != nil {
		c.metaVersion = 1
	}
	if r.cfg.UserOf != nil {
		c.user = &connUser{id: r.cfg.UserOf(id, meta)}
	}
	c.reg = registration{c: c, ready: make(chan struct{}), gone: make(chan struct{})}
	c.seen.Store(int64(time.Since(r.madeAt)))
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil, ErrClosed
	}
	if _, ok := r.conns[id]; ok {
		r.mu.Unlock()
		return nil, fmt.Errorf("%w: %s", ErrExists, id)
	}
	known()
	r.conns[id] = c
	r.mu.Unlock()
	c.reg.enqueue(arriving)
	return c, nil
}

// Conn returns the open connection of this server with the given id.
func (r *Registry) Conn(id string) (*Conn, bool) {
	r.mu.RLock()
	c, ok := r.conns[id]
	r.mu.RUnlock()
	if !ok || c.isClosed() {
		return nil, false
	}
	return c, true
}

// Closing returns a channel that is closed when Redis no longer holds the connection id,
// which this server has closed. It returns nil if there is no such connection.
func (r *Registry) Closing(id string) <-chan struct{} {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if c, ok := r.conns[id]; ok {
		return c.reg.gone
	}
	return nil
}

// Conns returns the open connections.
func (r *Registry) Conns() []*Conn {
	r.mu.RLock()
	defer r.mu.RUnlock()
	list := make([]*Conn, 0, len(r.conns))
	for _, c := range r.conns {
		list = append(list, c)
	}
	return list
}

// InRoom returns the connections of this server that are in room.
func (r *Registry) InRoom(room string) []*Conn {
	r.roomsMu.RLock()
	defer r.roomsMu.RUnlock()
	re := r.rooms[room]
	if re == nil {
		return nil
	}
	list := make([]*Conn, 0, len(re.entries))
	for e := range re.entries {
		list = append(list, e.c)
	}
	return list
}

// Joined returns the connections of this server that are in room or join again at their
// next frame. It looks at every connection.
func (r *Registry) Joined(room string) []*Conn {
	var list []*Conn
	for _, c := range r.Conns() {
		if c.In(room) {
			list = append(list, c)
		}
	}
	return list
}

// NotIn returns those of the connections that are not in room and have nothing left to be
// written there. No event of them can follow unless they join again.
func (r *Registry) NotIn(room string, conns []string) []string {
	var gone []string
	for _, id := range conns {
		r.mu.RLock()
		c := r.conns[id]
		r.mu.RUnlock()
		if c == nil || c.isOut(room) {
			gone = append(gone, id)
		}
	}
	return gone
}

func (r *Registry) remove(c *Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conns[c.id] == c {
		delete(r.conns, c.id)
	}
}

// Reregistered is called after the server took a new incarnation. Everything is written
// again under it. If the server stalled past its lease, its sockets may be dead. Then
// each connection joins again at its next frame, and is pinged to send one.
func (r *Registry) Reregistered(stalled bool) {
	for _, c := range r.Conns() {
		c.reregistered(stalled)
	}
}

// Drain closes every connection (see Conn.Close) and waits until Redis has everything, or
// until ctx ends. Connect fails from then on.
func (r *Registry) Drain(ctx context.Context, cause store.Cause, keep bool) error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	conns := r.Conns()
	for _, c := range conns {
		c.Close(cause, keep)
	}
	for _, c := range conns {
		select {
		case <-c.reg.gone:
		case <-ctx.Done():
			return fmt.Errorf("local: entries not written: %w", ctx.Err())
		}
	}
	return nil
}

// Stop stops the writers and waits for them. Changes that are not written are dropped.
func (r *Registry) Stop() {
	r.mu.Lock()
	r.closed = true
	pace := r.paceWheel
	r.mu.Unlock()
	if pace != nil {
		pace.Stop()
	}
	r.handed.close(r.cfg.Wheel)
	r.giveUp()
	for _, w := range r.writers {
		w.close()
	}
	r.workers.Wait()
}

// refused logs that Redis refused a single change, because it is out of memory for
// example. The operator has to know, but not from each connection.
func (r *Registry) refused(conn string, err error) {
	r.cfg.Logger.Debug("mesh: change refused by redis", "conn", conn, "error", err)
	r.log.Warn("mesh: redis refuses changes", "error", err)
}
