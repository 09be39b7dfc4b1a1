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

// Main runs the tests of a package. TestMain of every package that uses the harness
// calls it. In a child process it runs a server instead. At the end it checks that no
// goroutine is left.
func Main(m *testing.M) {
	if conf := os.Getenv(childEnv); conf != "" {
		os.Exit(runChild(conf))
	}
	debug.SetGCPercent(gcPercent)
	redis.SetLogger(silentRedis{}) // tests stop Redis, and the Redis client would log every attempt
	// This goroutine of go-redis checks once a second whether the pool of a dead node
	// has been closed.
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
