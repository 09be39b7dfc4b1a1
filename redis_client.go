package mesh

import (
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

// checkRedis refuses clients that would read from replicas or a cache, where the
// last write may be missing, or that spread keys in a way of their own.
func checkRedis(client redis.UniversalClient) error {
	switch c := client.(type) {
	case nil:
		return fmt.Errorf("%w: Redis is required", ErrInvalidOptions)
	case *redis.Client:
		if c == nil {
			return fmt.Errorf("%w: Redis is a nil *redis.Client", ErrInvalidOptions)
		}
		if opts := c.Options(); opts.ClientSideCacheConfig != nil || opts.ClientSideCache != nil {
			return fmt.Errorf("%w: Redis has a client-side cache, whose answers may be out of date: use a client without ClientSideCacheConfig and ClientSideCache", ErrInvalidOptions)
		}
	case *redis.Ring:
		return fmt.Errorf("%w: Redis is a *redis.Ring, which does not keep a room's keys and events in one place", ErrInvalidOptions)
	case *redis.ClusterClient:
		if c == nil {
			return fmt.Errorf("%w: Redis is a nil *redis.ClusterClient", ErrInvalidOptions)
		}
		if opts := c.Options(); opts.ReadOnly || opts.RouteByLatency || opts.RouteRandomly {
			return fmt.Errorf("%w: Redis must read from masters: unset ReadOnly, RouteByLatency and RouteRandomly", ErrInvalidOptions)
		}
	default:
		return fmt.Errorf("%w: Redis is a %T: only a *redis.Client or *redis.ClusterClient tells its database and its layout", ErrInvalidOptions, c)
	}
	return nil
}

// shortestLimit is what every timeout of a Redis client may be, whatever
// LeaseTTL: the default of go-redis.
const shortestLimit = 5 * time.Second

// checkTimeouts refuses a client that would hold on to a connection that has
// gone silent for longer than a lease can bear. Calls give up by themselves, but
// the client's connections, of which there is a limited number, are taken until
// its own timeouts have passed: then no heartbeat gets through, although the
// network is well again. How often the client retries, and how long it waits
// before that or for a connection, does not matter: the call's end ends that.
func checkTimeouts(client redis.UniversalClient, lease time.Duration) error {
	var dial, redial, read, write time.Duration
	var byContext bool
	switch c := client.(type) {
	case *redis.Client:
		o := c.Options()
		dial, redial, read, write, byContext = o.DialTimeout, o.DialerRetryTimeout, o.ReadTimeout, o.WriteTimeout, o.ContextTimeoutEnabled
	case *redis.ClusterClient:
		o := c.Options()
		dial, redial, read, write, byContext = o.DialTimeout, o.DialerRetryTimeout, o.ReadTimeout, o.WriteTimeout, o.ContextTimeoutEnabled
	}
	most := max(lease/3, shortestLimit)
	for _, t := range []struct {
		field     string
		value     time.Duration
		byContext bool // the end of a call ends the wait, whatever the value
	}{
		{"DialTimeout", dial, false},
		{"DialerRetryTimeout", redial, false},
		{"ReadTimeout", read, byContext},
		{"WriteTimeout", write, byContext},
	} {
		remedy := ""
		if t.field == "ReadTimeout" || t.field == "WriteTimeout" {
			remedy = ", or set ContextTimeoutEnabled"
		}
		switch {
		case t.value < 0 || t.value == 0 && !t.byContext: // 0 is what go-redis makes of -1
			return fmt.Errorf("%w: Redis has a client without %s, which would wait for ever for a connection that has gone silent: set it to at most %v%s",
				ErrInvalidOptions, t.field, most, remedy)
		case t.value > most && !t.byContext:
			return fmt.Errorf("%w: Redis has a client with a %s of %v, which is too long for a LeaseTTL of %v: set it to at most %v%s",
				ErrInvalidOptions, t.field, t.value, lease, most, remedy)
		}
	}
	return nil
}
