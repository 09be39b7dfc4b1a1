package mesh

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// failedFor is how long a guard that failed counts as refusing before it
	// is asked again.
	failedFor = time.Second
	// straysPerConn and straysAll bound the goroutines of guards that go on
	// after their verdict was given or called off. Beyond, nothing more is
	// asked: it is refused.
	straysPerConn = 16
	straysAll     = 1024
	// verdictsKept is how many verdicts a connection keeps where its
	// subscriptions and rooms are not limited.
	verdictsKept = 4096

	callbackGuard     = "guard"
	callbackJoinGuard = "join guard"
)

// errCalledOff ends the context of guards whose verdict nobody wants any more.
var errCalledOff = errors.New("mesh: the question was called off")

// memberFunc returns a connection's id and metadata as they are now, and the
// metadata's version, which changes whenever the metadata does. It must not
// block.
type memberFunc func() (m Member, version uint64)

// verdicts asks the guards and keeps what they said, per connection, room,
// version of the connection's metadata and version of the rules. Safe for
// concurrent use; a guard that hangs holds up only who asks for its verdict,
// and those at most for the guards' time limit.
type verdicts struct {
	rules        *ruleSet
	calls        *callbacks
	guardTimeout time.Duration
	joinTimeout  time.Duration
	keep         int // verdicts per connection

	strays  atomic.Int64 // see straysAll
	refused atomic.Uint64
	busy    atomic.Uint64

	mu    sync.RWMutex // guards conns
	conns map[string]*connVerdicts
}

// connVerdicts is what is kept for one connection.
type connVerdicts struct {
	mu     sync.Mutex // guards all fields, and those of verdicts that say so
	gone   bool
	kept   map[string]*verdict // by room
	strays int
}

// verdict is one run of a room's guards, under way or over.
type verdict struct {
	meta, rules uint64
	call        *call
	ok          bool // read only once call has settled without an error

	// Guarded by connVerdicts.mu.
	ended   bool // the guards have returned
	stray   bool // they had not when the call settled or was called off
	dropped bool // called off
}

// verdictStats counts what callbackStats does not.
type verdictStats struct {
	Refused uint64 // runs in which a guard said no or returned an error
	Busy    uint64 // refused without asking, because too many guards hang
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

// remember makes room for a new connection's verdicts; those of an earlier one
// of that id are of no use to it. Until then, and after
// forget, every guarded question about it answers ErrUnknownConnection: so a
// question that comes late leaves nothing behind.
func (v *verdicts) remember(conn string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.conns[conn] = &connVerdicts{kept: make(map[string]*verdict)} // never an earlier one's
}

// forget releases what is kept for a connection that has gone, and calls off
// what is under way.
func (v *verdicts) forget(conn string) {
	v.mu.Lock()
	c := v.conns[conn]
	delete(v.conns, conn)
	v.mu.Unlock()
	if c != nil {
		v.drop(c, true)
	}
}

// invalidate makes the guards of a connection be asked anew, those under way
// included.
func (v *verdicts) invalidate(conn string) {
	if c := v.of(conn); c != nil {
		v.drop(c, false)
	}
}

// of returns what is kept for a connection, nil if it is not known.
func (v *verdicts) of(conn string) *connVerdicts {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.conns[conn]
}

// drop calls off and removes all of a connection's verdicts.
func (v *verdicts) drop(c *connVerdicts, gone bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = c.gone || gone
	for _, a := range c.kept {
		v.callOff(c, a)
	}
	clear(c.kept)
}

// callOff makes a verdict void, and whoever waits for it ask again. The
// caller holds c.mu and takes the verdict out of c.kept.
func (v *verdicts) callOff(c *connVerdicts, a *verdict) {
	a.dropped = true
	if !a.call.done() {
		v.noteStray(c, a)
		a.call.cancel(errCalledOff)
	}
}

// noteStray counts guards that go on without anybody waiting. The caller holds
// c.mu.
func (v *verdicts) noteStray(c *connVerdicts, a *verdict) {
	if !a.ended && !a.stray {
		a.stray = true
		c.strays++
		v.strays.Add(1)
	}
}

// guardsEnded accounts for guards that have returned.
func (v *verdicts) guardsEnded(c *connVerdicts, a *verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a.ended = true
	if a.stray {
		a.stray = false
		c.strays--
		v.strays.Add(-1)
	}
}

// evict makes room for the verdict just added, at the cost of any other that
// is settled. Those under way stay; who waits for them bounds their number.
// The caller holds c.mu.
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
	s := verdictStats{Refused: v.refused.Load(), Busy: v.busy.Load(), Strays: v.strays.Load()}
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, c := range v.conns {
		c.mu.Lock()
		s.Kept += len(c.kept)
		c.mu.Unlock()
	}
	return s
}
