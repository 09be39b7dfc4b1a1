package mesh

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

var plainKeys = keys.Space{Prefix: "mesh:", Spread: 1}

// expiryLog records the expired events and the log lines of an expiryListener.
type expiryLog struct {
	*expiryListener
	mu     sync.Mutex // guards the fields below
	events []string
	logs   []string
}

func newExpiryLog(client redis.UniversalClient, names keys.Space) *expiryLog {
	h := &expiryLog{}
	h.expiryListener = newExpiryListener(expiryConfig{
		Client: client, Keys: names, Logger: slog.New(h),
		OnExpired: func(e keys.Expired) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.events = append(h.events, fmt.Sprintf("%c %s %s", e.Kind, e.Room, e.Conn))
		},
	})
	return h
}

func (h *expiryLog) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }
func (h *expiryLog) WithAttrs([]slog.Attr) slog.Handler           { return h }
func (h *expiryLog) WithGroup(string) slog.Handler                { return h }
func (h *expiryLog) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.String()
		return true
	})
	h.mu.Lock()
	defer h.mu.Unlock()
	h.logs = append(h.logs, text)
	return nil
}

func (h *expiryLog) received() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.events...)
}

func (h *expiryLog) logged() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.logs...)
}

func TestExpiryListenerReceives(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		client := meshtest.StartRedis(t).Client()
		h := newExpiryLog(client, plainKeys)
		h.Start(t.Context())
		defer h.Stop()
		require.True(t, h.Working())
		for _, key := range []string{
			plainKeys.Conn("a:b", "c"), "mesh:presence:seq:a", "elsewhere", plainKeys.State("a\n", "d"),
		} {
			require.NoError(t, client.Set(t.Context(), key, "", time.Second).Err())
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.ElementsMatch(t, []string{"c a:b c", "s a\n d"}, h.received())
		time.Sleep(5 * time.Minute)
		require.True(t, h.Working())
		require.Empty(t, h.logged())
	})
}

func TestExpiryListenerWithoutEvents(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := meshtest.StartRedis(t, meshtest.WithConfigForbidden())
		h := newExpiryLog(s.Client(), plainKeys)
		began := time.Now()
		h.Start(t.Context())
		defer h.Stop()
		require.LessOrEqual(t, time.Since(began), expiredKnownWithin)
		synctest.Wait()
		require.False(t, h.Working())
		logs := h.logged()
		require.Len(t, logs, 1)
		require.Contains(t, logs[0], "notify-keyspace-events to include Ex")
		require.Contains(t, logs[0], "__keyevent@0__:expired")
		for range 5 { // neither time nor an outage repeats the warning
			time.Sleep(2 * time.Minute)
			s.CutOnce()
		}
		require.Len(t, h.logged(), 1)
	})
}

func TestExpiryListenerWhileRedisIsAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := meshtest.StartRedis(t)
		s.Cut()
		h := newExpiryLog(s.Client(), plainKeys)
		began := time.Now()
		h.Start(t.Context())
		defer h.Stop()
		require.LessOrEqual(t, time.Since(began), expiredKnownWithin)
		require.False(t, h.Working())
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		h.Start(ended) // waits no longer than its context
		s.Heal()
		time.Sleep(10 * time.Second)
		require.True(t, h.Working())
		require.Empty(t, h.logged())
	})
}

func TestExpiryListenerOnRedis(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Args("--notify-keyspace-events", "Kg"))
	ctx := t.Context()
	client := redis.NewClient(&redis.Options{Addr: s.Addr(), DB: 2})
	defer client.Close()
	names := keys.Space{Prefix: "mesh:", DB: 2, Spread: 1}
	h := newExpiryLog(client, names)
	h.Start(ctx)
	defer h.Stop()
	require.True(t, h.Working())
	require.Equal(t, "gxKE", client.ConfigGet(ctx, "notify-keyspace-events").Val()["notify-keyspace-events"])
	require.NoError(t, client.Set(ctx, names.Conn("r", "c"), "", 20*time.Millisecond).Err())
	require.Eventually(t, func() bool {
		client.Exists(ctx, names.Conn("r", "c"))
		return len(h.received()) > 0
	}, 2*time.Minute, 5*time.Millisecond)
	h.Stop()
	require.Equal(t, []string{"c r c"}, h.received())
	require.Empty(t, h.logged())
}

func TestExpiryListenerWithoutCONFIG(t *testing.T) {
	t.Parallel()
	client := redistest.Start(t, redistest.Args("--rename-command", "CONFIG", "")).Client(t)
	h := newExpiryLog(client, plainKeys)
	h.Start(t.Context())
	defer h.Stop()
	require.Eventually(t, func() bool { return len(h.logged()) > 0 }, 2*time.Minute, 5*time.Millisecond)
	require.False(t, h.Working())
	require.NoError(t, client.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	require.Eventually(t, func() bool { // the setting and the canary key were checked again
		n, _ := client.InfoMap(t.Context(), "commandstats").Result()
		return strings.HasPrefix(n["Commandstats"]["cmdstat_set"], "calls=2,")
	}, 2*time.Minute, 5*time.Millisecond)
	h.Stop()
	require.Len(t, h.logged(), 1)
}
