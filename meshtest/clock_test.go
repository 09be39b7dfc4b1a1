package meshtest_test

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

func TestScriptsTimeAndTTLsShareOneClock(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t).Client()
		script := redis.NewScript(`
			local now = redis.call('TIME')
			redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
			return {now[1], now[2], redis.call('PTTL', KEYS[1])}`)

		time.Sleep(49 * time.Millisecond) // off every tick
		before, err := c.Time(ctx).Result()
		require.NoError(t, err)
		require.True(t, before.Equal(time.Now()), "TIME %v at %v", before, time.Now())
		got, err := script.Run(ctx, c, []string{"k"}, "v", 120).Slice()
		require.NoError(t, err)
		require.Equal(t, int64(120), got[2])

		time.Sleep(119 * time.Millisecond)
		ttl, err := c.PTTL(ctx, "k").Result()
		require.NoError(t, err)
		require.Equal(t, time.Millisecond, ttl)
		time.Sleep(time.Millisecond)
		require.Equal(t, int64(0), c.Exists(ctx, "k").Val(), "gone at the exact millisecond")

		after, err := c.Time(ctx).Result()
		require.NoError(t, err)
		require.Equal(t, 120*time.Millisecond, after.Sub(before))
		require.NoError(t, c.PExpireAt(ctx, "none", after).Err())
		require.NoError(t, c.Set(ctx, "k", "v", 0).Err())
		require.NoError(t, c.PExpireAt(ctx, "k", after.Add(time.Second)).Err())
		require.Equal(t, time.Second, c.PTTL(ctx, "k").Val())
	})
}

// hear subscribes to expired events and returns a channel that receives them.
func hear(t *testing.T, c *redis.Client) <-chan string {
	t.Helper()
	ps := c.PSubscribe(t.Context(), "__key*__:*")
	_, err := ps.Receive(t.Context())
	require.NoError(t, err)
	out := make(chan string, 1000)
	in := ps.Channel()
	var wg sync.WaitGroup
	wg.Go(func() {
		for m := range in {
			out <- m.Channel + " " + m.Payload
		}
	})
	t.Cleanup(func() {
		require.NoError(t, ps.Close())
		wg.Wait()
	})
	return out
}

// heard returns the events that have come by now. Use it in bubbles only.
func heard(ch <-chan string) []string {
	synctest.Wait()
	var out []string
	for {
		select {
		case s := <-ch:
			out = append(out, s)
		default:
			return out
		}
	}
}

func TestExpiredEvents(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t, meshtest.WithKeyspaceEvents("Ex")).Client()
		events := hear(t, c)

		require.NoError(t, c.Set(ctx, "plain", 1, 0).Err())
		require.NoError(t, c.Set(ctx, "deleted", 1, 500*time.Millisecond).Err())
		require.NoError(t, c.Set(ctx, "kept", 1, 500*time.Millisecond).Err())
		require.NoError(t, c.Set(ctx, "longer", 1, 500*time.Millisecond).Err())
		require.NoError(t, c.Set(ctx, "b", 1, 600*time.Millisecond).Err())
		require.NoError(t, c.Set(ctx, "a", 1, 601*time.Millisecond).Err())
		require.NoError(t, c.Del(ctx, "deleted").Err())
		require.NoError(t, c.Persist(ctx, "kept").Err())
		require.NoError(t, c.Set(ctx, "longer", 2, time.Minute).Err())
		require.NoError(t, c.Set(ctx, "shorter", 1, time.Minute).Err())
		require.NoError(t, c.PExpire(ctx, "shorter", 700*time.Millisecond).Err())

		time.Sleep(599 * time.Millisecond)
		require.Empty(t, heard(events))
		time.Sleep(meshtest.DefaultTick + 2*time.Millisecond)
		require.Equal(t, []string{"__keyevent@0__:expired b", "__keyevent@0__:expired a"}, heard(events))
		time.Sleep(time.Minute)
		require.Equal(t, []string{"__keyevent@0__:expired shorter", "__keyevent@0__:expired longer"}, heard(events))
		require.Equal(t, int64(2), c.Exists(ctx, "plain", "kept").Val())
	})
}

func TestEveryCommandWithATTLIsNoticed(t *testing.T) {
	ways := map[string][]any{
		"SET EX":    {"SET", "k", "v", "EX", 2},
		"SET PXAT":  {"SET", "k", "v", "PXAT", "at"},
		"SETEX":     {"SETEX", "k", 2, "v"},
		"PSETEX":    {"PSETEX", "k", 2000, "v"},
		"GETEX":     {"GETEX", "old", "EX", 2},
		"EXPIRE":    {"EXPIRE", "old", 2},
		"PEXPIRE":   {"PEXPIRE", "old", 2000},
		"PEXPIREAT": {"PEXPIREAT", "old", "at"},
		"RENAME":    {"RENAME", "mortal", "k"},
		"COPY":      {"COPY", "mortal", "k"},
		"EVAL":      {"EVAL", "return redis.call('SET', KEYS[1], 'v', 'PX', 2000)", 1, "k"},
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				ctx := t.Context()
				c := meshtest.StartRedis(t, meshtest.WithKeyspaceEvents("Ex")).Client()
				events := hear(t, c)
				require.NoError(t, c.Set(ctx, "old", 1, 0).Err())
				require.NoError(t, c.Set(ctx, "mortal", 1, 2*time.Second).Err())
				for i, arg := range way {
					if arg == "at" {
						way[i] = time.Now().Add(2 * time.Second).UnixMilli()
					}
				}
				require.NoError(t, c.Do(ctx, way...).Err())
				time.Sleep(1990 * time.Millisecond)
				require.Empty(t, heard(events))
				time.Sleep(10*time.Millisecond + meshtest.DefaultTick)
				got := heard(events)
				want := "__keyevent@0__:expired k"
				if s, ok := way[1].(string); ok && s == "old" {
					want = "__keyevent@0__:expired old"
				}
				require.Contains(t, got, want)
			})
		})
	}
}

func TestExpiredEventOfTransactionAndOtherDatabase(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		r := meshtest.StartRedis(t, meshtest.WithKeyspaceEvents("KEA"))
		events := hear(t, r.Client())
		opts := r.Options()
		opts.DB = 3
		c := redis.NewClient(opts)
		defer func() { require.NoError(t, c.Close()) }()

		conn := c.Conn()
		defer func() { require.NoError(t, conn.Close()) }()
		for _, cmd := range [][]any{{"MULTI"}, {"SET", "k", "v", "PX", 100}} {
			require.NoError(t, conn.Do(ctx, cmd...).Err())
		}
		time.Sleep(time.Second) // only EXEC sets the key
		require.Empty(t, heard(events))
		require.NoError(t, conn.Do(ctx, "EXEC").Err())
		time.Sleep(100*time.Millisecond + meshtest.DefaultTick)
		require.Equal(t, []string{"__keyspace@3__:k expired", "__keyevent@3__:expired k"}, heard(events))
	})
}

func TestWritingAnExpiredKeyPublishesItsEvent(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t, meshtest.WithKeyspaceEvents("Ex"), meshtest.WithTick(time.Minute)).Client()
		events := hear(t, c)
		require.NoError(t, c.Set(ctx, "k", 1, 10*time.Millisecond).Err())
		time.Sleep(10 * time.Millisecond)
		require.Empty(t, heard(events))
		require.NoError(t, c.Set(ctx, "k", 2, time.Hour).Err())
		require.Equal(t, []string{"__keyevent@0__:expired k"}, heard(events))
	})
}

func TestWithoutExpiredEvents(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t, meshtest.WithoutExpiredEvents(), meshtest.WithKeyspaceEvents("Ex")).Client()
		events := hear(t, c)
		require.NoError(t, c.Set(ctx, "k", 1, 10*time.Millisecond).Err())
		time.Sleep(time.Second)
		require.Empty(t, heard(events))
		require.Equal(t, int64(0), c.Exists(ctx, "k").Val())
	})
}

func TestAdvanceStepsTheClock(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		r := meshtest.StartRedis(t, meshtest.WithKeyspaceEvents("Ex"))
		c := r.Client()
		events := hear(t, c)
		require.NoError(t, c.Set(ctx, "soon", 1, time.Minute).Err())
		require.NoError(t, c.Set(ctx, "later", 1, 3*time.Minute).Err())
		r.Advance(2 * time.Minute)
		require.Equal(t, []string{"__keyevent@0__:expired soon"}, heard(events))
		require.Equal(t, time.Minute, c.PTTL(ctx, "later").Val())
		require.True(t, c.Time(ctx).Val().Equal(time.Now().Add(2*time.Minute)))
		require.True(t, r.Now().Equal(time.Now().Add(2*time.Minute)))

		r.Advance(-time.Minute)
		require.Equal(t, 2*time.Minute, c.PTTL(ctx, "later").Val())
		time.Sleep(2*time.Minute + meshtest.DefaultTick)
		require.Equal(t, []string{"__keyevent@0__:expired later"}, heard(events))
	})
}
