package store

import (
	"log/slog"
	"testing"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// The first expired event of a node that was a replica says that it has been
// promoted. Those that follow say nothing new.
func TestPromotionIsToldOnce(t *testing.T) {
	t.Parallel()
	failovers, keys := 0, 0
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:0"}) // never used
	defer c.Close()
	w := newExpiredWatch(node{addr: "a", client: c, replica: true}, ExpiredConfig{
		Expired: func(string) { keys++ }, Failover: func() { failovers++ }, Logger: slog.New(slog.DiscardHandler),
	}, func() {})
	for range 5 {
		w.Message("", "k")
	}
	require.Equal(t, 5, keys)
	require.Equal(t, 1, failovers)
	require.Len(t, w.recheck, 1, "it is probed from now on")
	w.setReplica(false) // the listing says so, too
	require.Equal(t, 1, failovers)
}
