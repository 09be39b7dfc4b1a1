package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/limit"
)

const (
	// probeWithin is how long the event of a probe may take to arrive.
	probeWithin = 2 * time.Second
	// canaryTTL is the life of the key that a probe lets expire.
	canaryTTL = 50 * time.Millisecond
	// maxCanaries bounds the keys tried until one belongs to the node probed.
	maxCanaries = 128

	// How long until the next probe: of a node that works (its flag may be
	// taken away, a failover may leave the connection on the wrong node), of
	// one that sends nothing (somebody may change the setting), and of one
	// that does not answer.
	probeWorking = 30 * time.Second
	probeSilent  = 60 * time.Second
	probeUnknown = time.Second
)

// ExpiredState says whether expired events arrive.
type ExpiredState byte

// The states. Unknown: Redis could not be asked, or not yet.
const (
	ExpiredUnknown ExpiredState = iota
	ExpiredWorks
	ExpiredSilent
)

// ErrNoExpiredEvents says that a key expired and no event told of it.
var ErrNoExpiredEvents = errors.New("store: redis sends no expired events")

// errElsewhere says that the node owns no slot that a canary could be put in.
var errElsewhere = errors.New("store: node takes no writes")

// expiredWatch listens to the expired events of one node, and finds out
// whether they come.
type expiredWatch struct {
	client   redis.UniversalClient
	channel  string
	canary   func() string
	expired  func(key string)
	changed  func() // the verdict may be another
	failover func()
	node     string // address
	logger   *slog.Logger
	log      *limit.Log // of all nodes
	listener *Listener
	stop     context.CancelFunc
	wg       sync.WaitGroup
	missed   int // listings in a row that lacked the node; of who keeps the watches

	recheck chan struct{} // 1: probe now
	replica atomic.Bool   // takes no writes: cannot be probed
	losses  atomic.Uint64 // of the connection

	flagging, probing atomic.Bool // commands for that are under way

	// Only the goroutine of run touches these.
	setFlag bool  // the setting must be looked at
	flagErr error // why it could not be set
	retried bool  // a new connection was tried since the events fell silent

	mu      sync.Mutex // guards all below
	planted string     // the canary whose event is awaited
	heard   chan struct{}
	state   ExpiredState
	settled bool // the first check is over
	err     error
}

func newExpiredWatch(n node, cfg ExpiredConfig, changed func()) *expiredWatch {
	w := &expiredWatch{
		client: n.client, channel: ExpiredChannel(cfg.DB), canary: cfg.Canary, expired: cfg.Expired, changed: changed,
		failover: cfg.Failover,
		node:     n.addr, logger: cfg.Logger.With("node", n.addr), log: cfg.log, recheck: make(chan struct{}, 1), setFlag: true,
	}
	w.replica.Store(n.replica)
	w.listener = NewListener(ListenerConfig{
		Client: n.client, Handler: w, Logger: w.logger, Name: "expired events", Quiet: true,
	})
	return w
}

func (w *expiredWatch) start(life context.Context) {
	ctx, cancel := context.WithCancel(life)
	w.stop = cancel
	w.listener.Add(w.channel)
	w.listener.Start()
	w.wg.Go(func() { w.run(ctx) })
}

// close stops the watch and waits. Commands under way end with the client's
// own timeouts.
func (w *expiredWatch) close() {
	w.stop()
	w.listener.Stop()
	w.wg.Wait()
}

// setReplica notes on which side the node stands. A promoted replica is probed
// at once; its subscription stays as it is, so that nothing is missed.
func (w *expiredWatch) setReplica(replica bool) {
	if w.replica.Swap(replica) != replica {
		w.failover()
		poke(w.recheck)
	}
}

// verdict returns what is known; settled is false before the first check ended.
func (w *expiredWatch) verdict() (state ExpiredState, settled bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state, w.settled, w.err
}

func (w *expiredWatch) conclude(state ExpiredState, settled bool, err error) {
	w.mu.Lock()
	w.state, w.err = state, err
	w.settled = w.settled || settled
	w.mu.Unlock()
	w.changed()
}

// Message implements Handler: the payload is the key that expired.
func (w *expiredWatch) Message(_, key string) {
	w.mu.Lock()
	canary := key == w.planted && w.heard != nil
	if canary {
		close(w.heard)
		w.heard = nil
	}
	w.mu.Unlock()
	if canary {
		return
	}
	if w.replica.CompareAndSwap(true, false) { // one sends none: it has been promoted just now
		w.failover()
		poke(w.recheck)
	}
	w.expired(key)
}

// Subscribed implements Handler. A restart loses the setting, a failover leads
// to a node that may never have had it.
func (w *expiredWatch) Subscribed(_ string, again bool) {
	if again {
		poke(w.recheck)
	}
}

// Lost implements Handler.
func (w *expiredWatch) Lost() {
	w.losses.Add(1)
	if !w.replica.Load() {
		w.failover()
	}
	w.conclude(ExpiredUnknown, false, nil)
}

func (w *expiredWatch) run(ctx context.Context) {
	seen := w.losses.Load()
	for {
		next := w.check(ctx)
		t := time.NewTimer(next)
		select {
		case <-t.C:
		case <-w.recheck:
			t.Stop()
		case <-ctx.Done():
			t.Stop()
			return
		}
		if n := w.losses.Load(); n != seen {
			seen, w.setFlag = n, true
		}
	}
}

// check sets the flag if that is due, probes, draws its conclusion, and says
// after what time to check again.
func (w *expiredWatch) check(ctx context.Context) time.Duration {
	losses := w.losses.Load()
	state, err := w.look(ctx)
	switch {
	case ctx.Err() != nil:
		return probeUnknown
	case w.losses.Load() != losses:
		// The event may have come while nobody listened.
		poke(w.recheck)
		return probeUnknown
	case state == ExpiredSilent && !w.retried && w.works():
		// It worked until now: perhaps the connection is deaf, or stands at
		// a node that is no longer the master. The new one has it checked again.
		w.retried = true
		w.setFlag = true
		w.listener.Recreate()
		return probeUnknown
	}
	switch state {
	case ExpiredWorks:
		w.retried = false
		w.conclude(state, true, nil)
		return probeWorking
	case ExpiredSilent:
		w.setFlag = true
		if w.flagErr != nil {
			err = fmt.Errorf("%w (%w)", err, w.flagErr)
		}
		w.conclude(state, true, err)
		return probeSilent
	}
	w.logger.Debug("mesh: expired events could not be checked", "error", err)
	w.conclude(ExpiredUnknown, true, err)
	if err == nil || errors.Is(err, errElsewhere) { // a replica, or as good as one
		return probeSilent
	}
	return probeUnknown
}

func (w *expiredWatch) works() bool {
	state, _, _ := w.verdict()
	return state == ExpiredWorks
}

// look does the asking for check. A replica stays unknown, without an error.
func (w *expiredWatch) look(ctx context.Context) (ExpiredState, error) {
	ready, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	if err := w.listener.Ready(ready, w.channel); err != nil {
		if redis.IsPermissionError(err) {
			return ExpiredSilent, err // the ACL user may not subscribe
		}
		return ExpiredUnknown, err
	}
	if w.setFlag {
		w.flag(ctx)
	}
	if w.replica.Load() {
		return ExpiredUnknown, nil
	}
	return alone(ctx, probeWithin, &w.probing, func() (ExpiredState, error) { return w.probe(ctx) })
}

// flag has the node send expired events. Where that is forbidden it is not
// tried again before the next connection, or before a probe has failed.
func (w *expiredWatch) flag(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	set, err := alone(ctx, soon, &w.flagging, func() (set [2]string, err error) {
		set[0], set[1], err = EnableExpiredEvents(ctx, w.client)
		return set, err
	})
	before, after := set[0], set[1]
	w.flagErr = err
	w.setFlag = err != nil && !redisSaid(err)
	if err == nil && before != after {
		w.log.Info("mesh: redis was set to send expired events", "node", w.node, "setting", notifySetting, "before", before, "after", after)
	}
}

// probe lets a key expire and waits for the event.
func (w *expiredWatch) probe(ctx context.Context) (ExpiredState, error) {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	key, heard, err := w.plant(ctx)
	if err != nil {
		return ExpiredUnknown, err
	}
	defer w.unplant()
	// Redis tells of a dead key when it comes across it. Asking for it is
	// coming across it.
	touch := time.NewTicker(canaryTTL + canaryTTL/5)
	defer touch.Stop()
	gone := false
	for {
		select {
		case <-heard:
			return ExpiredWorks, nil
		case <-ctx.Done():
			if !gone {
				return ExpiredUnknown, fmt.Errorf("store: canary does not expire: %w", ctx.Err())
			}
			return ExpiredSilent, ErrNoExpiredEvents
		case <-touch.C:
			if gone {
				continue
			}
			n, err := w.client.Exists(ctx, key).Result()
			if err != nil {
				return ExpiredUnknown, fmt.Errorf("store: touch canary: %w", err)
			}
			gone = n == 0
		}
	}
}

// plant writes a canary to the node. In a cluster only some names are the
// node's; which, it says itself.
func (w *expiredWatch) plant(ctx context.Context) (key string, heard <-chan struct{}, err error) {
	for range maxCanaries {
		key, c := w.canary(), make(chan struct{})
		w.mu.Lock()
		w.planted, w.heard = key, c
		w.mu.Unlock()
		err := w.client.Set(ctx, key, "", canaryTTL).Err()
		if err == nil {
			return key, c, nil
		}
		if _, moved := redis.IsMovedError(err); !moved {
			w.unplant()
			return "", nil, fmt.Errorf("store: write canary: %w", err)
		}
	}
	w.unplant()
	return "", nil, errElsewhere
}

func (w *expiredWatch) unplant() {
	w.mu.Lock()
	w.planted, w.heard = "", nil
	w.mu.Unlock()
}

// redisSaid reports whether err is an answer of Redis, not of the way to it.
func redisSaid(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer)
}
