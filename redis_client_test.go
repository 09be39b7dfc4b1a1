package mesh

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// A client whose timeouts hold on to silent connections is refused, of whatever
// kind it is, and the error says what to change.
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
			_, err := NewServer(Options{Redis: c2, LeaseTTL: c.lease})
			require.NoError(t, c2.Close())
			if c.field == "" {
				require.NoError(t, err, "%s, %s", kind, name)
				continue
			}
			require.ErrorIs(t, err, ErrInvalidOptions, "%s, %s", kind, name)
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
		_, err := NewPresenceManager(Options{Redis: c})
		require.NoError(t, c.Close())
		require.ErrorIs(t, err, ErrInvalidOptions)
		require.ErrorContains(t, err, "ClientSideCache")
	}
}

// TestBlackHoleWithoutReadTimeout: every connection falls silent at once, and so
// does the next one of each kind, for good. A client that has no timeouts of its
// own goes by the deadlines of calls, also where it subscribes.
func TestBlackHoleWithoutReadTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		mem := meshtest.StartRedis(t)
		opts := mem.Options()
		opts.ReadTimeout, opts.WriteTimeout, opts.ContextTimeoutEnabled = -1, -1, true
		var hole atomic.Bool
		dial := opts.Dialer
		opts.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if err := ctx.Err(); err != nil {
				return nil, err // as a net.Dialer does
			}
			if hole.Load() {
				here, there := net.Pipe() // nothing is read or written at the other end
				t.Cleanup(func() { _ = there.Close() })
				return here, nil
			}
			return dial(ctx, network, addr)
		}
		client := redis.NewClient(opts)
		defer func() { _ = client.Close() }()
		m, err := NewPresenceManager(Options{Redis: client})
		require.NoError(t, err)
		require.NoError(t, m.Start(t.Context()))
		defer func() { require.NoError(t, m.Shutdown(t.Context())) }()
		require.NoError(t, m.TrackPresence(Exact("room"), PresenceOptions{}))
		require.NoError(t, m.Connect(t.Context(), "a", nil))
		hole.Store(true)
		mem.CutOnce()
		time.Sleep(30 * time.Second)
		hole.Store(false)
		time.Sleep(20 * time.Second) // LeaseTTL, and the time of a call
		require.NoError(t, m.Join(t.Context(), "room", "a"))
		for event, err := range m.Subscribe(t.Context(), "room", SubscribeOptions{}) {
			require.NoError(t, err)
			require.Len(t, event.Snapshot.Members, 1)
			require.False(t, event.Snapshot.Stale)
			break
		}
	})
}
