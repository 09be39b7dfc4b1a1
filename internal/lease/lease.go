// Package lease keeps the lease of one server in Redis. It renews the lease, gives the
// server a new incarnation after the old one was declared dead or lost, declares other
// servers dead after their lease has run out, and cleans up after them.
//
// Two rules hold everywhere. A server is dead from the moment at which a script moved its
// incarnation from the list of live servers to the list of dead ones, and no earlier. And
// only a server in contact may declare others dead: for one TTL its own renewals all
// succeeded, and the clock of Redis and its own monotonic clock agreed. An outage, a
// failover or a clock step hits all servers alike, so no server is declared dead because of one.
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
	"github.com/meshpresence/mesh/internal/wait"
)

var (
	// ErrStarted says that Start was called a second time, or after Stop.
	ErrStarted = errors.New("mesh: lease was started before")
	// ErrRunning says that Resign was called before Stop had finished.
	ErrRunning = errors.New("mesh: lease is still being renewed")
)

// maxCall bounds every call to Redis. With a short TTL the bound is a third of the TTL.
const maxCall = 2 * time.Second

// Store is the part of *store.Store that the lease uses. Every call may be repeated, and
// returns when its context ends.
type Store interface {
	Register(ctx context.Context, inc string, ttl time.Duration) (nowMs int64, err error)
	Renew(ctx context.Context, inc string, ttl time.Duration, echo string, wantDead bool) (store.Renewal, error)
	DeclareDeadIfExpired(ctx context.Context, j store.ClockProof, inc string) (bool, error)
	DeclareDead(ctx context.Context, inc string) error
	RemoveDead(ctx context.Context, inc string) error
	Fence(ctx context.Context, bucket int, inc string) error
	OwnedPage(ctx context.Context, bucket int, inc string, cursor uint64) (refs []store.EntryRef, next uint64, err error)
	OwnedSize(ctx context.Context, bucket int, inc string) (int64, error)
	CleanUp(ctx context.Context, j store.ClockProof, items []store.CleanUpItem) ([]store.CleanUpStatus, error)
	ForgetConnections(ctx context.Context, bucket int, inc string, conns []string) error
	Publish(ctx context.Context, channel, payload string) (heard int64, err error)
}

// Config configures a Lease. The callbacks run on the goroutine that renews the lease,
// unless said otherwise, so they must not block and must not call Stop.
type Config struct {
	// Store is required.
	Store Store
	// TTL is the lifetime of a lease without a renewal. It is required; less than a
	// second makes no sense.
	TTL time.Duration
	// Buckets is the number of buckets. Defaults to 1.
	Buckets int
	// NewIncarnation makes a random id without ':' and space. Defaults to 26 characters
	// of base32.
	NewIncarnation func() string
	// Channel returns the server channel of an incarnation, on which echoes are
	// published. Without it, or without Watching, only renewals publish an echo.
	Channel func(inc string) string
	// Watching reports whether rooms are watched here. If so, an echo is published every
	// second, so that a broken listener is found soon.
	Watching func() bool

	// OnRenew is called after each successful renewal.
	OnRenew func(Renewed)
	// OnReregistered is called after this server was declared dead or lost from Redis,
	// and has registered a new incarnation. stalled reports whether the process did not
	// run for longer than its lease.
	OnReregistered func(oldInc, newInc string, stalled bool)
	// OnAway is called after each failed renewal or echo. Redis may be away.
	OnAway func()
	// OnNoEcho is called if an echo did not come back in time: within two seconds, or
	// within 0.3 s if Redis counted no receiver although it had counted one before. The
	// listener has to be reset.
	OnNoEcho func()
	// Kept is called for each entry of a dead server whose place is kept, with the time
	// until which it is kept (Redis time, unix ms). Goroutines of the cleanup call it. It
	// must not block.
	Kept func(room, conn, entry string, until int64)

	// Logger defaults to none.
	Logger *slog.Logger
}

// Renewed describes one successful renewal.
type Renewed struct {
	Now       int64 // unix ms of the clock of Redis
	Owned     int64 // entries and connections of this incarnation in bucket 0; -1: unknown
	Recovered bool  // the renewal before this one failed
}

// Lease is the lease of one server. All methods are safe for concurrent use.
type Lease struct {
	cfg      Config
	log      *limit.Log
	timeout  time.Duration // of one call
	contact  *contact
	echoes   *echoes
	cleaner  *cleaner
	counters counters

	current   atomic.Pointer[string]
	fenced    atomic.Pointer[string] // an incarnation reported to Fenced
	renewSoon atomic.Bool            // renew at the next opportunity
	wake      wait.Signal            // set with fenced and renewSoon

	mu      sync.Mutex // guards the fields below
	started bool
	stopped bool
	cancel  context.CancelFunc // ends the loop; nil: the loop never ran
	done    chan struct{}      // closed when the loop and the cleaner have ended
}

// New returns a Lease that has not started.
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
		cfg:     cfg,
		log:     limit.NewLog(cfg.Logger),
		timeout: min(maxCall, cfg.TTL/3),
		contact: newContact(cfg.TTL),
		echoes:  newEchoes(),
		wake:    wait.NewSignal(),
	}
	l.cleaner = newCleaner(l)
	none := ""
	l.current.Store(&none)
	return l
}

// Start registers a new incarnation and returns after the answer of Redis. The lease is
// renewed from then on until Stop. ctx bounds only Start itself. After an error Start may
// be called again.
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
	// The lifetime of the loop begins here. It takes only the values of ctx.
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l.cancel, l.done = cancel, make(chan struct{})
	l.echoes.expectNone(time.Now())
	go newLoop(l, sent).run(run, l.done)
	return nil
}

// register registers an incarnation and notes the clock of Redis in the answer. It
// returns the time at which it sent the call.
func (l *Lease) register(ctx context.Context, inc string) (sent time.Time, err error) {
	cctx, cancel := l.bound(ctx)
	defer cancel()
	sent = time.Now()
	now, err := l.cfg.Store.Register(cctx, inc, l.cfg.TTL)
	if err != nil {
		return sent, err
	}
	l.contact.note(reading{sent: sent, got: time.Now(), redis: now})
	return sent, nil
}

// Stop ends the renewals and waits until everything that the lease started has ended, or
// until ctx ends. It does not resign: the incarnation stays on the list of live servers
// until its lease runs out. Stop may be called repeatedly.
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
	case <-done: // it has ended too
		return nil
	default:
		return fmt.Errorf("mesh: stop lease: %w", ctx.Err())
	}
}

// Incarnation returns the current incarnation, or "" before Start succeeded.
func (l *Lease) Incarnation() string { return *l.current.Load() }

// ClockProof reports whether this server is in contact. If so, it returns the clock proof
// for DeclareDeadIfExpired and CleanUp. It makes no call to Redis.
func (l *Lease) ClockProof() (store.ClockProof, bool) { return l.contact.proof(time.Now()) }

// Now returns the clock of Redis in unix ms, extrapolated with the monotonic clock from
// its last answer. It returns false if Redis never answered.
func (l *Lease) Now() (redisUnixMs int64, ok bool) { return l.contact.now(time.Now()) }

// quietFor is the time without a failed call after which a kept place may end.
const quietFor = time.Second

// MayEnd reports whether this server may end a kept place whose deadline (Redis time,
// unix ms) is over. w is the outcome of its writes in the bucket of the place. A write
// must have succeeded that began after the deadline, and no call may have failed for
// quietFor. Otherwise an outage may have kept the user from coming back in time, and the
// user's join, which is tried again all the time, comes first. MayEnd makes no call to
// Redis.
func (l *Lease) MayEnd(w store.Writes, deadline int64) bool {
	past, ok := l.contact.past(deadline)
	return ok && !w.Since.IsZero() && !w.Last.Before(past) && time.Since(w.Failed) >= quietFor
}

// Fenced reports that Redis refused a write of inc because inc was declared dead. If inc
// is still the current incarnation, the server reregisters at once. Fenced does not
// block.
func (l *Lease) Fenced(inc string) {
	if inc != l.Incarnation() {
		return
	}
	l.fenced.Store(&inc)
	l.wake.Set()
}

// RenewNow renews the lease as soon as possible, to learn whether it still exists. It
// does not block.
func (l *Lease) RenewNow() {
	l.renewSoon.Store(true)
	l.wake.Set()
}

// Suspend ends the contact of this server until Resume. The server has lost its
// connection to Redis for a moment and may find another Redis.
func (l *Lease) Suspend() {
	l.contact.suspend(true)
	l.echoes.disconnected()
}

// Resume ends Suspend, after the server has learned which Redis it talks to. If it is
// another one than before, call ResetContact first.
func (l *Lease) Resume() { l.contact.suspend(false) }

// ResetContact restarts the wait for contact after a failover or a clock step. The server
// declares no other dead for one TTL. Suspend stays in force. ResetContact does not
// block.
func (l *Lease) ResetContact() {
	l.contact.restart()
	l.RenewNow()
}

// EchoReceived takes a message from the server channel. Messages other than echoes are
// ignored.
func (l *Lease) EchoReceived(echo string) { l.echoes.heard(echo) }

// bound returns a context for one call to Redis.
func (l *Lease) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, l.timeout)
}

// ClockRefused handles store.ErrClock from a call that took so long. A slow call is
// refused although no clock has stepped; the renewal that follows tells. Any other
// refusal ends the contact.
func (l *Lease) ClockRefused(took time.Duration) {
	if took <= l.contact.tolerance/2 && l.contact.clockStepped() {
		l.log.Warn("mesh: redis clock is not where it was expected, not declaring servers dead for one LeaseTTL")
	}
	l.RenewNow()
}
