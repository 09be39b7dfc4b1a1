// Package owner keeps what this server is the authority on: its connections,
// the rooms each of them is in, their states and metadata.
//
// It is level-triggered. Every entry knows what it should be (asked for by the
// app or the client) and what Redis is known to hold; as long as the two
// differ the entry is offered to the lane of its bucket, which writes batches
// of them, one at a time. A lost reply, a refusal, an outage or a new
// incarnation only changes what is known, and the difference is written again.
package owner

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

// Errors of the owner.
var (
	ErrUnavailable = errors.New("owner: redis has not taken it yet")
	ErrClosed      = errors.New("owner: closed")
	ErrExists      = errors.New("owner: connection exists")
	ErrNotPresent  = errors.New("owner: connection is not in the room")
	ErrTooMany     = errors.New("owner: connection is in too many rooms")
	ErrTaken       = errors.New("owner: the connection has joined on another server")
)

// answerWithin bounds how long a caller waits for Redis.
const answerWithin = 1900 * time.Millisecond

// Store is what the owner asks of the store.
type Store interface {
	Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error)
	OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) ([]store.OwnedRef, uint64, error)
	OwnedSize(ctx context.Context, bucket int, inc string) (int64, error)
	ConnMetas(ctx context.Context, conns []string) ([]store.MetaValue, error)
	Check(ctx context.Context, bucket int, inc string, list store.CheckList) (store.Checked, error)
}

// Config is what an Owner needs. Fields without a default are required.
type Config struct {
	Store       Store
	Wheel       *clock.Wheel
	Buckets     int
	RoomBucket  func(room string) int
	ConnBucket  func(conn string) int
	Incarnation func() string
	// TTL is the rule's for a room, 0: none.
	TTL func(room string) time.Duration
	// StateInterval is the rule's for a room: how long after a state of a member
	// the next one is told at the earliest, 0: each is told. Defaults to 0.
	StateInterval func(room string) time.Duration
	// BatchOps is how many ops one call carries at most. Defaults to store.MaxOps.
	BatchOps int
	// Heartbeat is how often Owner.Heartbeat is called. Defaults to 0: unknown.
	Heartbeat time.Duration
	// MayReturn is called, with the connection's lock held, before an entry that has
	// ended is joined again because its connection gave a sign of life. If it
	// returns false, the entry stays out until Conn.Return or Conn.StayOut. It is
	// asked again at each further frame. It must not block or call the Conn.
	// Defaults to true.
	MayReturn func(c *Conn, room string) bool
	// EndSilent makes the owner's clock end entries that fell silent.
	EndSilent bool
	// MaxRooms bounds the rooms of one connection; negative: no bound.
	MaxRooms int
	// Fenced is called when Redis refused a batch of that incarnation. It must not block.
	Fenced func(inc string)
	// Doubt is called when Redis has lost something that it had acknowledged, or
	// everything. It must not block.
	Doubt func()
	// Answered returns when Redis last answered a call of a bucket. Optional.
	Answered func(bucket int) time.Time
	// Wrote is told how far a room has come by this server's own writes. It must not block.
	Wrote func(room string, p store.Position)
	// MetaChanged is called when a connection's metadata has changed, perhaps
	// more than once. It must not block.
	MetaChanged func(c *Conn)
	Logger      *slog.Logger
}

// Owner holds the connections of one server. It is safe for concurrent use.
type Owner struct {
	cfg   Config
	born  time.Time // base of the monotonic readings in Conn.seen
	lanes []*lane
	most  int // ops of a batch
	// portion limits how many of them are routine or background.
	portion int

	stop    context.Context // ends when lanes must give up
	giveUp  context.CancelFunc
	workers sync.WaitGroup

	mu     sync.RWMutex // guards the fields below
	conns  map[string]*Conn
	closed bool
	pace   *clock.Wheel // of states that wait for their interval; nil until there is one

	roomsMu sync.RWMutex // guards rooms and entries; taken with Conn.mu held, never the other way round
	rooms   map[string]*localRoom
	entries int // in all of rooms
	inUse   int // rooms with an entry

	tickets   sync.Pool   // of *ticket, that nobody waits with
	past      sync.Map    // incarnations that this server has written under
	auditing  atomic.Bool // one audit at a time
	trouble   atomic.Bool // the next one compares everything
	lastAudit time.Time   // of everything; guarded by auditing
	beats     uint64      // heartbeats with a check; guarded by auditing
	seed      maphash.Seed

	stats counters
	log   *limit.Log
}

type counters struct {
	batches, ops, retries, rejoined, audits, strays atomic.Uint64
	superseded                                      atomic.Uint64
	leaves                                          [256]atomic.Uint64 // by store.Cause
	late                                            *histogram.Histogram
}

// Stats are counts since the start, and what is held now.
type Stats struct {
	Connections, Entries, Rooms int
	Unwritten                   int // entries and connections whose last change is not in Redis yet
	Batches, Ops, Retries       uint64
	Rejoined, Audits, Strays    uint64
	LeftAsked, LeftClosed       uint64
	LeftSilent                  uint64
	Superseded                  uint64 // states left out because a newer one came within the interval
	// Late is how long after a connection had been silent for its TTL Redis had
	// taken the leave that the owner's clock made of it, of each such entry.
	Late histogram.Counts
}

// New returns an Owner; it has nothing to start.
func New(cfg Config) *Owner {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Doubt == nil {
		cfg.Doubt = func() {}
	}
	if cfg.StateInterval == nil {
		cfg.StateInterval = func(string) time.Duration { return 0 }
	}
	if cfg.MayReturn == nil {
		cfg.MayReturn = func(*Conn, string) bool { return true }
	}
	if cfg.Wrote == nil {
		cfg.Wrote = func(string, store.Position) {}
	}
	if cfg.MetaChanged == nil {
		cfg.MetaChanged = func(*Conn) {}
	}
	o := &Owner{
		log:       limit.NewLog(cfg.Logger),
		cfg:       cfg,
		most:      cmp.Or(cfg.BatchOps, store.MaxOps),
		born:      time.Now(),
		lastAudit: time.Now(),
		conns:     make(map[string]*Conn),
		rooms:     make(map[string]*localRoom),
		seed:      maphash.MakeSeed(),
		stats:     counters{late: histogram.New(histogram.Lags()...)},
	}
	if o.portion = o.most; cfg.Buckets > 1 {
		o.portion = min(o.most, clusterPortion)
	}
	// A lifetime begins: lanes write until Stop gives up on them.
	o.stop, o.giveUp = context.WithCancel(context.Background())
	o.lanes = make([]*lane, cfg.Buckets)
	for i := range o.lanes {
		o.lanes[i] = &lane{o: o, bucket: i}
	}
	return o
}

// Connect registers a connection under id with its first metadata (nil: none)
// and returns without waiting for Redis. link may be nil. known is called
// before anybody else can find the connection; it must not call the owner.
func (o *Owner) Connect(id string, meta []byte, link Link, known func()) (*Conn, error) {
	c := &Conn{o: o, id: id, link: link, entries: make(map[string]*entry), meta: meta}
	if meta != nil {
		c.metaVersion = 1
	}
	c.reg = registration{c: c, ready: make(chan struct{}), gone: make(chan struct{})}
	c.seen.Store(int64(time.Since(o.born)))
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return nil, ErrClosed
	}
	if _, ok := o.conns[id]; ok {
		o.mu.Unlock()
		return nil, fmt.Errorf("%w: %s", ErrExists, id)
	}
	known()
	o.conns[id] = c
	o.mu.Unlock()
	c.reg.offer(arriving)
	return c, nil
}

// Conn returns the connection with that id, if it is this server's and open.
func (o *Owner) Conn(id string) (*Conn, bool) {
	o.mu.RLock()
	c, ok := o.conns[id]
	o.mu.RUnlock()
	if !ok || c.isClosed() {
		return nil, false
	}
	return c, true
}

// Closing returns a channel that is closed when the connection id, which has
// been closed here, is out of Redis; nil where there is none such.
func (o *Owner) Closing(id string) <-chan struct{} {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if c, ok := o.conns[id]; ok {
		return c.reg.gone
	}
	return nil
}

// Conns returns the open connections.
func (o *Owner) Conns() []*Conn {
	o.mu.RLock()
	defer o.mu.RUnlock()
	list := make([]*Conn, 0, len(o.conns))
	for _, c := range o.conns {
		list = append(list, c)
	}
	return list
}

// InRoom returns this server's connections that are in room.
func (o *Owner) InRoom(room string) []*Conn {
	o.roomsMu.RLock()
	defer o.roomsMu.RUnlock()
	r := o.rooms[room]
	if r == nil {
		return nil
	}
	list := make([]*Conn, 0, len(r.entries))
	for e := range r.entries {
		list = append(list, e.c)
	}
	return list
}

// Joined returns this server's connections that are in room, or will be at
// their next frame. It looks at every connection.
func (o *Owner) Joined(room string) []*Conn {
	var list []*Conn
	for _, c := range o.Conns() {
		if c.In(room) {
			list = append(list, c)
		}
	}
	return list
}

// Gone returns those of the connections that are not in room, and about which
// nothing is left to be written there: no event can follow, unless they join
// again.
func (o *Owner) Gone(room string, conns []string) []string {
	var gone []string
	for _, id := range conns {
		o.mu.RLock()
		c := o.conns[id]
		o.mu.RUnlock()
		if c == nil || c.isOut(room) {
			gone = append(gone, id)
		}
	}
	return gone
}

func (o *Owner) forget(c *Conn) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.conns[c.id] == c {
		delete(o.conns, c.id)
	}
}

// Reborn is called when the server has a new incarnation: everything is
// written anew under it. Where the server itself had stalled past its lease,
// nobody knows which sockets are still alive: each is joined again at its next
// frame, and asked for one now.
func (o *Owner) Reborn(stalled bool) {
	for _, c := range o.Conns() {
		c.reborn(stalled)
	}
}

// Drain closes every connection with cause and waits until all of it is in
// Redis, or ctx ends. No new connection is taken from then on.
func (o *Owner) Drain(ctx context.Context, cause store.Cause) error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	conns := o.Conns()
	for _, c := range conns {
		c.Close(cause)
	}
	for _, c := range conns {
		select {
		case <-c.reg.gone:
		case <-ctx.Done():
			return fmt.Errorf("owner: entries not written: %w", ctx.Err())
		}
	}
	return nil
}

// Stop ends the lanes, whatever is not written, and waits for them.
func (o *Owner) Stop() {
	o.mu.Lock()
	o.closed = true
	pace := o.pace
	o.mu.Unlock()
	if pace != nil {
		pace.Stop()
	}
	o.giveUp()
	for _, l := range o.lanes {
		l.close()
	}
	o.workers.Wait()
}

// refused logs that Redis refused a change of a connection by itself, as it
// does when it is out of memory: whoever runs it has to know, and not from each
// connection.
func (o *Owner) refused(conn string, err error) {
	o.cfg.Logger.Debug("mesh: change refused by redis", "conn", conn, "error", err)
	o.log.Warn("mesh: redis refuses changes", "error", err)
}

// Stats returns the current counts. It takes the locks for a moment each,
// however much is held.
func (o *Owner) Stats() Stats {
	s := Stats{
		Batches: o.stats.batches.Load(), Ops: o.stats.ops.Load(), Retries: o.stats.retries.Load(),
		Rejoined: o.stats.rejoined.Load(), Audits: o.stats.audits.Load(), Strays: o.stats.strays.Load(),
		LeftAsked:  o.stats.leaves[store.CauseLeft].Load(),
		LeftClosed: o.stats.leaves[store.CauseClosed].Load(),
		LeftSilent: o.stats.leaves[store.CauseSilent].Load(),
		Superseded: o.stats.superseded.Load(),
		Late:       o.stats.late.Counts(),
	}
	o.mu.RLock()
	s.Connections = len(o.conns)
	o.mu.RUnlock()
	o.roomsMu.RLock()
	s.Rooms, s.Entries = o.inUse, o.entries
	o.roomsMu.RUnlock()
	for _, l := range o.lanes {
		s.Unwritten += l.waiting()
	}
	return s
}
