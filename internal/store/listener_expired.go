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
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// probeWithin is the time that the event of a probe has to arrive.
	probeWithin = 2 * time.Second
	// canaryTTL is the life of the key that a probe lets expire.
	canaryTTL = 50 * time.Millisecond
	// maxCanaries limits the keys tried until one belongs to the probed node.
	maxCanaries = 128

	// The time until the next probe of a node. A node that works may lose its setting,
	// or a failover may leave the connection on the wrong node. On a silent node an
	// operator may change the setting. A node in an unknown state did not answer.
	probeWorking = 30 * time.Second
	probeSilent  = 60 * time.Second
	probeUnknown = time.Second
)

// ExpiredState is the knowledge about whether expired events arrive.
type ExpiredState byte

// The states. ExpiredUnknown means that Redis was not asked yet or did not answer.
const (
	ExpiredUnknown ExpiredState = iota
	ExpiredWorks
	ExpiredSilent
)

// ErrNoExpiredEvents means that a key expired without an event.
var ErrNoExpiredEvents = errors.New("store: redis sends no expired events")

// errElsewhere means that the node owns no slot for a canary.
var errElsewhere = errors.New("store: node takes no writes")

// expiredWatch listens to the expired events of one node, and tests whether they
// arrive.
type expiredWatch struct {
	client   redis.UniversalClient
	channel  string
	canary   func() string
	expired  func(key string)
	changed  func() // called after each result
	failover func()
	node     string // address
	logger   *slog.Logger
	log      *limit.Log // shared by all nodes
	listener *Listener
	stop     context.CancelFunc
	wg       sync.WaitGroup
	missed   int // listings in a row that lacked the node; only ExpiredEvents.run uses it

	recheck     wait.Signal   // probe now
	replica     atomic.Bool   // takes no writes, so it cannot be probed
	disconnects atomic.Uint64 // of the connection

	flagging, probing atomic.Bool // such commands are under way

	// Only the goroutine of run uses these.
	setFlag bool  // the setting must be checked
	flagErr error // why it could not be set
	retried bool  // a new connection was tried since the events stopped

	mu        sync.Mutex // guards the fields below
	planted   string     // the canary whose event is awaited
	heard     chan struct{}
	state     ExpiredState
	concluded bool // the first check is over
	err       error
}

func newExpiredWatch(n redisNode, cfg ExpiredConfig, changed func()) *expiredWatch {
	w := &expiredWatch{
		client: n.client, channel: ExpiredChannel(cfg.DB), canary: cfg.Canary, expired: cfg.Expired, changed: changed,
		failover: cfg.Failover,
		node:     n.addr, logger: cfg.Logger.With("node", n.addr), log: cfg.log, recheck: wait.NewSignal(), setFlag: true,
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

// close stops the watch and waits for its goroutines. Commands under way end with the
// client's own timeouts.
func (w *expiredWatch) close() {
	w.stop()
	w.listener.Stop()
	w.wg.Wait()
}

// setReplica records the role of the node. A promoted replica is probed at once. Its
// subscription stays, so that no event is missed.
func (w *expiredWatch) setReplica(replica bool) {
	if w.replica.Swap(replica) != replica {
		w.failover()
		w.recheck.Set()
	}
}

// result returns the current knowledge. concluded is false before the end of the first
// check.
func (w *expiredWatch) result() (state ExpiredState, concluded bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state, w.concluded, w.err
}

func (w *expiredWatch) conclude(state ExpiredState, concluded bool, err error) {
	w.mu.Lock()
	w.state, w.err = state, err
	w.concluded = w.concluded || concluded
	w.mu.Unlock()
	w.changed()
}

// Message implements Handler. The payload is the key that expired.
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
	if w.replica.CompareAndSwap(true, false) { // replicas send no expired events, so it was promoted
		w.failover()
		w.recheck.Set()
	}
	w.expired(key)
}

// Subscribed implements Handler. A restart may lose the setting, and a failover may
// lead to a node that never had it.
func (w *expiredWatch) Subscribed(_ string, again bool) {
	if again {
		w.recheck.Set()
	}
}

// Disconnected implements Handler.
func (w *expiredWatch) Disconnected() {
	w.disconnects.Add(1)
	if !w.replica.Load() {
		w.failover()
	}
	w.conclude(ExpiredUnknown, false, nil)
}

func (w *expiredWatch) run(ctx context.Context) {
	seen := w.disconnects.Load()
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
		if n := w.disconnects.Load(); n != seen {
			seen, w.setFlag = n, true
		}
	}
}

// check sets the flag if necessary, probes, and records the result. It returns the time
// until the next check.
func (w *expiredWatch) check(ctx context.Context) time.Duration {
	disconnects := w.disconnects.Load()
	state, err := w.look(ctx)
	switch {
	case ctx.Err() != nil:
		return probeUnknown
	case w.disconnects.Load() != disconnects:
		// The event may have come while the connection was down.
		w.recheck.Set()
		return probeUnknown
	case state == ExpiredSilent && !w.retried && w.works():
		// The events arrived until now. The connection may be dead, or it may lead to a
		// node that is no longer the master. The new connection triggers another check.
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
	if err == nil || errors.Is(err, errElsewhere) { // a replica, or a master without slots
		return probeSilent
	}
	return probeUnknown
}

func (w *expiredWatch) works() bool {
	state, _, _ := w.result()
	return state == ExpiredWorks
}

// look sets the flag and probes, for check. A replica stays unknown, without an error.
func (w *expiredWatch) look(ctx context.Context) (ExpiredState, error) {
	ready, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	if err := w.listener.Ready(ready, w.channel); err != nil {
		if redis.IsPermissionError(err) {
			return ExpiredSilent, err // the ACL forbids the user to subscribe
		}
		return ExpiredUnknown, err
	}
	if w.setFlag {
		w.flag(ctx)
	}
	if w.replica.Load() {
		return ExpiredUnknown, nil
	}
	return exclusive(ctx, probeWithin, &w.probing, func() (ExpiredState, error) { return w.probe(ctx) })
}

// flag makes the node send expired events. If Redis forbids it, flag does not try again
// before the next connection or the next failed probe.
func (w *expiredWatch) flag(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	set, err := exclusive(ctx, shortGrace, &w.flagging, func() (set [2]string, err error) {
		set[0], set[1], err = EnableExpiredEvents(ctx, w.client)
		return set, err
	})
	before, after := set[0], set[1]
	w.flagErr = err
	w.setFlag = err != nil && !isRedisError(err)
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
	// Redis may notice only on access that a key has expired. EXISTS is such an access.
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

// plant writes a canary to the node. In a cluster only some names belong to the node,
// and the node's answer shows which.
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

// isRedisError reports whether err is an answer of Redis and not a failure on the way.
func isRedisError(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer)
}
