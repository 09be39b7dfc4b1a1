package redistest

import (
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// setup returns a server, a proxy to it, a client that has connected through the proxy,
// and a client without the proxy.
func setup(t *testing.T) (*Server, *ProxyServer, *redis.Client, *redis.Client) {
	t.Helper()
	s := Start(t)
	p := Proxy(t, s.Addr())
	through := once(t, p.Addr())
	require.NoError(t, through.Ping(t.Context()).Err())
	require.Equal(t, 1, p.Connections())
	return s, p, through, s.Client(t)
}

// comes waits until the key has the value.
func comes(t *testing.T, c *redis.Client, key, value string) {
	t.Helper()
	require.Eventually(t, func() bool { return c.Get(t.Context(), key).Val() == value },
		2*time.Minute, 2*time.Millisecond)
}

func TestProxyPassesOn(t *testing.T) {
	t.Parallel()
	_, p, c, past := setup(t)
	big := make([]byte, 5*chunkSize+7)
	require.NoError(t, c.Set(t.Context(), "k", big, 0).Err())
	require.Equal(t, string(big), past.Get(t.Context(), "k").Val())
	require.Equal(t, string(big), c.Get(t.Context(), "k").Val())
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return p.Connections() == 0 }, 2*time.Minute, time.Millisecond)
}

func TestProxyCut(t *testing.T) {
	t.Parallel()
	_, p, c, _ := setup(t)
	p.Cut()
	require.Error(t, c.Ping(t.Context()).Err())
	require.Error(t, c.Ping(t.Context()).Err())
	p.Heal()
	require.NoError(t, c.Ping(t.Context()).Err())
	p.CutOnce()
	require.Eventually(t, func() bool { return c.Ping(t.Context()).Err() == nil }, 2*time.Minute, time.Millisecond)
}

func TestProxyBlackHole(t *testing.T) {
	t.Parallel()
	s, p, c, past := setup(t)
	ps := c.Subscribe(t.Context(), "ch")
	defer func() { require.NoError(t, ps.Close()) }()
	_, err := ps.Receive(t.Context())
	require.NoError(t, err)

	p.BlackHole(true)
	unanswered(t, c.Set(soon(t), "k", "v", 0).Err())
	unanswered(t, c.Set(soon(t), "k", "v", 0).Err(), "on a new connection")
	require.Equal(t, int64(1), past.Publish(t.Context(), "ch", "lost").Val(), "the server still counts the subscriber")
	_, err = ps.ReceiveTimeout(t.Context(), 100*time.Millisecond)
	require.Error(t, err)

	p.BlackHole(false)
	require.NoError(t, c.Set(t.Context(), "k2", "v", 0).Err(), "a new connection gets through")
	require.Equal(t, int64(0), past.Exists(t.Context(), "k").Val())
	s.Kill()
	p.BlackHole(true)
	unanswered(t, c.Ping(soon(t)).Err(), "not even a refusal")
}

func TestProxyDropReplies(t *testing.T) {
	t.Parallel()
	_, p, c, past := setup(t)
	p.DropReplies(true)
	unanswered(t, c.Incr(soon(t), "n").Err())
	comes(t, past, "n", "1")
	p.DropReplies(false)
	require.Equal(t, int64(2), c.Incr(t.Context(), "n").Val())
}

func TestProxyDropRequests(t *testing.T) {
	t.Parallel()
	_, p, c, past := setup(t)
	ps := c.Subscribe(t.Context(), "ch")
	defer func() { require.NoError(t, ps.Close()) }()
	_, err := ps.Receive(t.Context())
	require.NoError(t, err)
	p.DropRequests(true)
	unanswered(t, c.Incr(soon(t), "n").Err())
	require.Equal(t, int64(1), past.Publish(t.Context(), "ch", "m").Val())
	_, err = ps.ReceiveMessage(t.Context())
	require.NoError(t, err, "the other way is open")
	p.DropRequests(false)
	require.Equal(t, int64(1), c.Incr(t.Context(), "n").Val())
}

func TestProxyHalfOpen(t *testing.T) {
	t.Parallel()
	_, p, c, past := setup(t)
	p.HalfOpen(Replies)
	unanswered(t, c.Incr(soon(t), "n").Err())
	comes(t, past, "n", "1")
	require.Equal(t, int64(2), c.Incr(t.Context(), "n").Val(), "a new connection is whole")
	p.HalfOpen(Requests)
	unanswered(t, c.Incr(soon(t), "n").Err())
	require.Equal(t, int64(3), c.Incr(t.Context(), "n").Val())
}

func TestProxyStallDeliversLate(t *testing.T) {
	t.Parallel()
	_, p, c, past := setup(t)
	p.Stall(true)
	unanswered(t, c.Set(soon(t), "k", "late", 0).Err())
	require.NoError(t, c.Close(), "the sender is gone")
	require.Equal(t, int64(0), past.Exists(t.Context(), "k").Val())
	p.Heal()
	comes(t, past, "k", "late")
	require.Eventually(t, func() bool { return p.Connections() == 0 }, 2*time.Minute, time.Millisecond)
}

func TestProxyDelay(t *testing.T) {
	t.Parallel()
	_, p, c, _ := setup(t)
	const d = 40 * time.Millisecond
	p.Delay(d)
	began := time.Now()
	require.NoError(t, c.Ping(t.Context()).Err())
	require.GreaterOrEqual(t, time.Since(began), 2*d)
	p.Delay(0)
	require.NoError(t, c.Ping(t.Context()).Err())
}

func TestProxyWithoutTarget(t *testing.T) {
	t.Parallel()
	s := Start(t)
	p := Proxy(t, s.Addr())
	s.Kill()
	c := once(t, p.Addr())
	require.Error(t, c.Ping(t.Context()).Err())
	s.Restart(false)
	require.NoError(t, c.Ping(t.Context()).Err())
}
