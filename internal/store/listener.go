package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/limit"
)

const (
	// maxNames is how many channels one SUBSCRIBE names.
	maxNames = 512
	// confirmWithin is how long Redis may take to confirm a SUBSCRIBE or
	// UNSUBSCRIBE before the connection counts as broken.
	confirmWithin = 5 * time.Second
	// steadyAfter is how long a connection must have lasted for its loss to
	// be followed by a quick reconnect.
	steadyAfter = 5 * time.Second
	// firstPause and longestPause bound the pause before a reconnect.
	firstPause   = 20 * time.Millisecond
	longestPause = time.Second
)

// Errors of a Listener.
var (
	// ErrStopped says that the listener was stopped.
	ErrStopped = errors.New("store: listener is stopped")
	// ErrNotWanted says that Ready was asked for a channel that was never
	// added, or was removed meanwhile.
	ErrNotWanted = errors.New("store: channel is not subscribed to")

	errUnconfirmed = errors.New("store: redis does not confirm a subscription")
	errRecreate    = errors.New("store: a new connection was asked for")
)

// Handler hears what a Listener receives. All calls for one Listener come from
// one goroutine, one after the other, in the order in which Redis sent what
// they tell of. They must not block: while one runs nothing is read from Redis.
type Handler interface {
	// Message is one message of a channel that is subscribed to. It comes
	// only after Subscribed told of the channel on the present connection.
	Message(channel, payload string)
	// Subscribed says that Redis has confirmed the subscription to channel,
	// so that nothing published from now on is missed. It is called once for
	// each Add with again false, and with again true for each confirmation
	// after that: then messages may have been missed before it.
	Subscribed(channel string, again bool)
	// Lost says that the connection broke, or was given up: messages may be
	// missed until Subscribed comes again. It is not called for attempts to
	// connect that failed.
	Lost()
}

// ListenerConfig configures a Listener.
type ListenerConfig struct {
	// Client is where the connection comes from. It stays the caller's to close.
	Client redis.UniversalClient
	// Handler hears everything.
	Handler Handler
	// Patterns are subscribed to (PSUBSCRIBE) from start to stop; Subscribed
	// and Ready know them by the pattern, Message by the channel.
	Patterns []string
	// Logger is told of lost connections. Nil: nobody is.
	Logger *slog.Logger
	// Name tells listeners apart in the log.
	Name string
	// Quiet logs lost connections at Debug only, for a listener whose loss is
	// reported elsewhere.
	Quiet bool
}

// Listener keeps one pub/sub connection and the channels that are wanted on
// it. It connects when the first channel is wanted, and again whenever the
// connection breaks; each new connection is a new PubSub, so that the
// confirmations on it can be told from those of the one before.
//
// All methods are safe for concurrent use. Only Ready and Stop block. Stop
// must not be called from the Handler.
type Listener struct {
	cfg  ListenerConfig
	subs subscriptions

	life   context.Context
	cancel context.CancelFunc
	wake   chan struct{} // 1: there may be something to send
	renew  chan struct{} // 1: Recreate was called
	start  sync.Once
	wg     sync.WaitGroup
	log    *limit.Log

	// Only the goroutine of run touches these.
	broken bool // a loss was logged, and no recovery since
}

// NewListener returns a listener that is not started yet. Channels may be
// added before Start.
func NewListener(cfg ListenerConfig) *Listener {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Listener{cfg: cfg, log: limit.NewLog(cfg.Logger), wake: make(chan struct{}, 1), renew: make(chan struct{}, 1)}
	l.life, l.cancel = context.WithCancel(context.Background())
	l.subs.init(cfg.Patterns)
	return l
}

// Start begins listening. Calls after the first do nothing.
func (l *Listener) Start() {
	l.start.Do(func() { l.wg.Go(l.run) })
}

// Stop closes the connection and waits until no Handler call can come any
// more. While Redis is away it may take as long as the client's own dial and
// read timeouts. A stopped listener cannot be started again.
func (l *Listener) Stop() {
	l.start.Do(func() {}) // from now on Start does nothing
	l.cancel()
	l.wg.Wait()
}

// Add subscribes to channels. It returns at once: Subscribed or Ready tell
// when Redis has confirmed. A channel that is wanted already stays as it is.
// One that was removed is confirmed anew, even if it is added before the
// removal reached Redis.
func (l *Listener) Add(channels ...string) {
	l.subs.add(channels)
	poke(l.wake)
}

// Remove ends the subscription to channels. It returns at once; a Handler
// call that is under way may still tell of them.
func (l *Listener) Remove(channels ...string) {
	l.subs.remove(channels)
	poke(l.wake)
}

// Recreate gives the connection up and makes a new one: the way out of one
// that looks alive and is deaf. It returns at once.
func (l *Listener) Recreate() { poke(l.renew) }

// Ready waits until Redis has confirmed each of channels on the present
// connection, and returns nil; or ErrNotWanted, ErrStopped, or ctx's error
// together with the reason why the connection last failed.
func (l *Listener) Ready(ctx context.Context, channels ...string) error {
	for _, c := range channels {
		for {
			wait, err := l.subs.waiting(c)
			if err != nil {
				return fmt.Errorf("%w: %q", err, c)
			}
			if wait == nil {
				break
			}
			select {
			case <-wait:
			case <-l.life.Done():
				return ErrStopped
			case <-ctx.Done():
				return fmt.Errorf("store: subscription not confirmed: %w", errors.Join(ctx.Err(), l.subs.failure()))
			}
		}
	}
	return nil
}

// run makes one connection after the other until the listener is stopped.
func (l *Listener) run() {
	for fails := 0; l.awaitWanted(); {
		began := time.Now()
		up, err := l.session(l.life)
		l.subs.reset(err)
		if l.life.Err() != nil {
			return
		}
		if up {
			l.cfg.Handler.Lost()
		}
		reload(l.cfg.Client)
		if up && time.Since(began) >= steadyAfter {
			fails = 0
		}
		l.complain(up, err)
		if !sleep(l.life, pause(fails)) {
			return
		}
		fails++
	}
}

// awaitWanted waits until there is something to subscribe to, so that a
// listener without channels holds no connection open. False: stopped.
func (l *Listener) awaitWanted() bool {
	for !l.subs.anyWanted() {
		select {
		case <-l.wake:
		case <-l.life.Done():
			return false
		}
	}
	return l.life.Err() == nil
}

// complain logs the end of a connection: what follows a loss that was logged at
// Debug only.
func (l *Listener) complain(up bool, err error) {
	if l.cfg.Quiet || l.broken && !up {
		l.cfg.Logger.Debug("mesh: subscriptions still without connection", "listener", l.cfg.Name, "error", err)
		return
	}
	if l.log.Warn("mesh: subscription connection lost, reconnecting", "listener", l.cfg.Name, "error", err) {
		l.broken = true
	}
}

// recovered logs the first confirmation after a loss that was logged: it comes
// no more often than that.
func (l *Listener) recovered() {
	if l.broken {
		l.broken = false
		l.cfg.Logger.Info("mesh: subscription connection restored", "listener", l.cfg.Name)
	}
}

// pause is how long to wait after the given number of failures in a row:
// twice as long each time, and a random half of it off, so that the servers of
// one Redis do not all come back at the same moment.
func pause(fails int) time.Duration {
	d := longestPause
	if fails < 7 {
		d = min(d, firstPause<<fails)
	}
	return d/2 + rand.N(d/2)
}

// sleep waits for d. False: ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// poke puts a token into a channel of capacity 1 unless there is one.
func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
