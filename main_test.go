package mesh

import (
	"context"
	"os"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if conf := os.Getenv(childEnv); conf != "" {
		os.Exit(runChild(conf))
	}
	redis.SetLogger(silentRedis{}) // tests take Redis away: the client library would tell of every attempt
	// It looks once a second whether the pool of a dead node has been closed.
	goleak.VerifyTestMain(running{m}, goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial"))
}

// silentRedis is a logger of the Redis client that prints nothing.
type silentRedis struct{}

func (silentRedis) Printf(context.Context, string, ...any) {}
