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

// inBubble runs the test in a synctest bubble, where time moves on only when all
// goroutines wait.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Parallel()
	synctest.Test(t, test)
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
	require.Eventually(t, func() bool { return c.Get(t.Context(), "k").Val() == "v" }, 2*time.Minute, time.Millisecond)
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

// A subscriber that does not read must not stop the others.
func TestSlowSubscriberDoesNotBlockOthers(t *testing.T) {
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

func TestDialWithACancelledContext(t *testing.T) {
	t.Parallel()
	r := meshtest.StartRedis(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.Options().Dialer(ctx, "", "")
	require.ErrorIs(t, err, context.Canceled)
}

// In real time nothing is exact, but every event comes.
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
		case <-time.After(2 * time.Minute):
			t.Fatalf("%d of 200 events", len(seen))
		}
	}
	require.GreaterOrEqual(t, time.Since(began), 40*time.Millisecond)
	require.Empty(t, c.Keys(ctx, "*").Val())
}

// A caller that waits for a connection of the pool in a bubble leaves a timer behind. If
// a caller outside of the bubble then waits, the process ends.
func TestPoolIsLargeEnough(t *testing.T) {
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
