package meshtest_test

import (
	"context"
	"fmt"
	"io"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// inBubble runs the test where time passes only when everybody waits.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Parallel()
	synctest.Test(t, test)
}

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
		require.Equal(t, int64(0), c.Exists(ctx, "k").Val(), "gone to the millisecond")

		after, err := c.Time(ctx).Result()
		require.NoError(t, err)
		require.Equal(t, 120*time.Millisecond, after.Sub(before))
		require.NoError(t, c.PExpireAt(ctx, "none", after).Err())
		require.NoError(t, c.Set(ctx, "k", "v", 0).Err())
		require.NoError(t, c.PExpireAt(ctx, "k", after.Add(time.Second)).Err())
		require.Equal(t, time.Second, c.PTTL(ctx, "k").Val())
	})
}

// hear subscribes to expired events and returns a channel of what comes.
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

// heard returns what has come by now. It is for bubbles only.
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

func TestEveryWayToSetATTLIsNoticed(t *testing.T) {
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
		time.Sleep(time.Second) // the key is only set by EXEC
		require.Empty(t, heard(events))
		require.NoError(t, conn.Do(ctx, "EXEC").Err())
		time.Sleep(100*time.Millisecond + meshtest.DefaultTick)
		require.Equal(t, []string{"__keyspace@3__:k expired", "__keyevent@3__:expired k"}, heard(events))
	})
}

func TestTouchingADeadKeyTellsAtOnce(t *testing.T) {
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

func TestOverTCP(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t, meshtest.WithAddr("127.0.0.1:0"))
	c := redis.NewClient(&redis.Options{Addr: r.Addr(), MaxRetries: -1, DialerRetries: 1})
	defer func() { require.NoError(t, c.Close()) }()
	require.NoError(t, c.Set(t.Context(), "k", "v", time.Hour).Err())
	require.Equal(t, "v", r.Client().Get(t.Context(), "k").Val(), "one Redis for both")

	r.Cut()
	require.Error(t, c.Get(t.Context(), "k").Err())
	require.Error(t, c.Get(t.Context(), "k").Err())
	r.Heal()
	require.Eventually(t, func() bool { return c.Get(t.Context(), "k").Val() == "v" }, 5*time.Second, time.Millisecond)
}

func TestOptionsAreChecked(t *testing.T) {
	t.Parallel()
	for name, opt := range map[string]meshtest.Option{
		"tick":   meshtest.WithTick(0),
		"addr":   meshtest.WithAddr("nonsense"),
		"events": meshtest.WithKeyspaceEvents("E?"),
	} {
		_, err := meshtest.NewRedis(opt)
		require.ErrorIs(t, err, meshtest.ErrOption, name)
	}
	_, err := meshtest.NewRedis(meshtest.WithAddr("192.0.2.1:0"))
	require.Error(t, err)
	require.NotErrorIs(t, err, meshtest.ErrOption)
}

func TestCloseIsFinal(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, err := meshtest.NewRedis()
		require.NoError(t, err)
		c, mine := r.Client(), r.Client()
		ps := mine.Subscribe(t.Context(), "x")
		_, err = ps.Receive(t.Context())
		require.NoError(t, err)
		require.NoError(t, ps.Close())
		require.NoError(t, mine.Close())
		conn, err := r.Dial()
		require.NoError(t, err)

		require.NoError(t, r.Close())
		require.NoError(t, r.Close())
		require.ErrorIs(t, c.Ping(t.Context()).Err(), redis.ErrClosed)
		_, err = conn.Read(make([]byte, 1))
		require.Error(t, err)
		require.NotErrorIs(t, err, io.ErrNoProgress)
		_, err = r.Dial()
		require.ErrorIs(t, err, meshtest.ErrClosed)
		require.ErrorIs(t, r.Restart(), meshtest.ErrClosed)
	})
}

// A subscriber that does not read must not stop anybody else.
func TestSlowSubscriberStallsNobody(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t).Client()
		ps := c.Subscribe(ctx, "ch")
		_, err := ps.Receive(ctx)
		require.NoError(t, err)
		for i := range 5000 {
			require.NoError(t, c.Publish(ctx, "ch", i).Err())
		}
		for i := range 5000 {
			m, err := ps.ReceiveMessage(ctx)
			require.NoError(t, err)
			require.Equal(t, fmt.Sprint(i), m.Payload)
		}
		require.NoError(t, ps.Close())
	})
}

func TestContextOfADeadCallerDoesNotConnect(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.Options().Dialer(ctx, "", "")
	require.ErrorIs(t, err, context.Canceled)
}

// Outside a bubble nothing is exact, and everything still comes.
func TestInRealTime(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c := meshtest.StartRedis(t, meshtest.WithKeyspaceEvents("Ex"), meshtest.WithTick(5*time.Millisecond)).Client()
	events := hear(t, c)
	began := time.Now()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 25 {
				if err := c.Set(ctx, fmt.Sprintf("k:%d:%d", i, j), 1, 40*time.Millisecond).Err(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	seen := map[string]bool{}
	for len(seen) < 200 {
		select {
		case e := <-events:
			require.False(t, seen[e], "twice: %s", e)
			seen[e] = true
		case <-time.After(10 * time.Second):
			t.Fatalf("%d of 200 events", len(seen))
		}
	}
	require.GreaterOrEqual(t, time.Since(began), 40*time.Millisecond)
	require.Empty(t, c.Keys(ctx, "*").Val())
}

// Who waits for a connection of the pool in a bubble leaves a timer behind that
// ends the process when somebody outside waits.
func TestNobodyWaitsForAConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		c := r.Client()
		r.Hang()
		var all sync.WaitGroup
		for range 500 {
			all.Go(func() { assert.NoError(t, c.Ping(t.Context()).Err()) })
		}
		synctest.Wait()
		r.Resume()
		all.Wait()
		assert.Zero(t, c.PoolStats().WaitCount)
	})
}
