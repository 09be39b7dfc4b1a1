package mesh

import (
	"errors"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/handshake"
)

func TestInvalidSubprotocols(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", " ", "a b", "a,b", "a\r\nSet-Cookie: x", "\"a\"", "a/b", "a:b", "é", "a\x00", "\xff", "ok"} {
		err := handshake.CheckSubprotocols([]string{"ok", name})
		require.ErrorIs(t, err, ErrInvalidOptions, "%q", name)
		assert.ErrorContains(t, err, "Subprotocols[1]", "%q", name)
		_, err = NewServer(Options{Redis: idleRedis(t), Subprotocols: []string{"ok", name}})
		require.ErrorIs(t, err, ErrInvalidOptions, "%q", name)
	}
	require.NoError(t, handshake.CheckSubprotocols([]string{"mesh", "MESH", "v1.mesh", "!#$%&'*+-.^_`|~09azAZ"}))
}

func TestLevelOf(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]int{ // 0 means an error
		"": 1, "a=b": 1, "mesh-level=1": 1, "mesh-level=2": 2, "a=b&mesh-level=2&c": 2, "mesh%2Dlevel=%32": 2,
		"mesh-level=3": 2, "mesh-level=10": 2, "mesh-level=" + strings.Repeat("9", 100): 2, // the newest level of the server
		"Mesh-Level=2": 1, "mesh-level2=2": 1, "amesh-level=2": 1, "%zz=2": 1, "a=%zz&mesh-level=2": 2, "a=mesh-level=2": 1,
		"mesh-level": 0, "mesh-level=": 0, "mesh-level=0": 0, "mesh-level=-1": 0, "mesh-level=x": 0, "mesh-level=2x": 0, "mesh-level=1.5": 0,
		"mesh-level=02": 0, "mesh-level=+2": 0, "mesh-level=2 ": 0, "mesh-level=%zz": 0, "mesh-level=2;a": 0, "mesh-level=0x2": 0, "mesh-level=٢": 0,
		"mesh-level=2&mesh-level=2": 0, "mesh-level=1&a=b&mesh-level=2": 0, "mesh-level=2&mesh-level": 0,
	} {
		r, err := http.NewRequest(http.MethodGet, "http://x/ws", nil)
		require.NoError(t, err)
		r.URL.RawQuery = query
		level, err := handshake.LevelOf(r)
		assert.Equal(t, want, level, "%q: %v", query, err)
		assert.Equal(t, want == 0, err != nil, "%q: %v", query, err)
	}
}

func TestLevelOfServeConn(t *testing.T) {
	t.Parallel()
	for level, want := range map[int]int{0: 1, 1: 1, 2: 2, 3: 0, -1: 0, 256: 0, 258: 0} {
		got, err := validLevel(level)
		assert.Equal(t, want, got, "%d", level)
		if want == 0 {
			assert.ErrorIs(t, err, ErrInvalidOptions)
		}
	}
}

func TestNameOptions(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"web-1", "a b", "ü 𝕏", "<b>", strings.Repeat("x", 128)} {
		o, err := Options{Redis: idleRedis(t), Name: name}.withDefaults()
		require.NoError(t, err, "%q", name)
		assert.Equal(t, name, o.Name)
	}
	for _, name := range []string{"a\nb", "\x00", "a\x7f", "a\u0085", "\xff", strings.Repeat("x", 129)} {
		_, err := Options{Redis: idleRedis(t), Name: name}.withDefaults()
		require.ErrorIs(t, err, ErrInvalidOptions, "%q", name)
		assert.ErrorContains(t, err, "Name ")
	}
	for host, want := range map[string]string{"web-1": "web-1", "": "", "a\nb": "", "\xff": "", strings.Repeat("x", 129): ""} {
		o, err := Options{Redis: idleRedis(t), host: func() (string, error) { return host, nil }}.withDefaults()
		require.NoError(t, err)
		assert.Equal(t, want, o.Name)
	}
	o, err := Options{Redis: idleRedis(t), host: func() (string, error) { return "x", errors.New("no") }}.withDefaults()
	require.NoError(t, err)
	assert.Empty(t, o.Name)
}

// idleRedis returns a client that is never used.
func idleRedis(t *testing.T) *redis.Client {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func idleCluster(t *testing.T, o redis.ClusterOptions) *redis.ClusterClient {
	t.Helper()
	o.Addrs = []string{"127.0.0.1:1"}
	c := redis.NewClusterClient(&o)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestOptionsDefaults(t *testing.T) {
	t.Parallel()
	o, err := Options{Redis: idleRedis(t)}.withDefaults()
	require.NoError(t, err)
	assert.Equal(t, "mesh:", o.Prefix)
	assert.Equal(t, 64, o.Buckets)
	assert.Equal(t, 1, o.buckets(), "no cluster")
	assert.Equal(t, 10*time.Second, o.LeaseTTL)
	assert.Equal(t, 30*time.Second, o.PingInterval)
	assert.Equal(t, 1, o.missedPongs())
	assert.Equal(t, 5*time.Second, o.LatencyInterval)
	assert.True(t, o.expirationEvents())
	assert.Equal(t, 5*time.Second, o.GuardTimeout)
	assert.Equal(t, 5*time.Second, o.HookTimeout)
	assert.Equal(t, 8, o.HandlerConcurrency)
	assert.Equal(t, 10*time.Second, o.WriteTimeout)
	assert.NotNil(t, o.Logger)
	assert.Equal(t, Limits{
		FrameBytes: 64 << 10, RoomNameBytes: 256, StateBytes: 8 << 10, MetadataBytes: 16 << 10,
		DisconnectedPerUser: 100, RoomsPerConnection: 100, SubscriptionsPerConnection: 100, OccupanciesPerConnection: 1000, NewRoomsPerMinute: 300, CommandsPerSecond: 100, QueueBytes: 1 << 20,
		Connections: 100_000, UpgradesPerSecond: 1000, SnapshotMembers: 1000,
	}, o.Limits)

	again, err := o.withDefaults()
	require.NoError(t, err)
	assert.Equal(t, o, again, "a second call changes nothing")
}

func TestNegativeOptionsStay(t *testing.T) {
	t.Parallel()
	o, err := Options{Redis: idleRedis(t), MaxMissedPongs: -1, LatencyInterval: -1, Limits: Limits{
		FrameBytes: -1, RoomNameBytes: -2, StateBytes: -1, MetadataBytes: -1, RoomsPerConnection: -1,
		SubscriptionsPerConnection: -1, NewRoomsPerMinute: -1, CommandsPerSecond: -1, QueueBytes: -1, Connections: -1, UpgradesPerSecond: -1, SnapshotMembers: -1,
	}}.withDefaults()
	require.NoError(t, err)
	assert.Zero(t, o.missedPongs())
	assert.Negative(t, o.LatencyInterval)
	assert.False(t, over(math.MaxInt, o.Limits.RoomNameBytes))
	assert.False(t, over(math.MaxInt64, o.Limits.FrameBytes))
	again, err := o.withDefaults()
	require.NoError(t, err)
	assert.Equal(t, o, again)
}

func TestOptionsAreCopied(t *testing.T) {
	t.Parallel()
	off := false
	in := Options{Redis: idleRedis(t), AllowedOrigins: []string{"a.example"}, EnablePresenceExpirationEvents: &off}
	o, err := in.withDefaults()
	require.NoError(t, err)
	in.AllowedOrigins[0] = "evil.example"
	off = true
	assert.Equal(t, []string{"a.example"}, o.AllowedOrigins)
	assert.False(t, o.expirationEvents())
}

func TestInvalidOptions(t *testing.T) {
	t.Parallel()
	client := idleRedis(t)
	slow := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ReadTimeout: time.Minute})
	cached := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ClientSideCacheConfig: &redis.ClientSideCacheConfig{}})
	t.Cleanup(func() { require.NoError(t, errors.Join(slow.Close(), cached.Close())) })
	for field, change := range map[string]func(*Options){
		"Redis is required":        func(o *Options) { o.Redis = nil },
		"nil *redis.Client":        func(o *Options) { o.Redis = (*redis.Client)(nil) },
		"nil *redis.ClusterClient": func(o *Options) { o.Redis = (*redis.ClusterClient)(nil) },
		"*redis.Ring":              func(o *Options) { o.Redis = (*redis.Ring)(nil) },
		"Redis has a client with a ReadTimeout of 1m0s": func(o *Options) { o.Redis = slow },
		"Redis has a client-side cache":                 func(o *Options) { o.Redis = cached },
		"Prefix \"a{b\"":                                func(o *Options) { o.Prefix = "a{b" },
		"Prefix \"a b\"":                                func(o *Options) { o.Prefix = "a b" },
		"Prefix \"a\\u00a0b\"":                          func(o *Options) { o.Prefix = "a\u00a0b" },
		"Prefix \"a\\x00\"":                             func(o *Options) { o.Prefix = "a\x00" },
		"Prefix \"\\xff\"":                              func(o *Options) { o.Prefix = "\xff" },
		"Prefix is longer":                              func(o *Options) { o.Prefix = strings.Repeat("x", 129) },
		"Buckets is -1":                                 func(o *Options) { o.Buckets = -1 },
		"Buckets is 1025":                               func(o *Options) { o.Buckets = 1025 },
		"LeaseTTL is 999ms":                             func(o *Options) { o.LeaseTTL = 999 * time.Millisecond },
		"LeaseTTL is 2h":                                func(o *Options) { o.LeaseTTL = 2 * time.Hour },
		"LeaseTTL is -1s":                               func(o *Options) { o.LeaseTTL = -time.Second },
		"PingInterval is 30ns":                          func(o *Options) { o.PingInterval = 30 },
		"PingInterval is -1ns":                          func(o *Options) { o.PingInterval = -1 },
		"LatencyInterval is 5ns":                        func(o *Options) { o.LatencyInterval = 5 },
		"GuardTimeout is -1ns":                          func(o *Options) { o.GuardTimeout = -1 },
		"GuardTimeout is 5ns":                           func(o *Options) { o.GuardTimeout = 5 },
		"HookTimeout is 25h":                            func(o *Options) { o.HookTimeout = 25 * time.Hour },
		"WriteTimeout is -1ns":                          func(o *Options) { o.WriteTimeout = -1 },
		"HandlerConcurrency is -1":                      func(o *Options) { o.HandlerConcurrency = -1 },
		"MaxMissedPongs is 1001":                        func(o *Options) { o.MaxMissedPongs = 1001 },
		"Limits.QueueBytes is 2147483647":               func(o *Options) { o.Limits.QueueBytes = math.MaxInt32 },
		"Limits.FrameBytes is 109951162777":             func(o *Options) { o.Limits.FrameBytes = 109951162777 },
		"AllowedOrigins[0]":                             func(o *Options) { o.AllowedOrigins = []string{"https://"} },
	} {
		o := Options{Redis: client}
		change(&o)
		_, err := o.withDefaults()
		require.ErrorIs(t, err, ErrInvalidOptions, field)
		assert.ErrorContains(t, err, field)
	}
}

func TestOptionsCluster(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]redis.ClusterOptions{
		"ReadOnly":       {ReadOnly: true},
		"RouteByLatency": {RouteByLatency: true},
		"RouteRandomly":  {RouteRandomly: true},
	} {
		_, err := Options{Redis: idleCluster(t, o)}.withDefaults()
		require.ErrorIs(t, err, ErrInvalidOptions, name)
		assert.ErrorContains(t, err, "masters")
	}
	o, err := Options{Redis: idleCluster(t, redis.ClusterOptions{}), Buckets: 16}.withDefaults()
	require.NoError(t, err)
	assert.Equal(t, 16, o.buckets())
}

func TestOver(t *testing.T) {
	t.Parallel()
	assert.False(t, over(10, 10))
	assert.True(t, over(11, 10))
	assert.False(t, over(11, -1))
}
