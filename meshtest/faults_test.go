package meshtest_test

import (
	"context"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// once returns a client that makes one attempt of everything.
func once(t *testing.T, r *meshtest.Redis) *redis.Client {
	t.Helper()
	opts := r.Options()
	opts.MaxRetries, opts.DialerRetries, opts.ContextTimeoutEnabled = -1, 1, true
	c := redis.NewClient(opts)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func TestCutAndHeal(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		r := meshtest.StartRedis(t)
		c := once(t, r)
		ps := c.Subscribe(ctx, "ch")
		defer func() { require.NoError(t, ps.Close()) }()
		_, err := ps.Receive(ctx)
		require.NoError(t, err)
		require.NoError(t, c.Set(ctx, "k", "v", 0).Err())

		r.Cut()
		require.ErrorIs(t, c.Get(ctx, "k").Err(), syscall.ECONNRESET)
		require.ErrorIs(t, c.Get(ctx, "k").Err(), syscall.ECONNREFUSED)
		_, err = ps.Receive(ctx)
		require.Error(t, err)
		r.Heal()
		require.Equal(t, "v", c.Get(ctx, "k").Val(), "the data is kept")
	})
}

// go-redis keeps dialling a Redis that refused many connections, even after its client
// was closed. In a bubble none of those goroutines may be left.
func TestPermanentCutLeavesNoGoroutine(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		opts := r.Options()
		opts.PoolSize = 3
		mine := redis.NewClient(opts)
		defer func() { require.NoError(t, mine.Close()) }()
		r.Cut()
		for range 30 {
			require.Error(t, r.Client().Ping(t.Context()).Err())
			require.Error(t, mine.Ping(t.Context()).Err())
		}
		c := r.Client()
		for range c.Options().PoolSize {
			require.Error(t, c.Ping(t.Context()).Err())
		}
	})
}

// If a caller gives up waiting, its client still dials. Close waits for that too.
func TestCutDuringADialLeavesNoGoroutine(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		c := r.Client()
		r.Cut()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		require.Error(t, c.Ping(ctx).Err())
	})
}

func TestCutOnceLosesMessages(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		r := meshtest.StartRedis(t)
		c := r.Client()
		ps := c.Subscribe(ctx, "ch")
		defer func() { require.NoError(t, ps.Close()) }()
		in := ps.ChannelWithSubscriptions()
		require.IsType(t, &redis.Subscription{}, <-in)

		r.CutOnce()
		require.IsType(t, &redis.Subscription{}, <-in, "subscribed again by itself")
		require.NoError(t, c.Publish(ctx, "ch", "x").Err())
		require.Equal(t, "x", (<-in).(*redis.Message).Payload)
	})
}

func TestHangAndResume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		c := once(t, r)
		require.NoError(t, c.Ping(t.Context()).Err())
		r.Hang()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began := time.Now()
		require.Error(t, c.Incr(ctx, "n").Err())
		require.Equal(t, time.Second, time.Since(began))
		r.Resume()
		synctest.Wait()
		require.Equal(t, "1", c.Get(t.Context(), "n").Val(), "it ran later, without an answer")
	})
}

func TestRestartForgetsEverything(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		r := meshtest.StartRedis(t)
		c := r.Client()
		script := redis.NewScript("return 1")
		require.NoError(t, script.Load(ctx, c).Err())
		require.NoError(t, c.Set(ctx, "k", 1, time.Minute).Err())
		require.NoError(t, c.ConfigSet(ctx, "notify-keyspace-events", "Ex").Err())
		id := r.RunID()

		late := once(t, r)
		require.NoError(t, late.Ping(ctx).Err())
		r.Hang()
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := late.Set(ctx, "late", 1, 0).Err(); err == nil {
				t.Error("a process that has ended answered")
			}
		})
		synctest.Wait()
		require.NoError(t, r.Restart())
		wg.Wait()
		synctest.Wait()

		require.Empty(t, c.Keys(ctx, "*").Val())
		require.ErrorContains(t, c.EvalSha(ctx, script.Hash(), nil).Err(), "NOSCRIPT")
		require.Equal(t, "", c.ConfigGet(ctx, "notify-keyspace-events").Val()["notify-keyspace-events"])
		require.NotEqual(t, id, r.RunID())
		time.Sleep(2 * time.Minute) // past the old key's time: it has no effect
	})
}

func TestSetErrorAndFlushAll(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	r := meshtest.StartRedis(t)
	c := once(t, r)
	require.NoError(t, c.Set(ctx, "k", 1, 0).Err())
	r.SetError("OOM command not allowed when used memory > 'maxmemory'.")
	require.ErrorContains(t, c.Get(ctx, "k").Err(), "OOM ")
	r.SetError("")
	require.Equal(t, "1", c.Get(ctx, "k").Val())
	r.FlushAll()
	require.Equal(t, int64(0), c.DBSize(ctx).Val())
	require.Empty(t, r.Mini().Keys())
}

func TestBlockingCommandsDoNotBlockOthers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ctx := t.Context()
		c := meshtest.StartRedis(t).Client()
		var wg sync.WaitGroup
		wg.Go(func() {
			got, err := c.BLPop(ctx, time.Minute, "q").Result()
			if err != nil || got[1] != "x" {
				t.Errorf("%v, %v", got, err)
			}
		})
		synctest.Wait()
		require.NoError(t, c.RPush(ctx, "q", "x").Err())
		wg.Wait()
	})
}

func TestNextStale(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := meshtest.StartRedis(t)
		srv, err := mesh.NewServer(mesh.Options{Redis: r.Client()})
		require.NoError(t, err)
		require.NoError(t, srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		ann := meshtest.StartServer(t, srv).Connect(t)
		ann.Subscribe("lobby")
		r.Cut()
		require.Equal(t, meshtest.Stale{Stale: true}, ann.NextStale())
		r.Heal()
		require.Equal(t, meshtest.Stale{}, ann.NextStale())
	})
}
