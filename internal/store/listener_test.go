package store

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/wait"
)

// heard records the calls of a Listener.
type heard struct {
	mu    sync.Mutex // guards calls
	calls []string
}

func (h *heard) Message(channel, payload string) { h.note("message " + channel + " " + payload) }
func (h *heard) Subscribed(channel string, again bool) {
	h.note(fmt.Sprintf("subscribed %s %t", channel, again))
}
func (h *heard) Disconnected() { h.note("lost") }

func (h *heard) note(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls = append(h.calls, what)
}

// take returns the calls since the last take.
func (h *heard) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	calls := h.calls
	h.calls = nil
	return calls
}

// await waits for a call, and drops the calls up to it.
func (h *heard) await(t *testing.T, what string) {
	t.Helper()
	require.Eventually(t, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		i := slices.Index(h.calls, what)
		if i >= 0 {
			h.calls = h.calls[i+1:]
		}
		return i >= 0
	}, 2*time.Minute, time.Millisecond, "no call: %s", what)
}

// warnings counts the records of a level or above.
type warnings struct {
	slog.Handler
	level slog.Level
	n     *atomic.Int64
}

func newWarnings(level slog.Level) warnings {
	return warnings{slog.DiscardHandler, level, new(atomic.Int64)}
}

func (w warnings) Enabled(_ context.Context, l slog.Level) bool { return l >= w.level }
func (w warnings) WithAttrs([]slog.Attr) slog.Handler           { return w }
func (w warnings) WithGroup(string) slog.Handler                { return w }
func (w warnings) Handle(context.Context, slog.Record) error {
	w.n.Add(1)
	return nil
}

// bubbleRedis returns a miniredis without a network, for use in a synctest bubble.
func bubbleRedis(t *testing.T, dial ...func() error) (*miniredis.Miniredis, *redis.Client) {
	m := miniredis.NewMiniRedis()
	conn, err := m.Dial() // starts it without a port
	require.NoError(t, err)
	require.NoError(t, conn.Close())
	client := redis.NewClient(&redis.Options{
		Addr: "127.0.0.1:1", // an IP literal, so that nothing outside the bubble is looked up
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			for _, f := range dial {
				if err := f(); err != nil {
					return nil, err
				}
			}
			return m.Dial()
		},
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	return m, client
}

func TestSubscriptionsStaleConfirmation(t *testing.T) {
	t.Parallel()
	var s channelSubs
	s.init(nil)
	confirm := func(kind string) (report, again bool) {
		report, again, _ = s.confirm(&redis.Subscription{Kind: kind, Channel: "a"})
		return report, again
	}
	next := func() string {
		b, _ := s.next()
		return fmt.Sprint(b.kind, b.names)
	}
	s.add([]string{"a"})
	require.Equal(t, "subscribe[a]", next())
	s.remove([]string{"a"})
	s.add([]string{"a"})
	_, idle := s.next()
	require.False(t, idle, "one command at a time")
	report, _ := confirm("subscribe")
	require.False(t, report, "that was for the Add before")
	require.False(t, s.deliverable(&redis.Message{Channel: "a"}))
	require.Equal(t, "subscribe[a]", next())
	report, again := confirm("subscribe")
	require.True(t, report)
	require.False(t, again)
	require.True(t, s.deliverable(&redis.Message{Channel: "a"}))

	// An UNSUBSCRIBE is under way when the channel is wanted again.
	s.remove([]string{"a"})
	require.Equal(t, "unsubscribe[a]", next())
	s.add([]string{"a"})
	report, _ = confirm("unsubscribe")
	require.False(t, report)
	require.Equal(t, "subscribe[a]", next())
	report, again = confirm("subscribe")
	require.True(t, report)
	require.False(t, again)

	// Confirmations without a command: the client reconnected by itself.
	report, again = confirm("subscribe")
	require.True(t, report)
	require.True(t, again)
	confirm("unsubscribe")
	require.False(t, s.deliverable(&redis.Message{Channel: "a"}))
	require.Equal(t, "subscribe[a]", next())
	_, again = confirm("subscribe")
	require.True(t, again)

	// Nothing is kept of a channel that is not wanted.
	s.remove([]string{"a"})
	require.Equal(t, "unsubscribe[a]", next())
	confirm("unsubscribe")
	require.Equal(t, "unsubscribe[]", next())
	require.Empty(t, s.all)
	require.Empty(t, s.dirty)
	require.False(t, s.anyWanted())
}

func TestSubscriptionsBatches(t *testing.T) {
	t.Parallel()
	var s channelSubs
	s.init([]string{"p*"})
	var names []string
	for i := range maxNames + 10 {
		names = append(names, fmt.Sprint("c", i))
	}
	s.add(names)
	s.add(names)
	var got []string
	var sizes []int
	for {
		b, _ := s.next()
		if len(b.names) == 0 {
			break
		}
		sizes = append(sizes, len(b.names))
		got = append(got, b.names...)
		for _, n := range b.names {
			s.confirm(&redis.Subscription{Kind: b.kind, Channel: n})
		}
	}
	require.Equal(t, []int{maxNames, 10, 1}, sizes)
	require.ElementsMatch(t, append(names, "p*"), got)
	s.reset(nil)
	b, _ := s.next()
	require.Len(t, b.names, maxNames, "a new connection subscribes again")
}

func TestReconnectPause(t *testing.T) {
	t.Parallel()
	for failures := 1; failures < 80; failures++ {
		d := wait.Jitter(reconnectPause.After(failures), 0.5)
		require.GreaterOrEqual(t, d, reconnectPause.First/2)
		require.LessOrEqual(t, d, reconnectPause.Last)
	}
}

func TestListenerInBubble(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		defer m.Close()
		defer client.Close()
		h := &heard{}
		l := NewListener(ListenerConfig{Client: client, Handler: h, Patterns: []string{"p:*"}})
		l.Add("a", "b", "a")
		l.Start()
		defer l.Stop()
		require.NoError(t, l.Ready(t.Context(), "a", "b", "p:*"))
		synctest.Wait()
		require.ElementsMatch(t, []string{"subscribed a false", "subscribed b false", "subscribed p:* false"}, h.take())

		m.Publish("a", "1")
		synctest.Wait()
		m.Publish("p:x", "2")
		synctest.Wait()
		require.Equal(t, []string{"message a 1", "message p:x 2"}, h.take())

		// A channel that is removed and added again at once is confirmed again.
		l.Remove("a")
		l.Add("a")
		require.NoError(t, l.Ready(t.Context(), "a"))
		synctest.Wait()
		m.Publish("a", "3")
		synctest.Wait()
		require.Equal(t, []string{"subscribed a false", "message a 3"}, h.take())

		l.Remove("b")
		require.ErrorIs(t, l.Ready(t.Context(), "b"), ErrNotWanted)
		synctest.Wait()
		require.Equal(t, map[string]int{"b": 0}, m.PubSubNumSub("b"))

		l.Recreate()
		synctest.Wait()
		require.Equal(t, []string{"lost"}, h.take())
		require.NoError(t, l.Ready(t.Context(), "a", "p:*"))
		synctest.Wait()
		require.ElementsMatch(t, []string{"subscribed a true", "subscribed p:* true"}, h.take())

		l.Stop()
		l.Stop()
		l.Start()
		require.Empty(t, h.take(), "a stop is not a loss")
		require.ErrorIs(t, l.Ready(t.Context(), "a"), ErrStopped)
	})
}

func TestListenerIdle(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		defer m.Close()
		defer client.Close()
		h := &heard{}
		before := m.TotalConnectionCount()
		l := NewListener(ListenerConfig{Client: client, Handler: h})
		l.Start()
		defer l.Stop()
		time.Sleep(time.Hour)
		require.Equal(t, before, m.TotalConnectionCount(), "without channels nothing is connected")

		l.Add("a")
		require.NoError(t, l.Ready(t.Context(), "a"))
		l.Remove("a")
		time.Sleep(time.Hour)
		require.Equal(t, before+1, m.TotalConnectionCount())
		l.Recreate()
		time.Sleep(time.Hour)
		require.Equal(t, before+1, m.TotalConnectionCount())
		l.Add("a")
		require.NoError(t, l.Ready(t.Context(), "a"))
	})
}

func TestListenerUnconfirmed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m, client := bubbleRedis(t)
		defer m.Close()
		defer client.Close()
		var deaf atomic.Bool
		deaf.Store(true)
		m.Server().SetPreHook(func(_ *server.Peer, cmd string, _ ...string) bool {
			return cmd == "SUBSCRIBE" && deaf.Load()
		})
		warned := newWarnings(slog.LevelWarn)
		h := &heard{}
		l := NewListener(ListenerConfig{Client: client, Handler: h, Logger: slog.New(warned)})
		l.Add("a")
		l.Start()
		defer l.Stop()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := l.Ready(ctx, "a")
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, errUnconfirmed)
		require.Empty(t, h.take(), "there was no connection to lose")
		require.EqualValues(t, 1, warned.n.Load())
		// About one attempt per confirmWithin and pause.
		require.InDelta(t, 10, m.TotalConnectionCount(), 3)

		deaf.Store(false)
		require.NoError(t, l.Ready(t.Context(), "a"))
		synctest.Wait()
		require.Equal(t, []string{"subscribed a false"}, h.take())
	})
}

func TestListenerAway(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var dials atomic.Int64
		m, client := bubbleRedis(t, func() error {
			if dials.Add(1) < 50 {
				return &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
			}
			return nil
		})
		defer m.Close()
		defer client.Close()
		l := NewListener(ListenerConfig{Client: client, Handler: &heard{}})
		l.Add("a")
		l.Start()
		defer l.Stop()
		began := time.Now()
		require.NoError(t, l.Ready(t.Context(), "a"))
		require.Greater(t, time.Since(began), 40*reconnectPause.Last/2, "the attempts are too frequent")
	})
}
