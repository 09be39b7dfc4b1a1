package store

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/limit"
)

const (
	// scanEvery is how often the nodes of a cluster are listed: two commands.
	// The cluster client itself looks once a minute.
	scanEvery = 2 * time.Second
	// scanWithin bounds one listing.
	scanWithin = 2 * time.Second
	// freshFor is how long a listing will do for who calls Look: what is told
	// of a node that is not known to be a master yet tells of it, too.
	freshFor = 250 * time.Millisecond
	// missedScans is how many listings in a row, scanEvery apart, a node must
	// be missing from before it is given up: each asks another node, and one
	// may be behind.
	missedScans = 3
)

// ExpiredConfig configures ExpiredEvents. All fields but Logger are needed.
type ExpiredConfig struct {
	// Client leads to the node, or to all nodes of a cluster. It stays the
	// caller's to close.
	Client redis.UniversalClient
	// DB is the number of the database.
	DB int
	// Canary mints the name of a key that nobody else uses. On a cluster
	// names must fall into all slots.
	Canary func() string
	// Expired hears each key that expired; on a cluster from one goroutine
	// per node. It must not block.
	Expired func(key string)
	// Changed hears, from one goroutine and in order, whenever the state of
	// the whole changes; err says why it is silent.
	Changed func(state ExpiredState, err error)
	// Failover hears, on a cluster, that a master may have been away, or may
	// be another one now: what expired there may have done so because nobody
	// could refresh it. It may be called by several goroutines and must not
	// block. Nil: nobody hears of it.
	Failover func()
	// Logger hears what is not said through Changed. Nil: nobody does.
	Logger *slog.Logger

	log *limit.Log // on Logger, for all nodes
}

// ExpiredEvents listens to the expired events of every node behind a client,
// and knows whether they arrive: each node is made to send them where that is
// allowed, and is asked from time to time by a key that is left to expire.
// Nothing that is correct may rest on them; see the package's callers.
type ExpiredEvents struct {
	cfg     ExpiredConfig
	changed chan struct{} // 1: a verdict may be another
	renew   chan struct{} // 1: Recreate was called
	looks   chan chan error
	settled chan struct{} // closed when every node was checked once
	once    sync.Once
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu    sync.Mutex // guards state
	state ExpiredState

	listing atomic.Bool // the nodes are being listed

	// Only the goroutine of run touches these.
	cluster bool
	watches map[string]*expiredWatch // by address
	told    ExpiredState             // what Changed heard last
	listed  time.Time                // when the nodes were last listed; zero: never
}

// NewExpiredEvents returns a listener that is not started yet.
func NewExpiredEvents(cfg ExpiredConfig) *ExpiredEvents {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.log = limit.NewLog(cfg.Logger)
	_, cluster := cfg.Client.(clusterNodes)
	if cfg.Failover == nil || !cluster {
		cfg.Failover = func() {}
	}
	return &ExpiredEvents{
		cfg: cfg, cluster: cluster,
		changed: make(chan struct{}, 1), renew: make(chan struct{}, 1), looks: make(chan chan error),
		settled: make(chan struct{}),
		watches: make(map[string]*expiredWatch),
	}
}

// Start begins listening and returns at once. Calls after the first, and after
// Stop, do nothing.
func (e *ExpiredEvents) Start() {
	e.once.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		e.stop = cancel
		e.wg.Go(func() { e.run(ctx) })
	})
}

// Stop ends listening and waits until nothing is called any more. While Redis
// is away it may take as long as the client's own timeouts.
func (e *ExpiredEvents) Stop() {
	e.once.Do(func() { e.stop = func() {} })
	e.stop()
	e.wg.Wait()
}

// Recreate gives the connection up and makes a new one, and has the setting and
// the events checked on it: the client may lead to another Redis by now. On a
// cluster, where each node is listened to by itself, it does nothing.
func (e *ExpiredEvents) Recreate() { poke(e.renew) }

// Settled is closed when every node was checked once.
func (e *ExpiredEvents) Settled() <-chan struct{} { return e.settled }

// State returns whether events arrive: they work if they do from every master.
func (e *ExpiredEvents) State() ExpiredState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// run keeps one watch per node, and adds up their verdicts.
func (e *ExpiredEvents) run(ctx context.Context) {
	defer e.closeAll()
	var rescan <-chan time.Time
	if e.cluster {
		t := time.NewTicker(scanEvery)
		defer t.Stop()
		rescan = t.C
	}
	_ = e.scan(ctx, true)
	for {
		select {
		case <-e.changed:
			e.sum()
		case <-e.renew:
			if w := e.watches[""]; w != nil { // without a cluster
				w.listener.Recreate()
			}
		case <-rescan:
			_ = e.scan(ctx, true) // it will be tried again
			e.sum()
		case done := <-e.looks:
			if !e.listed.IsZero() && time.Since(e.listed) < freshFor {
				done <- nil
				continue
			}
			done <- e.scan(ctx, false)
			e.sum()
		case <-ctx.Done():
			return
		}
	}
}

// Look finds out which nodes of a cluster are masters, unless that was done just
// now: where it returns nil, Failover has been called for each failover that
// there was to see.
func (e *ExpiredEvents) Look(ctx context.Context) error {
	if !e.cluster {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*scanWithin)
	defer cancel()
	done := make(chan error, 1)
	select {
	case e.looks <- done:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// scan brings the watches in line with the nodes there are. If they cannot be
// listed, the watches stay; regular says that a node which is missing has been
// so for scanEvery longer.
func (e *ExpiredEvents) scan(ctx context.Context, regular bool) error {
	asked := time.Now()
	listing, cancel := context.WithTimeout(ctx, scanWithin)
	defer cancel()
	nodes, err := alone(listing, soon, &e.listing, func() ([]node, error) { return listNodes(listing, e.cfg.Client) })
	if err != nil {
		e.cfg.Logger.Debug("mesh: cluster nodes could not be listed", "error", err)
		return err
	}
	first := e.listed.IsZero()
	e.listed = asked
	if regular {
		for _, w := range e.watches {
			w.missed++
		}
	}
	for _, n := range nodes {
		w := e.watches[n.addr]
		if w != nil && w.client == n.client {
			w.missed = 0
			w.setReplica(n.replica)
			continue
		}
		if w != nil { // it left and came back: its old client is closed
			w.close()
		}
		w = newExpiredWatch(n, e.cfg, func() { poke(e.changed) })
		e.watches[n.addr] = w
		w.start(ctx)
		if !first && !n.replica { // nobody listened to it until now
			e.cfg.Failover()
		}
	}
	for addr, w := range e.watches {
		if w.missed >= missedScans {
			w.close()
			delete(e.watches, addr)
		}
	}
	return nil
}

// sum adds up the verdicts of the masters: one that is silent makes the whole
// silent, one that is unknown leaves it unknown.
func (e *ExpiredEvents) sum() {
	total, masters, settled := ExpiredWorks, 0, true
	var errs []error
	for _, w := range e.watches {
		state, done, err := w.verdict()
		settled = settled && done
		if w.replica.Load() {
			continue
		}
		masters++
		switch {
		case state == ExpiredSilent:
			total = ExpiredSilent
			errs = append(errs, err)
		case state == ExpiredUnknown && total == ExpiredWorks && !errors.Is(err, errElsewhere):
			total = ExpiredUnknown
		}
	}
	if masters == 0 {
		total = ExpiredUnknown
	}
	e.mu.Lock()
	e.state = total
	e.mu.Unlock()
	if total != e.told {
		e.told = total
		e.cfg.Changed(total, errors.Join(errs...))
	}
	if settled && len(e.watches) > 0 {
		select {
		case <-e.settled:
		default:
			close(e.settled)
		}
	}
}

// closeAll stops every watch, all at a time: each may have to wait for Redis.
func (e *ExpiredEvents) closeAll() {
	var wg sync.WaitGroup
	for _, w := range e.watches {
		wg.Go(w.close)
	}
	wg.Wait()
}
