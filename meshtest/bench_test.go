package meshtest_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh/meshtest"
)

// BenchmarkScriptAmongKeys measures the cost of the running clock for a command if there
// are other keys with a TTL.
func BenchmarkScriptAmongKeys(b *testing.B) {
	for _, n := range []int{0, 1_000, 10_000, 100_000} {
		b.Run(fmt.Sprintf("keys=%d", n), func(b *testing.B) {
			ctx := b.Context()
			c := meshtest.StartRedis(b).Client()
			pipe := c.Pipeline()
			for i := range n {
				pipe.Set(ctx, fmt.Sprintf("key:%d", i), 1, time.Hour)
			}
			if _, err := pipe.Exec(ctx); n > 0 && err != nil {
				b.Fatal(err)
			}
			script := redis.NewScript("return redis.call('SET', KEYS[1], 1, 'PX', 60000)")
			for b.Loop() {
				if err := script.Run(ctx, c, []string{"k"}).Err(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
