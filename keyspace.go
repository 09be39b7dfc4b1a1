package mesh

import (
	"context"
	"log/slog"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/internal/expired"
	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/redisclient"
	"github.com/meshpresence/mesh/internal/store"
)

// keySpace returns the names of keys and channels under these options, whose defaults
// are filled in.
func (o Options) keySpace() keys.Space {
	return keys.Space{
		Prefix: o.Prefix, DB: redisclient.Database(o.Redis), Spread: o.buckets(), Cluster: redisclient.Clustered(o.Redis),
	}
}

// buckets returns the number of buckets: Buckets on a cluster, otherwise 1.
func (o Options) buckets() int {
	if redisclient.Clustered(o.Redis) {
		return o.Buckets
	}
	return 1
}

// expiration acts on the expired events of Redis.
type expiration struct {
	*expired.Queue // acts on the events

	listener *expiryListener // receives them
}

// newExpiration connects a queue with the listener of its events.
func newExpiration(q expired.Config, l expiryConfig) *expiration {
	e := new(expiration)
	q.Look = func(ctx context.Context) error { return e.listener.Look(ctx) }
	e.Queue = expired.New(q)
	l.OnExpired = e.Add
	e.listener = newExpiryListener(l)
	return e
}

// expiredKnownWithin limits the time for which the start waits to learn whether expired
// events arrive.
const expiredKnownWithin = 3 * time.Second

// expiryConfig configures an expiryListener.
type expiryConfig struct {
	Client redis.UniversalClient
	Keys   keys.Space
	// OnExpired receives each key that may have expired. It must not block. On a cluster
	// one goroutine per node calls it.
	OnExpired func(keys.Expired)
	// Failover is called if a master of the cluster may have been away or may be another
	// one. Several goroutines call it, and it must not block.
	Failover func()
	Logger   *slog.Logger
}

// expiryListener receives the expired events of Redis. Every server receives each of
// them, perhaps late, twice, or not at all. They make leaves faster, and nothing relies
// on them.
type expiryListener struct {
	cfg    expiryConfig
	events *store.ExpiredEvents
	silent bool // the newest log line says that events do not arrive; only stateChanged uses it
}

func newExpiryListener(cfg expiryConfig) *expiryListener {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l := &expiryListener{cfg: cfg}
	l.events = store.NewExpiredEvents(store.ExpiredConfig{
		Client: cfg.Client, DB: cfg.Keys.DB, Canary: cfg.Keys.Canary,
		Expired: l.expired, Changed: l.stateChanged, Failover: cfg.Failover, Logger: cfg.Logger,
	})
	return l
}

// Start begins listening. It returns as soon as it is known whether events arrive, after
// 3 s, or when ctx ends. Listening goes on until Stop.
func (l *expiryListener) Start(ctx context.Context) {
	l.events.Start()
	t := time.NewTimer(expiredKnownWithin)
	defer t.Stop()
	select {
	case <-l.events.Known():
	case <-t.C:
	case <-ctx.Done():
	}
}

// Look calls Failover if a failover has happened that it was not called for.
func (l *expiryListener) Look(ctx context.Context) error { return l.events.Look(ctx) }

// Stop ends listening. After it, OnExpired is not called.
func (l *expiryListener) Stop() { l.events.Stop() }

// Recreate subscribes to expired events again, after the client has come to another
// Redis than before.
func (l *expiryListener) Recreate() { l.events.Recreate() }

// Working reports whether expired events arrived when it was last tested.
func (l *expiryListener) Working() bool { return l.events.State() == store.ExpiredWorks }

func (l *expiryListener) expired(key string) {
	if e, ok := l.cfg.Keys.ParseExpired(key); ok {
		l.cfg.OnExpired(e)
	}
}

// stateChanged logs when expired events stop arriving and when they arrive again, once
// each. While Redis is away nothing is known about them. No line is held back: it takes
// two probes of two seconds to find that events do not arrive, and the newest line must be
// the true one.
func (l *expiryListener) stateChanged(state store.ExpiredState, err error) {
	switch {
	case state == store.ExpiredSilent && !l.silent:
		l.silent = true
		channel := store.ExpiredChannel(l.cfg.Keys.DB)
		l.cfg.Logger.Warn("mesh: Redis sends no expired events; presence that runs out is still told, "+
			"by its owner's clock and by the leases of servers, but may take longer after a crash",
			"remedy", "set notify-keyspace-events to include Ex, in redis.conf or in the parameter group of a managed Redis, "+
				"and let the ACL user subscribe to "+channel+"; or set EnablePresenceExpirationEvents to false",
			"error", err)
	case state == store.ExpiredWorks && l.silent:
		l.silent = false
		l.cfg.Logger.Info("mesh: Redis sends expired events again")
	}
}
