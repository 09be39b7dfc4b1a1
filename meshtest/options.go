package meshtest

import (
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrOption is wrapped by the error of [NewRedis] for an option with an invalid value.
var ErrOption = errors.New("meshtest: invalid option")

// DefaultTick is the interval at which a Redis looks for keys that have run out while no
// command comes. See [WithTick].
const DefaultTick = 50 * time.Millisecond

// Option changes how a [Redis] behaves.
type Option func(*config) error

// config holds the values that the options set.
type config struct {
	tick            time.Duration
	addr            string
	events          string // notify-keyspace-events after a start
	noExpiredEvents bool   // never publish an expired event
	noConfig        bool   // CONFIG is refused
}

func newConfig(opts []Option) (config, error) {
	c := config{tick: DefaultTick}
	for _, o := range opts {
		if err := o(&c); err != nil {
			return config{}, err
		}
	}
	return c, nil
}

// WithTick sets the interval at which the Redis looks for keys that have run out while no
// command comes. An expired event may be late by this time at most. Defaults to
// [DefaultTick].
func WithTick(d time.Duration) Option {
	return func(c *config) error {
		if d <= 0 {
			return fmt.Errorf("%w: tick %v is not positive", ErrOption, d)
		}
		c.tick = d
		return nil
	}
}

// WithAddr makes the Redis listen on a TCP address too, so that other processes can reach
// it. "127.0.0.1:0" picks a free port, which [Redis.Addr] returns. WithAddr does not work
// inside a testing/synctest bubble.
func WithAddr(addr string) Option {
	return func(c *config) error {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("%w: address: %w", ErrOption, err)
		}
		c.addr = addr
		return nil
	}
}

// WithKeyspaceEvents sets notify-keyspace-events from the start, like redis.conf: "Ex",
// "KEA". Defaults to "", as in Redis.
func WithKeyspaceEvents(flags string) Option {
	return func(c *config) error {
		canonical, ok := canonicalEvents(flags)
		if !ok {
			return fmt.Errorf("%w: notify-keyspace-events %q", ErrOption, flags)
		}
		c.events = canonical
		return nil
	}
}

// WithoutExpiredEvents makes the Redis publish no expired event, whatever the setting
// notify-keyspace-events says, as if each event were lost.
func WithoutExpiredEvents() Option {
	return func(c *config) error {
		c.noExpiredEvents = true
		return nil
	}
}

// WithConfigForbidden makes the Redis refuse CONFIG as an unknown command, as managed
// services do. Expired events then need [WithKeyspaceEvents].
func WithConfigForbidden() Option {
	return func(c *config) error {
		c.noConfig = true
		return nil
	}
}
