package redistest

import (
	"context"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	fillBatch  = 2_000
	fillTTL    = 24 * time.Hour
	fillPrefix = "redistest:other:"
)

// Fill writes n keys with a TTL of a day, so that Redis has more to do than to expire the
// keys under test. Calling it again writes the same keys.
func Fill(ctx context.Context, c redis.Cmdable, n int) error {
	for from := 0; from < n; from += fillBatch {
		_, err := c.Pipelined(ctx, func(p redis.Pipeliner) error {
			for i := from; i < min(n, from+fillBatch); i++ {
				p.Set(ctx, fmt.Sprintf("%s%d", fillPrefix, i), i, fillTTL)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("redistest: fill: %w", err)
		}
	}
	return nil
}
