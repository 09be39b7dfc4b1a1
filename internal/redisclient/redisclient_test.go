package redisclient

import (
	"cmp"
	"errors"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A client of any kind is refused if its timeouts hold on to silent connections. The
// error says what to change.
func TestTimeoutsOfRedisClients(t *testing.T) {
	t.Parallel()
	type timeouts struct {
		dial, redial, read, write time.Duration
		byContext                 bool
	}
	clients := map[string]func(timeouts) redis.UniversalClient{
		"client": func(o timeouts) redis.UniversalClient {
			return redis.NewClient(&redis.Options{
				DialTimeout: o.dial, DialerRetryTimeout: o.redial, ReadTimeout: o.read, WriteTimeout: o.write, ContextTimeoutEnabled: o.byContext,
			})
		},
		"cluster": func(o timeouts) redis.UniversalClient {
			return redis.NewClusterClient(&redis.ClusterOptions{
				DialTimeout: o.dial, DialerRetryTimeout: o.redial, ReadTimeout: o.read, WriteTimeout: o.write, ContextTimeoutEnabled: o.byContext,
			})
		},
		"sentinel": func(o timeouts) redis.UniversalClient {
			return redis.NewFailoverClient(&redis.FailoverOptions{
				MasterName: "mesh", SentinelAddrs: []string{"127.0.0.1:1"},
				DialTimeout: o.dial, DialerRetryTimeout: o.redial, ReadTimeout: o.read, WriteTimeout: o.write, ContextTimeoutEnabled: o.byContext,
			})
		},
		"universal": func(o timeouts) redis.UniversalClient {
			return redis.NewUniversalClient(&redis.UniversalOptions{
				Addrs:       []string{"127.0.0.1:1", "127.0.0.1:2"},
				DialTimeout: o.dial, DialerRetryTimeout: o.redial, ReadTimeout: o.read, WriteTimeout: o.write, ContextTimeoutEnabled: o.byContext,
			})
		},
	}
	const s = time.Second
	for name, c := range map[string]struct {
		timeouts
		lease time.Duration
		field string // "": it is taken
	}{
		"defaults":                         {timeouts{}, 0, ""},
		"defaults and a short lease":       {timeouts{}, s, ""},
		"all short":                        {timeouts{dial: s, redial: s, read: s, write: s}, 0, ""},
		"as long as the lease bears":       {timeouts{dial: 10 * s, redial: 10 * s, read: 10 * s, write: 10 * s}, 30 * s, ""},
		"read for a minute":                {timeouts{read: time.Minute}, 0, "ReadTimeout"},
		"read too long":                    {timeouts{read: 10*s + 1, write: s}, 30 * s, "ReadTimeout"},
		"read for ever":                    {timeouts{read: -1, write: s}, 0, "ReadTimeout"},
		"read without a deadline":          {timeouts{read: -2, write: s}, 0, "ReadTimeout"},
		"read for ever, long lease":        {timeouts{read: -1, write: s}, time.Hour, "ReadTimeout"},
		"write for a minute":               {timeouts{write: time.Minute}, 0, "WriteTimeout"},
		"write for ever":                   {timeouts{write: -1}, 0, "WriteTimeout"},
		"write without a deadline":         {timeouts{write: -2}, 0, "WriteTimeout"},
		"dial for a minute":                {timeouts{dial: time.Minute}, 0, "DialTimeout"},
		"dial for ever":                    {timeouts{dial: -1}, 0, "DialTimeout"},
		"dial again after a minute":        {timeouts{redial: time.Minute}, 0, "DialerRetryTimeout"},
		"contexts end reads and writes":    {timeouts{read: time.Minute, write: time.Minute, byContext: true}, 0, ""},
		"contexts end what has no limit":   {timeouts{read: -1, write: -1, byContext: true}, 0, ""},
		"contexts do not reach the socket": {timeouts{read: -2, byContext: true}, 0, "ReadTimeout"},
		"contexts do not end a dial":       {timeouts{dial: time.Minute, byContext: true}, 0, "DialTimeout"},
	} {
		for kind, client := range clients {
			c2 := client(c.timeouts)
			err := errors.Join(Check(c2), CheckTimeouts(c2, cmp.Or(c.lease, 10*time.Second)))
			require.NoError(t, c2.Close())
			if c.field == "" {
				require.NoError(t, err, "%s, %s", kind, name)
				continue
			}
			require.ErrorContains(t, err, " "+c.field, "%s, %s", kind, name)
			require.ErrorContains(t, err, "set it to at most", "%s, %s", kind, name)
		}
	}
}

func TestClientSideCacheIsRefused(t *testing.T) {
	t.Parallel()
	for _, o := range []*redis.Options{
		{Addr: "127.0.0.1:1", ClientSideCacheConfig: &redis.ClientSideCacheConfig{}},
		{Addr: "127.0.0.1:1", ClientSideCache: redis.NewLocalCache(redis.CacheConfig{})},
	} {
		c := redis.NewClient(o)
		err := Check(c)
		require.NoError(t, c.Close())
		require.ErrorContains(t, err, "ClientSideCache")
	}
}

// Connections counts the pool, the pipelines and the subscriptions.
func TestConnections(t *testing.T) {
	t.Parallel()
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", PoolSize: 20, PipelinePoolSize: 5})
	defer func() { _ = c.Close() }()
	require.Equal(t, 20+5+2, Connections(c))
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}, PoolSize: 7})
	defer func() { _ = cluster.Close() }()
	require.Equal(t, 7+redis.DefaultPipelinePoolSize+2, Connections(cluster))
}
