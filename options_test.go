package mesh

import (
	"encoding/json"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

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
		RoomsPerConnection: 100, SubscriptionsPerConnection: 100, NewRoomsPerMinute: 300, CommandsPerSecond: 100, QueueBytes: 1 << 20,
		Connections: 100_000, UpgradesPerSecond: 1000, SnapshotMembers: 1000,
	}, o.Limits)

	again, err := o.withDefaults()
	require.NoError(t, err)
	assert.Equal(t, o, again, "its own result stays as it is")
}

func TestOptionsNegativeStays(t *testing.T) {
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

func TestOptionsWrong(t *testing.T) {
	t.Parallel()
	client := idleRedis(t)
	for field, change := range map[string]func(*Options){
		"Redis is required":                 func(o *Options) { o.Redis = nil },
		"nil *redis.Client":                 func(o *Options) { o.Redis = (*redis.Client)(nil) },
		"nil *redis.ClusterClient":          func(o *Options) { o.Redis = (*redis.ClusterClient)(nil) },
		"*redis.Ring":                       func(o *Options) { o.Redis = (*redis.Ring)(nil) },
		"Prefix \"a{b\"":                    func(o *Options) { o.Prefix = "a{b" },
		"Prefix \"a b\"":                    func(o *Options) { o.Prefix = "a b" },
		"Prefix \"a\\u00a0b\"":              func(o *Options) { o.Prefix = "a\u00a0b" },
		"Prefix \"a\\x00\"":                 func(o *Options) { o.Prefix = "a\x00" },
		"Prefix \"\\xff\"":                  func(o *Options) { o.Prefix = "\xff" },
		"Prefix is longer":                  func(o *Options) { o.Prefix = strings.Repeat("x", 129) },
		"Buckets is -1":                     func(o *Options) { o.Buckets = -1 },
		"Buckets is 1025":                   func(o *Options) { o.Buckets = 1025 },
		"LeaseTTL is 999ms":                 func(o *Options) { o.LeaseTTL = 999 * time.Millisecond },
		"LeaseTTL is 2h":                    func(o *Options) { o.LeaseTTL = 2 * time.Hour },
		"LeaseTTL is -1s":                   func(o *Options) { o.LeaseTTL = -time.Second },
		"PingInterval is 30ns":              func(o *Options) { o.PingInterval = 30 },
		"PingInterval is -1ns":              func(o *Options) { o.PingInterval = -1 },
		"LatencyInterval is 5ns":            func(o *Options) { o.LatencyInterval = 5 },
		"GuardTimeout is -1ns":              func(o *Options) { o.GuardTimeout = -1 },
		"GuardTimeout is 5ns":               func(o *Options) { o.GuardTimeout = 5 },
		"HookTimeout is 25h":                func(o *Options) { o.HookTimeout = 25 * time.Hour },
		"WriteTimeout is -1ns":              func(o *Options) { o.WriteTimeout = -1 },
		"HandlerConcurrency is -1":          func(o *Options) { o.HandlerConcurrency = -1 },
		"MaxMissedPongs is 1001":            func(o *Options) { o.MaxMissedPongs = 1001 },
		"Limits.QueueBytes is 2147483647":   func(o *Options) { o.Limits.QueueBytes = math.MaxInt32 },
		"Limits.FrameBytes is 109951162777": func(o *Options) { o.Limits.FrameBytes = 109951162777 },
		"AllowedOrigins[0]":                 func(o *Options) { o.AllowedOrigins = []string{"https://"} },
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

func TestEncodeJSON(t *testing.T) {
	t.Parallel()
	type user struct {
		Name string `json:"name"`
	}
	var nobody *user
	for name, tc := range map[string]struct {
		in   any
		want string // "": nil
		bad  bool
	}{
		"nil":              {in: nil},
		"nil pointer":      {in: nobody},
		"nil raw":          {in: json.RawMessage(nil)},
		"empty bytes":      {in: []byte{}},
		"raw null":         {in: json.RawMessage(" null ")},
		"raw is compacted": {in: json.RawMessage("{ \"b\" : 1.0,\n\"a\":12345678901234567890 }"), want: `{"b":1.0,"a":12345678901234567890}`},
		"bytes are JSON":   {in: []byte(`[1, 2]`), want: `[1,2]`},
		"struct":           {in: user{Name: "<Ann> & Ötzi"}, want: `{"name":"<Ann> & Ötzi"}`},
		"string":           {in: "x", want: `"x"`},
		"bad string":       {in: "x\xff", want: `"x\ufffd"`},
		"false":            {in: false, want: `false`},
		"map":              {in: map[string]any{"a": json.RawMessage(`{ "x": 1 }`)}, want: `{"a":{"x":1}}`},
		"not JSON":         {in: json.RawMessage(`{"a":`), bad: true},
		"two values":       {in: json.RawMessage(`{} {}`), bad: true},
		"blank":            {in: json.RawMessage("  "), bad: true},
		"not UTF-8":        {in: json.RawMessage("\"\xff\""), bad: true},
		"a channel":        {in: make(chan int), bad: true},
		"not a number":     {in: math.NaN(), bad: true},
	} {
		got, err := encodeJSON(tc.in)
		if tc.bad {
			assert.Error(t, err, name)
			continue
		}
		require.NoError(t, err, name)
		if tc.want == "" {
			assert.Nil(t, got, name)
			continue
		}
		assert.Equal(t, tc.want, string(got), name)
	}

	in := json.RawMessage(`{"a":1}`)
	got, err := encodeJSON(in)
	require.NoError(t, err)
	in[2] = 'z'
	assert.Equal(t, `{"a":1}`, string(got), "in memory of its own")
}
