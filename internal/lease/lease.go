// Package lease keeps one server's place among the living. It renews the
// server's lease in Redis, notices when the server itself was declared dead and
// gives it a new incarnation, and declares dead, and cleans up after, other
// servers whose lease ran out.
//
// Two rules carry everything. A server is dead from the moment that a script
// moved its incarnation from the list of instances to the list of the dead, and
// no earlier. And nobody moves it who has not been patient: whose own renewals
// did not all succeed for one TTL, or who saw Redis's clock and its own
// monotonic clock part in that time. So an outage, a failover or a clock step,
// which hit all servers alike, bury nobody.
package lease

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/store"
)

// Errors of Start and Resign.
var (
	// ErrStarted says that Start was called a second time, or after Stop.
	ErrStarted = errors.New("mesh: lease was started before")
	// ErrRunning says that Resign was called before Stop had finished.
	ErrRunning = errors.New("mesh: lease is still being renewed")
)

// maxCall bounds every call to Redis; shorter where the TTL is.
const maxCall = 2 * time.Second

// Store is what the lease needs of Redis; *store.Store has it. Every call may
// be repeated, and returns when its context ends.
type Store interface {
	Register(ctx context.Context, inc string, ttl time.Duration) (nowMs int64, err error)
	Renew(ctx context.Context, inc string, ttl time.Duration, beat string, wantDead bool) (store.Renewal, error)
	Bury(ctx context.Context, j store.Judgment, inc string) (bool, error)
	DeclareDead(ctx context.Context, inc string) error
	Cleaned(ctx context.Context, inc string) error
	Fence(ctx context.Context, bucket int, inc string) error
	OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) (refs []store.OwnedRef, next uint64, err error)
	OwnedSize(ctx context.Context, bucket int, inc string) (int64, error)
	Reap(ctx context.Context, j store.Judgment, items []store.ReapItem) ([]store.ReapStatus, error)
	ForgetConnections(ctx context.Context, bucket int, inc string, conns []string) error
	Publish(ctx context.Context, channel, payload string) (heard int64, err error)
}

// Config says how a Lease works. The callbacks must not block and must not call
// Stop: all but OnBuried run on the goroutine that renews.
type Config struct {
	// Store is required.
	Store Store
	// TTL is how long a lease lives without being renewed; required, at least
	// a second makes sense.
	TTL time.Duration
	// Buckets is how many buckets rooms are spread over. Defaults to 1.
	Buckets int
	// NewIncarnation makes a random id without ':' and space. Defaults to 26
	// characters of base32.
	NewIncarnation func() string
	// Control names the channel of an incarnation, on which Renew publishes
	// its beats. Without it, or without Busy, there are no extra beats.
	Control func(inc string) string
	// Busy reports whether rooms are watched here: then a beat is published
	// every second, so that a deaf listener is found soon.
	Busy func() bool

	// OnRenew is told of every renewal that succeeded.
	OnRenew func(Renewed)
	// OnReborn is told that this server was declared dead, or Redis forgot it,
	// and now lives as another incarnation, already registered. stalled says
	// that the process itself stood still for longer than its lease.
	OnReborn func(old, new string, stalled bool)
	// OnBuried is told that the cleaning up after a dead incarnation has
	// ended, if this server buried it or ended any of its entries: entries says
	// how many. May be called by two goroutines at once.
	OnBuried func(inc string, entries int)
	// OnAway is told of every renewal and beat that failed: Redis may be away.
	OnAway func()
	// OnDeaf is told that a published beat was not heard within two seconds, or
	// within 0.3 s where Redis had nobody to pass it on to and had before: the
	// listener does not listen where it should, make it anew.
	OnDeaf func()

	// Logger defaults to none.
	Logger *slog.Logger
}

// Renewed describes one successful renewal.
type Renewed struct {
	Now       int64 // Redis time, unix ms
	Owned     int64 // entries and connections of this incarnation in bucket 0; -1: not known
	Recovered bool  // the renewal before it had failed
}

// Lease is one server's lease. Make it with New. All methods are safe for
// concurrent use.
type Lease struct {
	cfg      Config
	log      *limit.Log
	timeout  time.Duration // of one call
	patience *patience
	beats    *beats
	reaper   *reaper
	tally    tally

	current atomic.Pointer[string]
	fenced  atomic.Pointer[string] // an incarnation reported to Fenced
	look    atomic.Bool            // renew at the next opportunity
	wake    chan struct{}          // of capacity 1: fenced or look was set

	mu      sync.Mutex // guards the fields below
	started bool
	stopped bool
	cancel  context.CancelFunc // ends the loop; nil: never ran
	done    chan struct{}      // closed when loop and reapers have ended
}

// New makes a Lease that has not started.
func New(cfg Config) *Lease {
	if cfg.Buckets <= 0 {
		cfg.Buckets = 1
	}
	if cfg.NewIncarnation == nil {
		cfg.NewIncarnation = rand.Text
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Lease{
		cfg:      cfg,
		log:      limit.NewLog(cfg.Logger),
		timeout:  min(maxCall, cfg.TTL/3),
		patience: newPatience(cfg.TTL),
		beats:    newBeats(),
		wake:     make(chan struct{}, 1),
	}
	l.reaper = newReaper(l)
	none := ""
	l.current.Store(&none)
	return l
}

// Start registers a new incarnation and returns when Redis has answered. From
// then on the lease is renewed until Stop; ctx bounds Start alone. After an
// error Start may be called again.
func (l *Lease) Start(ctx context.Context) error {
	l.mu.Lock()
	if l.started || l.stopped {
		l.mu.Unlock()
		return ErrStarted
	}
	l.started = true
	l.mu.Unlock()

	inc := l.cfg.NewIncarnation()
	sent, err := l.register(ctx, inc)

	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.started = false
		return fmt.Errorf("mesh: register server: %w", err)
	}
	l.current.Store(&inc)
	if l.stopped { // Stop came in between; Resign still finds the incarnation
		return ErrStarted
	}
	// The lifetime of the loop begins here: ctx lends its values only.
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l.cancel, l.done = cancel, make(chan struct{})
	l.beats.quiet(time.Now())
	go newLoop(l, sent).run(run, l.done)
	return nil
}

// register registers an incarnation, takes the reading of the clock that comes
// with it, and returns when the call was sent.
func (l *Lease) register(ctx context.Context, inc string) (sent time.Time, err error) {
	cctx, cancel := l.bound(ctx)
	defer cancel()
	sent = time.Now()
	now, err := l.cfg.Store.Register(cctx, inc, l.cfg.TTL)
	if err != nil {
		return sent, err
	}
	l.patience.note(reading{sent: sent, got: time.Now(), redis: now})
	return sent, nil
}

// Stop ends the renewing and waits until everything that the lease started has
// ended, at most until ctx ends. It does not resign: the incarnation stays on
// the list until its lease runs out. Stop may be called repeatedly.
func (l *Lease) Stop(ctx context.Context) error {
	l.mu.Lock()
	l.stopped = true
	cancel, done := l.cancel, l.done
	l.mu.Unlock()
	if cancel == nil {
		return nil
	}
	cancel()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	select {
	case <-done: // both: what counts is that it has ended
		return nil
	default:
		return fmt.Errorf("mesh: stop lease: %w", ctx.Err())
	}
}

// Incarnation returns the current incarnation, "" before Start succeeded.
func (l *Lease) Incarnation() string { return *l.current.Load() }

// Judge reports whether this server may now end what belongs to others, and if
// so gives the proof for Bury and Reap. It costs no call to Redis.
func (l *Lease) Judge() (store.Judgment, bool) { return l.patience.judge(time.Now()) }

// Now returns Redis's clock in unix ms, extrapolated by the monotonic clock
// from what Redis answered last. It returns false if Redis never answered.
func (l *Lease) Now() (redisUnixMs int64, ok bool) { return l.patience.now(time.Now()) }

// Fenced reports that Redis refused to write for inc because it has been
// declared dead. If inc still is the current incarnation, a new one takes its
// place at once, and OnReborn tells. Fenced does not block.
func (l *Lease) Fenced(inc string) {
	if inc != l.Incarnation() {
		return
	}
	l.fenced.Store(&inc)
	l.rouse()
}

// Doubt says that there is reason to ask whether the lease still stands: it is
// renewed at once. Doubt does not block.
func (l *Lease) Doubt() { l.lookNow() }

// Suspend keeps this server from judging others until Trust: it has lost sight
// of Redis for a moment, and may find another one.
func (l *Lease) Suspend() {
	l.patience.suspend(true)
	l.beats.lost()
}

// Trust ends Suspend: it is known which Redis this is. Where it is another one
// than before, Distrust comes first.
func (l *Lease) Trust() { l.patience.suspend(false) }

// Distrust restarts patience, where the caller knows of a failover or a clock
// that stepped: nobody is judged for one TTL. It leaves Suspend as it is.
// Distrust does not block.
func (l *Lease) Distrust() {
	l.patience.restart()
	l.lookNow()
}

// Heard reports a message that arrived on the control channel of this server.
// What is not a beat is ignored.
func (l *Lease) Heard(beat string) { l.beats.heard(beat) }

// lookNow makes the loop renew at the next opportunity.
func (l *Lease) lookNow() {
	l.look.Store(true)
	l.rouse()
}

// rouse wakes the loop.
func (l *Lease) rouse() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// bound bounds one call to Redis.
func (l *Lease) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, l.timeout)
}

// ClockRefused handles an ErrClock for a call that took so long. A call that
// dawdled on its way is refused although no clock has stepped: the reading
// that is taken now will tell. Any other refusal restarts patience.
func (l *Lease) ClockRefused(took time.Duration) {
	if took <= l.patience.tolerance/2 && l.patience.stepped() {
		l.log.Warn("mesh: redis clock is not where it was expected, judging nobody for one lease")
	}
	l.lookNow()
}
