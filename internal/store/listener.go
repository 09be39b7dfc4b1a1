package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// maxNames limits the channels of one SUBSCRIBE command.
	maxNames = 512
	// confirmWithin is the time that Redis has to confirm a SUBSCRIBE or UNSUBSCRIBE.
	// After that the connection counts as broken.
	confirmWithin = 5 * time.Second
	// steadyAfter is how long a connection must have lasted for a quick reconnect after
	// its end.
	steadyAfter = 5 * time.Second
)

// reconnectPause is the pause before a reconnect. A random half of it is left out.
var reconnectPause = wait.Backoff{First: 20 * time.Millisecond, Last: time.Second}

// Errors of a Listener.
var (
	// ErrStopped means that the listener was stopped.
	ErrStopped = errors.New("store: listener is stopped")
	// ErrNotWanted means that Ready was called for a channel that was never added, or
	// that was removed in the meantime.
	ErrNotWanted = errors.New("store: channel is not subscribed to")

	errUnconfirmed = errors.New("store: redis does not confirm a subscription")
	errRecreate    = errors.New("store: a new connection was asked for")
)

// Handler receives the messages and events of a Listener. All calls for one Listener
// come from one goroutine, in the order in which Redis sent the messages. The methods
// must not block: while one runs, nothing is read from Redis.
type Handler interface {
	// Message is called for a message on a subscribed channel. On each connection it
	// comes only after Subscribed for that channel.
	Message(channel, payload string)
	// Subscribed is called when Redis has confirmed the subscription to channel.
	// Messages published after that are not missed. again is false for the first
	// confirmation after each Add, and true for every later one. If it is true, earlier
	// messages may have been missed.
	Subscribed(channel string, again bool)
	// Disconnected is called when the connection broke or was closed by Recreate.
	// Messages may be missed until Subscribed is called again. It is not called for
	// attempts to connect that failed.
	Disconnected()
}

// ListenerConfig configures a Listener.
type ListenerConfig struct {
	// Client makes the connection. The listener never closes it.
	Client redis.UniversalClient
	// Handler receives all messages and events.
	Handler Handler
	// Patterns are subscribed to (PSUBSCRIBE) from start to stop. Subscribed and Ready
	// use the pattern as the name, Message uses the channel.
	Patterns []string
	// Logger logs lost connections. Nil discards the log.
	Logger *slog.Logger
	// Name identifies the listener in the log.
	Name string
	// Quiet logs lost connections at Debug level only. It is for a listener whose
	// losses are reported elsewhere.
	Quiet bool
}

// Listener keeps one pub/sub connection and the channels that are wanted on it. It
// connects when the first channel is wanted, and again whenever the connection breaks.
// Each connection is a new PubSub, so that its confirmations cannot be mistaken for
// those of the one before.
//
// All methods are safe for concurrent use. Only Ready and Stop block. Stop must not be
// called from the Handler.
type Listener struct {
	cfg  ListenerConfig
	subs channelSubs

	life   context.Context
	cancel context.CancelFunc
	wake   wait.Signal // a command may have to be sent
	renew  wait.Signal // Recreate was called
	start  sync.Once
	wg     sync.WaitGroup
	log    *limit.Log

	// Only the goroutine of run uses broken: a loss was logged, and no recovery since.
	broken bool // a loss was logged, and no recovery since
}

// NewListener returns a listener that is not started yet. Channels may be added before
// Start.
func NewListener(cfg ListenerConfig) *Listener {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &Listener{cfg: cfg, log: limit.NewLog(cfg.Logger), wake: wait.NewSignal(), renew: wait.NewSignal()}
	l.life, l.cancel = context.WithCancel(context.Background())
	l.subs.init(cfg.Patterns)
	return l
}

// Start begins listening. Calls after the first do nothing.
func (l *Listener) Start() {
	l.start.Do(func() { l.wg.Go(l.run) })
}

// Stop closes the connection and waits until no Handler call can come any more. If
// Redis does not answer, it may take as long as the client's own dial and read
// timeouts. A stopped listener cannot be started again.
func (l *Listener) Stop() {
	l.start.Do(func() {}) // from now on Start does nothing
	l.cancel()
	l.wg.Wait()
}

// Add subscribes to channels. It returns at once; Subscribed is called and Ready
// returns when Redis has confirmed. Add has no effect on a channel that is wanted
// already. A channel that was removed before gets a new confirmation, even if it is
// added again before the removal reached Redis.
func (l *Listener) Add(channels ...string) {
	l.subs.add(channels)
	l.wake.Set()
}

// Remove ends the subscription to channels. It returns at once. Handler calls that are
// under way may still be about them.
func (l *Listener) Remove(channels ...string) {
	l.subs.remove(channels)
	l.wake.Set()
}

// Recreate closes the connection and makes a new one. It is for a connection that looks
// alive but delivers nothing. It returns at once.
func (l *Listener) Recreate() { l.renew.Set() }

// Ready waits until Redis has confirmed each of channels on the current connection, and
// then returns nil. It fails with ErrNotWanted, with ErrStopped, or with ctx's error
// together with the reason for the last connection failure.
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
			l.cfg.Handler.Disconnected()
		}
		reload(l.cfg.Client)
		if up && time.Since(began) >= steadyAfter {
			fails = 0
		}
		l.logLoss(up, err)
		fails++
		if wait.For(l.life, wait.Jitter(reconnectPause.After(fails), 0.5)) != nil {
			return
		}
	}
}

// awaitWanted waits until a channel is wanted, so that a listener without channels
// holds no connection open. It returns false if the listener was stopped.
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

// logLoss logs the end of a connection. After a loss that was logged, failed attempts
// are logged at Debug level only.
func (l *Listener) logLoss(up bool, err error) {
	if l.cfg.Quiet || l.broken && !up {
		l.cfg.Logger.Debug("mesh: subscriptions still without connection", "listener", l.cfg.Name, "error", err)
		return
	}
	if l.log.Warn("mesh: subscription connection lost, reconnecting", "listener", l.cfg.Name, "error", err) {
		l.broken = true
	}
}

// logRecovery logs the first confirmation after a loss that was logged, so it is as rare
// as that.
func (l *Listener) logRecovery() {
	if l.broken {
		l.broken = false
		l.cfg.Logger.Info("mesh: subscription connection restored", "listener", l.cfg.Name)
	}
}
