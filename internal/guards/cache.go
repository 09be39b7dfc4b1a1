package guards

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/callbacks"
)

const (
	// FailedFor is the time for which a guard that failed counts as refusing before it is
	// asked again.
	FailedFor = time.Second
	// freshFor limits the age of an answer that serves a request of a client.
	freshFor = 5 * time.Second

	// The calls of guards that hang, that is, go on after their answer was given or
	// cancelled, are limited for each rule: those about one connection, and all of them.
	// At the limit, the guards of that rule are not asked (see admit). maxHanging limits
	// those of all rules, because there may be many rules.
	maxHangingPerConn = 16
	maxHangingPerRule = 1024
	maxHanging        = 32 * maxHangingPerRule

	// defaultKept is the default of Config.Keep.
	defaultKept = 4096
)

// Config is the configuration of a Cache. Fields without a default are required.
type Config struct {
	Rules *RuleSet
	Calls *callbacks.Runner
	// GuardTimeout limits the guards of one question together, and JoinTimeout the join
	// guards.
	GuardTimeout, JoinTimeout time.Duration
	// Keep limits the answers that are kept for one connection. Defaults to 4096.
	Keep int
}

// Cache asks the guards and keeps their answers per connection, room, version of the
// connection's metadata and version of the rules. A guard that hangs delays only the
// callers that wait for its answer, at most for GuardTimeout. A Cache is safe for
// concurrent use.
type Cache struct {
	rules        *RuleSet
	calls        *callbacks.Runner
	guardTimeout time.Duration
	joinTimeout  time.Duration
	keep         int // answers per connection

	hanging hanging
	refused atomic.Uint64
	busy    atomic.Uint64

	mu    sync.RWMutex // guards conns
	conns map[string]*connAnswers
}

// connAnswers holds what is kept for one connection.
type connAnswers struct {
	mu      sync.Mutex // guards all fields, and those of answers that say so
	removed bool
	kept    map[string]*Answer // by Question.key; includes invalid ones: see answer.wasYes
	hanging map[string]int     // by rule; nil until there is one
}

// Answer is one run of the guards of a room. It may still be running.
type Answer struct {
	meta, rules uint64
	asked       time.Time    // when the run began
	of          []string     // the rules of the guards
	at          atomic.Int32 // index of the guard that runs
	call        *callbacks.Call
	ok          bool // read only once call has settled without an error
	stood       bool // an earlier answer was yes when this run began

	// Guarded by connAnswers.mu.
	ended   bool   // the guards have returned
	hanging bool   // they had not when the call settled or was cancelled
	rule    string // the rule for which the hanging call is counted
	invalid bool   // the answer must not be used any more
	// recheckDue is the time since which later guards cannot be asked because too many
	// hang.
	recheckDue time.Time
}

// NewCache returns a cache without answers.
func NewCache(c Config) *Cache {
	if c.Keep <= 0 {
		c.Keep = defaultKept
	}
	return &Cache{
		rules: c.Rules, calls: c.Calls, keep: c.Keep,
		guardTimeout: c.GuardTimeout, joinTimeout: c.JoinTimeout,
		conns: make(map[string]*connAnswers),
	}
}

// AddConn prepares for a new connection and drops what an earlier connection of that id
// has left. Before AddConn and after RemoveConn, every question about the connection that
// needs a guard gets errs.UnknownConnection. So a late question leaves nothing behind.
func (c *Cache) AddConn(conn string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns[conn] = &connAnswers{kept: make(map[string]*Answer)}
}

// RemoveConn drops what is kept for a connection that has gone, and cancels the guards
// that are asked about it.
func (c *Cache) RemoveConn(conn string) {
	c.mu.Lock()
	answers := c.conns[conn]
	delete(c.conns, conn)
	c.mu.Unlock()
	if answers == nil {
		return
	}
	answers.mu.Lock()
	defer answers.mu.Unlock()
	answers.removed = true
	for _, a := range answers.kept {
		c.cancel(answers, a)
	}
	clear(answers.kept)
}

// Invalidate makes all answers about a connection invalid, also those that are still
// awaited.
func (c *Cache) Invalidate(conn string) {
	if answers := c.of(conn); answers != nil {
		answers.mu.Lock()
		defer answers.mu.Unlock()
		for _, a := range answers.kept {
			c.cancel(answers, a)
		}
	}
}

// InvalidateAll makes all answers invalid.
func (c *Cache) InvalidateAll() {
	for _, answers := range c.all() {
		answers.mu.Lock()
		for _, a := range answers.kept {
			c.cancel(answers, a)
		}
		answers.mu.Unlock()
	}
}

// InvalidateRoom makes the answers about a connection and a room invalid.
func (c *Cache) InvalidateRoom(conn, room string) {
	if answers := c.of(conn); answers != nil {
		c.drop(answers, room, occupancyKey(room))
	}
}

// InvalidateAllOf makes the answers about a room and any connection invalid.
func (c *Cache) InvalidateAllOf(room string) {
	numbers := occupancyKey(room)
	for _, answers := range c.all() {
		c.drop(answers, room, numbers)
	}
}

func (c *Cache) all() []*connAnswers {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return slices.Collect(maps.Values(c.conns))
}

func (c *Cache) drop(answers *connAnswers, keys ...string) {
	answers.mu.Lock()
	defer answers.mu.Unlock()
	for _, key := range keys {
		if a := answers.kept[key]; a != nil {
			c.cancel(answers, a)
		}
	}
}

// of returns the answers about a connection, or nil if the connection is not known.
func (c *Cache) of(conn string) *connAnswers {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.conns[conn]
}

// Current reports whether a question could be answered now without asking a guard: there
// is none, or its answer is kept.
func (c *Cache) Current(conn string, member MemberFunc, q Question) bool {
	if !c.fillIn(&q, member) || len(q.guards()) == 0 {
		return true
	}
	answers := c.of(conn)
	if answers == nil {
		return false
	}
	answers.mu.Lock()
	defer answers.mu.Unlock()
	a := answers.kept[q.key()]
	return a != nil && !a.invalid && q.answeredBy(a) && a.call.Done() && !a.stale()
}

// cancel makes an answer invalid, and those who wait for it ask again. The answer stays in
// answers.kept because an earlier yes may have to stand if the guards cannot be asked. The
// caller holds answers.mu.
func (c *Cache) cancel(answers *connAnswers, a *Answer) {
	a.invalid = true
	if !a.call.Done() {
		a.call.Cancel(callbacks.ErrCanceled)
		c.noteHanging(answers, a)
	}
}

// evict drops settled answers, but not the one just added, until no more than keep are
// left. Those that are awaited stay: the waiting requests limit their number. The caller
// holds answers.mu.
func (c *Cache) evict(answers *connAnswers, added *Answer) {
	for room, a := range answers.kept {
		if len(answers.kept) <= c.keep {
			return
		}
		if a != added && !a.hanging && a.call.Done() {
			delete(answers.kept, room)
		}
	}
}

// Kept returns the number of answers that are kept for a connection.
func (c *Cache) Kept(conn string) int {
	answers := c.of(conn)
	if answers == nil {
		return 0
	}
	answers.mu.Lock()
	defer answers.mu.Unlock()
	return len(answers.kept)
}

// Stats are figures of a Cache.
type Stats struct {
	Refused uint64 // runs in which a guard said no or returned an error
	Busy    uint64 // questions refused because too many guards of the rule hang
	Hanging int64  // guards that hang now
}

// Stats returns the figures.
func (c *Cache) Stats() Stats {
	return Stats{Refused: c.refused.Load(), Busy: c.busy.Load(), Hanging: c.hanging.all.Load()}
}
