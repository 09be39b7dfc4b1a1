// Package redisclient checks whether a Redis client of the app can be used, and reads
// from its options what the rest of the library needs to know. The text of an error
// continues a sentence that begins with the name of the option, "Redis".
package redisclient

import (
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// Check returns an error for a client that may read from a replica or a cache, where
// the last write may be missing, or that spreads keys over servers in its own way.
func Check(client redis.UniversalClient) error {
	switch c := client.(type) {
	case nil:
		return errors.New("is required")
	case *redis.Client:
		if c == nil {
			return errors.New("is a nil *redis.Client")
		}
		if opts := c.Options(); opts.ClientSideCacheConfig != nil || opts.ClientSideCache != nil {
			return errors.New("has a client-side cache, whose answers may be out of date: use a client without ClientSideCacheConfig and ClientSideCache")
		}
	case *redis.Ring:
		return errors.New("is a *redis.Ring, which does not keep a room's keys and events in one place")
	case *redis.ClusterClient:
		if c == nil {
			return errors.New("is a nil *redis.ClusterClient")
		}
		if opts := c.Options(); opts.ReadOnly || opts.RouteByLatency || opts.RouteRandomly {
			return errors.New("must read from masters: unset ReadOnly, RouteByLatency and RouteRandomly")
		}
	default:
		return fmt.Errorf("is a %T: only a *redis.Client or *redis.ClusterClient tells its database and its layout", c)
	}
	return nil
}

// Clustered reports whether the client is one of a Redis Cluster.
func Clustered(client redis.UniversalClient) bool {
	_, ok := client.(*redis.ClusterClient)
	return ok
}

// Database returns the number of the client's database. It is 0 on a cluster.
func Database(client redis.UniversalClient) int {
	if c, ok := client.(*redis.Client); ok {
		return c.Options().DB
	}
	return 0
}

// shortestLimit is a length that every timeout of a client may have, also with a
// short lease. It is the default of go-redis.
const shortestLimit = 5 * time.Second

// timeouts are those options of a client that decide how long it waits.
type timeouts struct {
	dial, redial, read, write time.Duration
	byContext                 bool // the end of a call's context ends its reads and writes
}

func timeoutsOf(client redis.UniversalClient) timeouts {
	switch c := client.(type) {
	case *redis.Client:
		o := c.Options()
		return timeouts{o.DialTimeout, o.DialerRetryTimeout, o.ReadTimeout, o.WriteTimeout, o.ContextTimeoutEnabled}
	case *redis.ClusterClient:
		o := c.Options()
		return timeouts{o.DialTimeout, o.DialerRetryTimeout, o.ReadTimeout, o.WriteTimeout, o.ContextTimeoutEnabled}
	}
	return timeouts{}
}

// CheckTimeouts returns an error if the client would wait for a silent connection
// longer than a lease allows. Calls have a limit of their own, but a connection of the
// pool stays in use until the client's timeout. Once all of them are in use, no heartbeat
// gets through, even if the network is well again. The number of retries, the pauses
// between them, and the wait for a free connection need no check, because the end of
// the call ends them.
func CheckTimeouts(client redis.UniversalClient, lease time.Duration) error {
	t := timeoutsOf(client)
	most := max(lease/3, shortestLimit)
	for _, o := range []struct {
		field     string
		value     time.Duration
		byContext bool
		remedy    string
	}{
		{"DialTimeout", t.dial, false, ""},
		{"DialerRetryTimeout", t.redial, false, ""},
		{"ReadTimeout", t.read, t.byContext, ", or set ContextTimeoutEnabled"},
		{"WriteTimeout", t.write, t.byContext, ", or set ContextTimeoutEnabled"},
	} {
		switch {
		case o.value < 0 || o.value == 0 && !o.byContext: // go-redis turns -1 into 0
			return fmt.Errorf("has a client without %s, which would wait for ever for a connection that has gone silent: set it to at most %v%s",
				o.field, most, o.remedy)
		case o.value > most && !o.byContext:
			return fmt.Errorf("has a client with a %s of %v, which is too long for a LeaseTTL of %v: set it to at most %v%s",
				o.field, o.value, lease, most, o.remedy)
		}
	}
	return nil
}

// subscriptionConns is the number of connections to each Redis node for subscriptions:
// one for events and one for expired keys.
const subscriptionConns = 2

// Connections returns the number of connections that the client may open to each
// Redis node, with those for subscriptions.
func Connections(client redis.UniversalClient) int {
	pool, pipelines := 0, 0
	switch c := client.(type) {
	case *redis.Client:
		pool, pipelines = c.Options().PoolSize, c.Options().PipelinePoolSize
	case *redis.ClusterClient:
		pool, pipelines = c.Options().PoolSize, c.Options().PipelinePoolSize
	}
	if pipelines <= 0 {
		pipelines = redis.DefaultPipelinePoolSize
	}
	return pool + pipelines + subscriptionConns
}
