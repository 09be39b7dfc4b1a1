package hub

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/wire"
)

// A sink that subscribes before the room was read sees an empty room, and then exactly
// the difference. Later sinks see the room.
func TestWatchNowBeginsEmpty(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.redis.state(room, "a", `{"n":1}`, false)
		h.listener.silent = true
		early, replaced := h.newSink(), h.newSink()
		require.NoError(t, h.hub.WatchNow(room, early, early.ready))
		require.NoError(t, h.hub.WatchNow(room, replaced, replaced.ready))
		require.True(t, early.view.Stale)
		require.Empty(t, early.ids())
		require.Empty(t, early.view.Epoch)
		h.sleep(time.Minute)
		require.Empty(t, early.takeLines())
		require.True(t, h.hub.Unwatch(room, replaced))

		h.hub.HandleSubscribed(room, false)
		h.sleep(time.Second)
		require.Equal(t, []string{"join a {\"n\":\"a\"} repair", "state a {\"n\":1} repair"}, early.takeLines())
		require.Empty(t, replaced.takeLines())
		late := h.newSink()
		require.NoError(t, h.hub.WatchNow(room, late, late.ready))
		require.False(t, late.view.Stale)
		require.Equal(t, []string{"a"}, late.ids())
		h.send(h.redis.leave(room, "a"))
		h.checkSink(early)
		h.checkSink(late)
	})
}

// WatchNow after a Watch that timed out shows what was read since. Like Watch, it keeps
// the mirror.
func TestWatchNowAfterWatch(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.listener.silent = true
		sink := h.newSink()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, h.hub.Watch(ctx, room, sink, sink.ready), context.DeadlineExceeded)
		h.hub.HandleSubscribed(room, false)
		h.sleep(time.Second)
		require.NoError(t, h.hub.WatchNow(room, sink, sink.ready))
		require.Equal(t, []string{"a"}, sink.ids())
		h.sleep(time.Minute)
		require.True(t, h.hub.Watches(room))
		require.NoError(t, h.hub.WatchNow(room, sink, sink.ready), "a new view, and no second reference")
		require.True(t, h.hub.Unwatch(room, sink))
		h.sleep(time.Minute)
		require.False(t, h.hub.Watches(room))
		h.hub.Stop()
		require.ErrorIs(t, h.hub.WatchNow(room, sink, sink.ready), ErrStopped)
	})
}

// A sink that subscribes before a large room was read gets the listed members with
// their silent states, and no others.
func TestWatchNowOfLargeRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		for i, user := range []string{"", "", "ann", "ann", "u4", "u5", "u6", "u7", "u8", "u9"} {
			h.redis.joinAs(room, fmt.Sprint(i), user, "")
			h.redis.state(room, fmt.Sprint(i), `{"n":1}`, true)
		}
		h.listener.silent = true
		early := h.newSink()
		early.bounded = true // its view is empty, but it will not get all members
		require.NoError(t, h.hub.WatchNow(room, early, early.ready))
		h.hub.HandleSubscribed(room, false)
		h.sleep(time.Second)
		late := h.newSink()
		require.NoError(t, h.hub.WatchNow(room, late, late.ready))
		require.Len(t, late.ids(), 3)
		require.ElementsMatch(t, late.ids(), slices.Collect(maps.Keys(early.present)))
		require.Equal(t, late.present, early.present)
		require.Len(t, early.takeLines(), 6)
		// Counts run from one update to the next and end at those of the whole room. Of
		// Ann's connections one is listed.
		var numbers []string
		h.send(h.redis.joinAs(room, "new", "ann", "")...)
		for _, u := range early.updates {
			if u.Type == wire.UpdateJoin {
				connections, _ := u.Connections.Get()
				users, _ := u.Users.Get()
				numbers = append(numbers, fmt.Sprintf("%s %d %d %d", u.UserID, connections, users, u.UserConnections))
			}
		}
		require.Equal(t, []string{" 8 7 0", " 9 8 0", "ann 10 9 1", "ann 11 9 3"}, numbers)
	}, func(cfg *Config) { cfg.Listed, cfg.CountUsers = 3, true })
}

// Load mirrors a room until it is released, and reports whether the mirror is up to
// date.
func TestLoad(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		release, upToDate, err := h.hub.Load(t.Context(), room)
		require.NoError(t, err)
		require.True(t, upToDate)
		h.hub.HandleDisconnect()
		h.sleep(time.Minute)
		began := time.Now()
		again, upToDate, err := h.hub.Load(t.Context(), room)
		require.NoError(t, err)
		require.False(t, upToDate)
		require.Equal(t, deliveryDelay, time.Since(began))
		release()
		h.sleep(time.Minute)
		require.True(t, h.hub.Watches(room))
		again()
		h.sleep(time.Minute)
		require.False(t, h.hub.Watches(room))

		h.listener.silent = true
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		release, _, err = h.hub.Load(ctx, room)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		h.sleep(time.Minute)
		require.True(t, h.hub.Watches(room))
		release()
		h.sleep(time.Minute)
		require.False(t, h.hub.Watches(room))
		h.hub.Stop()
		release, _, err = h.hub.Load(t.Context(), room)
		require.ErrorIs(t, err, ErrStopped)
		release()
	})
}
