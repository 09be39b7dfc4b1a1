package store

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// listen starts a listener and stops it at the end of the test.
func listen(t *testing.T, client redis.UniversalClient, h Handler, patterns ...string) *Listener {
	l := NewListener(ListenerConfig{Client: client, Handler: h, Name: "test", Patterns: patterns})
	l.Start()
	t.Cleanup(l.Stop)
	return l
}

func TestListenerKilled(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	ctx := t.Context()
	h := &heard{}
	l := listen(t, client, h)
	l.Add("a", "b")
	require.NoError(t, l.Ready(ctx, "a", "b"))
	for i := range 5 {
		require.NoError(t, client.Publish(ctx, "a", i).Err())
		h.await(t, fmt.Sprint("message a ", i))
		n, err := client.ClientKillByFilter(ctx, "TYPE", "pubsub").Result()
		require.NoError(t, err)
		require.Positive(t, n)
		h.await(t, "lost")
		h.await(t, "subscribed a true")
		require.NoError(t, l.Ready(ctx, "a", "b"))
	}
}

func TestListenerRestart(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	client := s.Client(t)
	h := &heard{}
	l := listen(t, client, h)
	l.Add("a")
	require.NoError(t, l.Ready(t.Context(), "a"))
	s.Kill()
	h.await(t, "lost")
	l.Add("b")
	s.Restart(true)
	require.NoError(t, l.Ready(t.Context(), "a", "b"))
	h.await(t, "subscribed b false")
	require.NoError(t, client.Publish(t.Context(), "b", "x").Err())
	h.await(t, "message b x")
}

func TestListenerForbidden(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	ctx := t.Context()
	require.NoError(t, client.Do(ctx, "ACL", "SETUSER", "poor", "on", "nopass", "~*", "+@all", "resetchannels", "&mine:*").Err())
	poor := redis.NewClient(&redis.Options{Addr: client.Options().Addr, Username: "poor", Password: "x"})
	defer poor.Close()
	l := listen(t, poor, &heard{})
	l.Add("theirs")
	require.Eventually(t, func() bool { return l.subs.failure() != nil }, 2*time.Minute, time.Millisecond)
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	err := l.Ready(short, "theirs")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	assert.True(t, redis.IsPermissionError(err), "%v", err)
	l.Remove("theirs")
	l.Add("mine:1")
	require.NoError(t, l.Ready(ctx, "mine:1"))
}

// TestListenerStorm adds and removes channels at random while connections are killed.
// In the end Redis and the listener agree with the wanted channels, and every channel
// was confirmed after its last Add.
func TestListenerStorm(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	ctx := t.Context()
	h := &heard{}
	l := listen(t, client, h)
	wanted := make(map[string]bool)
	for round := range 300 {
		for range 20 {
			c := fmt.Sprint("c", rand.IntN(200))
			if rand.IntN(2) == 0 {
				l.Add(c)
				wanted[c] = true
			} else {
				l.Remove(c)
				delete(wanted, c)
			}
		}
		switch {
		case round%50 == 25:
			require.NoError(t, client.ClientKillByFilter(ctx, "TYPE", "pubsub").Err())
		case round%50 == 49:
			l.Recreate()
		}
		h.take()
	}
	h.take()
	var names []string
	for c := range wanted {
		l.Remove(c)
		l.Add(c)
		names = append(names, c)
	}
	require.NoError(t, l.Ready(ctx, names...))
	require.Eventually(t, func() bool {
		on, err := client.PubSubChannels(ctx, "*").Result()
		slices.Sort(on)
		slices.Sort(names)
		return err == nil && slices.Equal(on, names)
	}, 2*time.Minute, 10*time.Millisecond)
	for _, c := range names {
		require.NoError(t, client.Publish(ctx, c, "x").Err())
	}
	h.await(t, "message "+names[len(names)-1]+" x")
	l.Stop()
	require.Len(t, l.subs.all, len(names))
}

func TestListenerMany(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t).Client(t)
	ctx := t.Context()
	l := listen(t, client, &heard{})
	var names []string
	for i := range 5000 {
		names = append(names, fmt.Sprint("room:", i))
		l.Add(names[i])
	}
	require.NoError(t, l.Ready(ctx, names...))
	info, err := client.InfoMap(ctx, "commandstats").Result()
	require.NoError(t, err)
	var calls int
	_, err = fmt.Sscanf(info["Commandstats"]["cmdstat_subscribe"], "calls=%d,", &calls)
	require.NoError(t, err)
	require.LessOrEqual(t, calls, 30, "coalesced into few commands")
}
