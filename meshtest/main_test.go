package meshtest_test

import (
	"context"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	redis.SetLogger(silentRedis{}) // tests take Redis away, and go-redis would log every attempt
	goleak.VerifyTestMain(m)
}

// silentRedis is a logger for go-redis that prints nothing.
type silentRedis struct{}

func (silentRedis) Printf(context.Context, string, ...any) {}
