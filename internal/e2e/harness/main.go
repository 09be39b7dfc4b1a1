package harness

import (
	"context"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

// Main runs the tests of a package. TestMain of every package that uses this one
// calls it. In a child process it is a server instead. At the end it checks that no
// goroutine is left.
func Main(m *testing.M) {
	if conf := os.Getenv(childEnv); conf != "" {
		os.Exit(runChild(conf))
	}
	debug.SetGCPercent(gcPercent)
	redis.SetLogger(silentRedis{}) // tests take Redis away: the client library would tell of every attempt
	// It looks once a second whether the pool of a dead node has been closed.
	goleak.VerifyTestMain(running{m}, goleak.IgnoreAnyFunction("github.com/redis/go-redis/v9/internal/pool.(*ConnPool).tryDial"))
}

// silentRedis is a logger of the Redis client that prints nothing.
type silentRedis struct{}

func (silentRedis) Printf(context.Context, string, ...any) {}

// InModule returns the path of a file of this module, whatever package is tested.
func InModule(path ...string) string {
	root := "."
	for range 5 {
		if _, err := os.Stat(filepath.Join(root, "go.mod")); err == nil {
			break
		}
		root = filepath.Join(root, "..")
	}
	return filepath.Join(append([]string{root}, path...)...)
}
