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
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// scanEvery is the interval between listings of the nodes of a cluster. A listing
	// costs two commands. The cluster client itself refreshes once a minute.
	scanEvery = 2 * time.Second
	// scanWithin limits the time of one listing.
	scanWithin = 2 * time.Second
	// freshFor is the age up to which Look accepts the last listing. An expired event
	// of a node that is not known to be a master yet shows its promotion anyway.
	freshFor = 250 * time.Millisecond
	// missedScans is the number of listings in a row, scanEvery apart, that must lack a
	// node before it is given up. Each listing asks another node, and one may be
	// behind.
	missedScans = 3
)

// ExpiredConfig configures ExpiredEvents. All fields except Failover and Logger are
// required.
type ExpiredConfig struct {
	// Client leads to the node, or to all nodes of a cluster. ExpiredEvents never
	// closes it.
	Client redis.UniversalClient
	// DB is the number of the database.
	DB int
	// Canary returns the name of a key that nothing else uses. On a cluster the names
	// must cover all slots.
	Canary func() string
	// Expired is called with each key that expired, on a cluster from one goroutine per
	// node. It must not block.
	Expired func(key string)
	// Changed is called, from one goroutine and in order, whenever the overall state
	// changes. err is the reason for ExpiredSilent.
	Changed func(state ExpiredState, err error)
	// Failover is called, on a cluster, if a master may have been away or may have been
	// replaced. Keys may have expired there only because no server could refresh them.
	// Failover may be called by several goroutines and must not block.
	Failover func()
	// Logger logs everything that is not reported through Changed. Nil discards the
	// log.
	Logger *slog.Logger

	log *limit.Log // writes to Logger, shared by all nodes
}

// ExpiredEvents listens to the expired events of every node behind a client, and tests
// whether they arrive. It makes each node send them if that is allowed, and probes each
// node from time to time with a key that expires. Correctness must not depend on these
// events.
type ExpiredEvents struct {
	cfg     ExpiredConfig
	changed wait.Signal // a result may differ
	renew   wait.Signal // Recreate was called
	looks   chan chan error
	known   chan struct{} // closed when every node was checked once
	once    sync.Once
	stop    context.CancelFunc
	wg      sync.WaitGroup

	mu    sync.Mutex // guards state
	state ExpiredState

	listing atomic.Bool // a listing is under way

	// Only the goroutine of run uses these.
	cluster  bool
	watches  map[string]*expiredWatch // by address
	reported ExpiredState             // last value passed to Changed
	listed   time.Time                // time of the last listing; zero: never
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
		changed: wait.NewSignal(), renew: wait.NewSignal(), looks: make(chan chan error),
		known:   make(chan struct{}),
		watches: make(map[string]*expiredWatch),
	}
}

// Start begins listening and returns at once. Calls after the first, and after Stop, do
// nothing.
func (e *ExpiredEvents) Start() {
	e.once.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		e.stop = cancel
		e.wg.Go(func() { e.run(ctx) })
	})
}

// Stop ends listening and waits until no callback can come any more. If Redis does not
// answer, it may take as long as the client's own timeouts.
func (e *ExpiredEvents) Stop() {
	e.once.Do(func() { e.stop = func() {} })
	e.stop()
	e.wg.Wait()
}

// Recreate closes the connection and makes a new one, and checks the setting and the
// events on it, because the client may lead to another Redis by now. On a cluster,
// where each node has its own connection, it does nothing.
func (e *ExpiredEvents) Recreate() { e.renew.Set() }

// Known returns a channel that is closed when every node was checked once.
func (e *ExpiredEvents) Known() <-chan struct{} { return e.known }

// State returns whether events arrive. The state is ExpiredWorks if they arrive from
// every master.
func (e *ExpiredEvents) State() ExpiredState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// run keeps one watch per node, and combines their results.
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
			_ = e.scan(ctx, true) // the next tick tries again
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

// Look finds out which nodes of a cluster are masters, unless that was done just now.
// If it returns nil, Failover has been called for each failover that was visible.
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

// scan makes one watch for each current node. If the nodes cannot be listed, the
// watches stay. regular means that missing nodes have been missing for another
// scanEvery.
func (e *ExpiredEvents) scan(ctx context.Context, regular bool) error {
	asked := time.Now()
	listing, cancel := context.WithTimeout(ctx, scanWithin)
	defer cancel()
	nodes, err := exclusive(listing, shortGrace, &e.listing, func() ([]redisNode, error) { return listNodes(listing, e.cfg.Client) })
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
		if w != nil { // the node left and came back, so its old client is closed
			w.close()
		}
		w = newExpiredWatch(n, e.cfg, e.changed.Set)
		e.watches[n.addr] = w
		w.start(ctx)
		if !first && !n.replica { // nothing listened to it until now
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

// sum combines the results of the masters. One silent master makes the state silent,
// and otherwise one unknown master makes it unknown.
func (e *ExpiredEvents) sum() {
	total, masters, concluded := ExpiredWorks, 0, true
	var errs []error
	for _, w := range e.watches {
		state, done, err := w.result()
		concluded = concluded && done
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
	if total != e.reported {
		e.reported = total
		e.cfg.Changed(total, errors.Join(errs...))
	}
	if concluded && len(e.watches) > 0 {
		select {
		case <-e.known:
		default:
			close(e.known)
		}
	}
}

// closeAll stops all watches in parallel, because each may have to wait for Redis.
func (e *ExpiredEvents) closeAll() {
	var wg sync.WaitGroup
	for _, w := range e.watches {
		wg.Go(w.close)
	}
	wg.Wait()
}
