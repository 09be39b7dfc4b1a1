package meshtest

import (
	"errors"
	"fmt"
	"net"
	"time"
)

// ErrOption is wrapped by the error of [NewRedis] for an option with a value
// that makes no sense.
var ErrOption = errors.New("meshtest: invalid option")

// DefaultTick is how often a Redis looks for keys that have run out when no
// command makes it look. See [WithTick].
const DefaultTick = 50 * time.Millisecond

// Option changes how a [Redis] behaves.
type Option func(*config) error

// config is what the options set.
type config struct {
	tick      time.Duration
	addr      string
	events    string // notify-keyspace-events after a start
	mute      bool   // never publish an expired event
	forbidden bool   // CONFIG is refused
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

// WithTick sets how often keys that ran out are looked for while no command
// comes in: the longest that an expired event may be late. Defaults to
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

// WithAddr makes the Redis listen on a TCP address too, so that other
// processes can reach it. "127.0.0.1:0" picks a free port: [Redis.Addr] says
// which. It does not work inside a testing/synctest bubble.
func WithAddr(addr string) Option {
	return func(c *config) error {
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fmt.Errorf("%w: address: %w", ErrOption, err)
		}
		c.addr = addr
		return nil
	}
}

// WithKeyspaceEvents sets notify-keyspace-events from the start, as an
// operator does in redis.conf: "Ex", "KEA". Defaults to "", as Redis does.
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

// WithoutExpiredEvents makes the Redis publish no expired event, whatever
// notify-keyspace-events says: as if each were lost.
func WithoutExpiredEvents() Option {
	return func(c *config) error {
		c.mute = true
		return nil
	}
}

// WithConfigForbidden makes the Redis answer CONFIG as managed services do: it
// does not know the command. [WithKeyspaceEvents] is then the only way to have
// expired events.
func WithConfigForbidden() Option {
	return func(c *config) error {
		c.forbidden = true
		return nil
	}
}
