package occupancy

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A subscription of 100 rooms costs one call, and no further watcher costs one.
func TestManyRoomsAreReadWithOneCall(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		names := make([]string, 100)
		want := make([]string, 100)
		for i := range names {
			names[i] = fmt.Sprint("r", i)
			want[i] = fmt.Sprintf("r%d 2/1", i)
			h.join(names[i], "c1", "ann")
			h.join(names[i], "c2", "ann")
		}
		began := time.Now()
		w := h.newWatcher()
		require.Equal(t, want, h.watchBy(w, names...))
		require.Less(t, time.Since(began), soon)
		calls := h.redis.takeCalls()
		require.Len(t, calls, 1)
		require.ElementsMatch(t, names, calls[0])
		require.Equal(t, 100, h.listener.added)
		require.Equal(t, 100, h.RoomsOf(w))

		began = time.Now()
		require.Equal(t, want, h.watchBy(h.newWatcher(), names...))
		require.Equal(t, want, h.watchBy(w, names...), "again")
		require.Zero(t, time.Since(began))
		require.Empty(t, h.redis.takeCalls())
		require.Equal(t, 200, h.Stats().Watches)

		// Rooms with events since the last reading are read again, together.
		for _, name := range names[:30] {
			h.every[name] = time.Minute // so that events alone cause no reading yet
			h.touch(name)
		}
		h.sleep(soon)
		h.redis.takeCalls()
		for _, name := range names[:30] {
			h.join(name, "c3", "bob")
		}
		got := h.watchBy(h.newWatcher(), names...)
		require.Equal(t, "r0 3/2", got[0])
		require.Equal(t, "r29 3/2", got[29])
		require.Equal(t, want[30:], got[30:])
		calls = h.redis.takeCalls()
		require.Len(t, calls, 1)
		require.ElementsMatch(t, names[:30], calls[0])
	})
}

// A room in which events come all the time is never up to date. A watcher gets the
// numbers of a reading that began after its request.
func TestAWatcherDuringAStorm(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 40 * time.Millisecond
		h.watch(lobby)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for i := range 5000 {
				h.join(lobby, fmt.Sprint("c", i))
				time.Sleep(time.Millisecond)
			}
		}()
		time.Sleep(time.Second)
		for range 20 {
			before := h.redis.truth(lobby)
			began := time.Now()
			w := h.watch(lobby)
			require.False(t, w.has[lobby].Stale)
			require.GreaterOrEqual(t, w.has[lobby].Connections, before.Connections)
			require.Less(t, time.Since(began), 2*(h.redis.latency+step)+soon)
		}
		<-done
		require.LessOrEqual(t, len(h.redis.readings(lobby)), 5+20+2)
	})
}

// Watchers that come at the same time share a reading.
func TestWatchersShareAReading(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.latency = 40 * time.Millisecond
		h.join(lobby, "c1")
		var all []*fakeWatcher
		answers := make(chan []Result, 100)
		for range 100 {
			w := h.newWatcher()
			all = append(all, w)
			go func() { answers <- h.Watch(t.Context(), w, []string{lobby}) }()
			time.Sleep(50 * time.Microsecond)
		}
		for range all {
			result := (<-answers)[0]
			require.NoError(t, result.Err)
			require.Equal(t, "lobby 1/1", text(result.Update))
		}
		require.Len(t, h.redis.readings(lobby), 1)
		require.Equal(t, 100, h.Stats().Watches)
	})
}

func TestUnwatch(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		w, other := h.watch("a", "b", "c"), h.watch("a")
		require.Equal(t, 1, h.Unwatch(w, "a", "unknown"))
		require.Zero(t, h.Unwatch(w, "a"))
		require.Equal(t, 2, h.RoomsOf(w))
		require.Equal(t, []Watcher{other}, h.Watchers("a"))
		require.Nil(t, h.Watchers("unknown"))
		h.join("a", "c1")
		h.join("b", "c1")
		h.sleep(soon)
		require.Equal(t, []string{"b 1/1"}, w.take())
		require.Equal(t, []string{"a 1/1"}, other.take())
		require.Equal(t, 2, h.UnwatchAll(w))
		require.Zero(t, h.UnwatchAll(w))
		require.Zero(t, h.RoomsOf(w))
		h.join("b", "c2")
		h.sleep(2 * time.Second)
		require.Empty(t, w.take())
	})
}

// After its last watcher a room keeps its channel for a while, but is not read.
func TestLinger(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1")
		w := h.watch(lobby)
		h.UnwatchAll(w)
		h.sleep(4 * time.Second)
		require.True(t, h.Watches(lobby))
		w = h.newWatcher()
		h.redis.takeCalls()
		require.Equal(t, []string{"lobby 1/1"}, h.watchBy(w, lobby), "nothing has happened")
		require.Empty(t, h.redis.takeCalls())

		h.UnwatchAll(w)
		h.join(lobby, "c2")
		h.sleep(4 * time.Second)
		require.Empty(t, h.redis.takeCalls(), "an unwatched room is not read")
		w = h.newWatcher()
		require.Equal(t, []string{"lobby 2/2"}, h.watchBy(w, lobby))
		require.Len(t, h.redis.takeCalls(), 1)
		require.Equal(t, 1, h.listener.added)

		h.UnwatchAll(w)
		h.sleep(time.Minute)
		require.Empty(t, h.redis.takeCalls())
		require.Equal(t, 1, h.listener.removed)
		require.False(t, h.Watching())
		require.Empty(t, h.Rooms.Rooms())
		require.Equal(t, []string{"lobby 2/2"}, h.watchBy(w, lobby), "from the beginning")
		require.Equal(t, 2, h.listener.added)
		require.True(t, h.Watching())
	})
}

func TestUnwatchWhileWatchWaits(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.hangs[0] = true
		w := h.newWatcher()
		answer := make(chan []Result, 1)
		go func() { answer <- h.Watch(t.Context(), w, []string{"a", "b"}) }()
		h.sleep(soon)
		require.Equal(t, 2, h.RoomsOf(w))
		require.Equal(t, 2, h.UnwatchAll(w))
		for _, result := range <-answer {
			require.ErrorIs(t, result.Err, ErrUnwatched)
		}
		require.Empty(t, h.watched)
	}, func(c *Config) { c.Linger = -1 })
}

func TestStop(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join(lobby, "c1")
		w := h.watch(lobby)
		h.redis.set(func(f *fakeRedis) { f.hangs[0] = true })
		answer := make(chan []Result, 1)
		go func() { answer <- h.Watch(t.Context(), h.newWatcher(), []string{"a", "b"}) }()
		h.leave(lobby, "c1")
		h.sleep(soon)
		h.Stop()
		for _, result := range <-answer {
			require.ErrorIs(t, result.Err, ErrStopped)
		}
		for _, result := range h.Watch(t.Context(), w, []string{"a", lobby}) {
			require.ErrorIs(t, result.Err, ErrStopped)
		}
		h.touch(lobby)
		h.Resync()
		h.listener.disconnect()
		h.listener.reconnect()
		h.UnwatchAll(w)
		h.sleep(time.Minute)
		require.Empty(t, w.take())
		require.Zero(t, h.cfg.Wheel.Armed())
		h.Stop()
	})
}

// The context of Watch ends before a room has been read: it is then not watched. Rooms
// that were read before are.
func TestWatchWithoutAnAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.join("known", "c1")
		h.watch("known")
		h.redis.set(func(f *fakeRedis) { f.hangs[0] = true })
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		w := h.newWatcher()
		began := time.Now()
		results := h.Watch(ctx, w, []string{"new", "known", "newer"})
		require.Equal(t, 2*time.Second, time.Since(began))
		require.ErrorIs(t, results[0].Err, context.DeadlineExceeded)
		require.Equal(t, "known 1/1", text(results[1].Update))
		require.ErrorIs(t, results[2].Err, context.DeadlineExceeded)
		require.Equal(t, 1, h.RoomsOf(w))
		require.Empty(t, h.Watchers("new"))

		cancel()
		results = h.Watch(ctx, w, []string{"new", "known"})
		require.Error(t, results[0].Err)
		require.NoError(t, results[1].Err)
		h.redis.set(func(f *fakeRedis) { f.hangs[0] = false })
		h.sleep(10 * time.Second)
		require.Equal(t, []string{"new 0/0"}, h.watchBy(w, "new"))
	})
}

// A failed second Watch of a room leaves the watch as it is.
func TestWatchAgainWithoutAnAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		w := h.watch(lobby)
		h.listener.disconnect()
		results := h.Watch(t.Context(), w, []string{lobby})
		require.NoError(t, results[0].Err)
		require.Equal(t, "lobby 0/0 stale", text(results[0].Update))
		require.Equal(t, 1, h.RoomsOf(w))
		synctest.Wait()
	})
}

func TestWatchersAreListed(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		all := []Watcher{h.watch("a", "b"), h.watch("b")}
		got := h.Watchers("b")
		require.Len(t, got, 2)
		require.True(t, slices.Contains(got, all[0]) && slices.Contains(got, all[1]))
		require.Len(t, h.Rooms.Rooms(), 2)
		require.True(t, h.Watches("a"))
	})
}
