package mesh

import (
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// failedFor is how long a guard that failed counts as refusing before it
	// is asked again.
	failedFor = time.Second
	// freshFor limits the age of a verdict that answers a request of a client.
	freshFor = 5 * time.Second
	// straysPerConn and straysAll bound the calls of one rule's guards that go on
	// after their verdict was given or called off: those about one connection, and
	// all of them. At the bound that rule's guards are not asked (see admit).
	// straysTotal bounds those of all rules, of which there may be many: they must not
	// fill the memory.
	straysPerConn = 16
	straysAll     = 1024
	straysTotal   = 32 * straysAll
	// verdictsKept is the number of verdicts that a connection keeps if its subscriptions
	// or rooms are not limited.
	verdictsKept = 4096

	callbackGuard     = "guard"
	callbackJoinGuard = "join guard"
)

// errCalledOff ends the context of guards whose verdict is void.
var errCalledOff = errors.New("mesh: the question was called off")

// memberFunc returns a connection's id and metadata as they are now, and the
// metadata's version, which changes whenever the metadata does. It must not
// block.
type memberFunc func() (m Member, version uint64)

// verdicts asks the guards and keeps their verdicts, per connection, room,
// version of the connection's metadata and version of the rules. Safe for
// concurrent use. A guard that hangs delays only the callers that wait for its
// verdict, at most for the guards' time limit.
type verdicts struct {
	rules        *ruleSet
	calls        *callbacks
	guardTimeout time.Duration
	joinTimeout  time.Duration
	keep         int // verdicts per connection

	hanging hanging
	refused atomic.Uint64
	busy    atomic.Uint64

	mu    sync.RWMutex // guards conns
	conns map[string]*connVerdicts
}

// connVerdicts is what is kept for one connection.
type connVerdicts struct {
	mu     sync.Mutex // guards all fields, and those of verdicts that say so
	gone   bool
	kept   map[string]*verdict // by room; void ones, too: see verdict.stands
	strays map[string]int      // by rule; nil until there is one
}

// verdict is one run of a room's guards, under way or over.
type verdict struct {
	meta, rules uint64
	asked       time.Time    // when the run began
	of          []string     // the rules of the guards
	at          atomic.Int32 // index of the guard that runs
	call        *call
	ok          bool // read only once call has settled without an error
	stood       bool // an earlier verdict was yes when this run began

	// Guarded by connVerdicts.mu.
	ended bool   // the guards have returned
	stray bool   // they had not when the call settled or was called off
	rule  string // that a stray is counted for
	void  bool   // it answers no question any more
	// owed is since when guards that were to follow it cannot be asked because too
	// many hang.
	owed time.Time
}

// verdictStats counts what callbackStats does not.
type verdictStats struct {
	Refused uint64 // runs in which a guard said no or returned an error
	Busy    uint64 // refused without asking, because too many guards of the rule hang
	Strays  int64  // guards that hang now
	Kept    int    // verdicts in memory
}

// newVerdicts returns the verdicts of one server.
func newVerdicts(rules *ruleSet, calls *callbacks, o Options) *verdicts {
	keep := verdictsKept
	if rooms, subs := o.Limits.RoomsPerConnection, o.Limits.SubscriptionsPerConnection; rooms > 0 && subs > 0 {
		keep = rooms + subs
	}
	return &verdicts{
		rules: rules, calls: calls, keep: keep,
		guardTimeout: o.GuardTimeout, joinTimeout: o.HookTimeout,
		conns: make(map[string]*connVerdicts),
	}
}

// remember prepares for a new connection. It drops what an earlier connection of
// that id has left. Before remember and after forget, every guarded question
// about the connection is answered with ErrUnknownConnection, so a late question
// leaves nothing behind.
func (v *verdicts) remember(conn string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.conns[conn] = &connVerdicts{kept: make(map[string]*verdict)}
}

// forget releases what is kept for a connection that has gone, and calls off
// what is under way.
func (v *verdicts) forget(conn string) {
	v.mu.Lock()
	c := v.conns[conn]
	delete(v.conns, conn)
	v.mu.Unlock()
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for _, a := range c.kept {
		v.callOff(c, a)
	}
	clear(c.kept)
}

// invalidate voids all verdicts about a connection, those under way included.
func (v *verdicts) invalidate(conn string) {
	if c := v.of(conn); c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, a := range c.kept {
			v.callOff(c, a)
		}
	}
}

// invalidateAll voids all verdicts.
func (v *verdicts) invalidateAll() {
	for _, c := range v.all() {
		c.mu.Lock()
		for _, a := range c.kept {
			v.callOff(c, a)
		}
		c.mu.Unlock()
	}
}

// invalidateRoom voids the verdict about a connection and a room.
func (v *verdicts) invalidateRoom(conn, room string) {
	if c := v.of(conn); c != nil {
		v.drop(c, room)
	}
}

// invalidateAllOf voids the verdicts about a room and any connection.
func (v *verdicts) invalidateAllOf(room string) {
	for _, c := range v.all() {
		v.drop(c, room)
	}
}

func (v *verdicts) all() []*connVerdicts {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return slices.Collect(maps.Values(v.conns))
}

func (v *verdicts) drop(c *connVerdicts, room string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a := c.kept[room]; a != nil {
		v.callOff(c, a)
	}
}

// of returns the verdicts of a connection, nil if it is not known.
func (v *verdicts) of(conn string) *connVerdicts {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.conns[conn]
}

// current reports whether a question put now can be answered without asking a
// guard: there is none, or its verdict is kept.
func (v *verdicts) current(conn string, member memberFunc, room string) bool {
	q := question{room: room}
	if !v.put(&q, member) || len(q.rule.guards) == 0 {
		return true
	}
	c := v.of(conn)
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.kept[room]
	return a != nil && !a.void && q.answeredBy(a) && a.call.done() && !a.stale()
}

// callOff voids a verdict and makes its waiters ask again. The verdict stays in
// c.kept because a yes may have to stand if the guards cannot be asked. The
// caller holds c.mu.
func (v *verdicts) callOff(c *connVerdicts, a *verdict) {
	a.void = true
	if !a.call.done() {
		a.call.cancel(errCalledOff)
		v.noteStray(c, a)
	}
}

// evict drops settled verdicts other than the one just added until no more than
// keep are left. Those under way stay. Their number is bounded by the requests
// that wait for them. The caller holds c.mu.
func (v *verdicts) evict(c *connVerdicts, added *verdict) {
	for room, a := range c.kept {
		if len(c.kept) <= v.keep {
			return
		}
		if a != added && !a.stray && a.call.done() {
			delete(c.kept, room)
		}
	}
}

// stats returns the counts.
func (v *verdicts) stats() verdictStats {
	s := verdictStats{Refused: v.refused.Load(), Busy: v.busy.Load(), Strays: v.hanging.all.Load()}
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, c := range v.conns {
		c.mu.Lock()
		s.Kept += len(c.kept)
		c.mu.Unlock()
	}
	return s
}
