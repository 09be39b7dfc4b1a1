package hub

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestOnlyFirstWatcherReads(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a", withState(`{"x":1}`, false))
		h.redis.join(room, "b", withState(`{"y":1}`, true))
		first := h.watch()
		assert.Equal(t, []string{"a", "b"}, first.ids())
		assert.False(t, first.view.Stale)
		assert.EqualValues(t, 2, first.view.Seq)
		assert.JSONEq(t, `[{"id":"a","metadata":{"n":"a"},"joinedAt":946684800000},{"id":"b","metadata":{"n":"b"},"joinedAt":946684800000}]`, text(first.view))
		assert.JSONEq(t, `{"a":{"x":1},"b":{"y":1}}`, string(first.view.States()))

		s, p, g := h.redis.calls()
		second := h.watch()
		s2, p2, g2 := h.redis.calls()
		assert.Equal(t, []int{s, p, g}, []int{s2, p2, g2}, "a further watcher costs Redis nothing")
		assert.Same(t, first.view.encoded, second.view.encoded)
		assert.Equal(t, 1, h.listener.added)

		// A second Watch gives a new view and no second delivery.
		require.NoError(t, h.hub.Watch(t.Context(), room, second, second.ready))
		h.send(h.redis.join(room, "c"))
		assert.Equal(t, []string{`join c {"n":"c"}`}, second.takeLines())
		assert.Equal(t, []string{`join c {"n":"c"}`}, first.takeLines())
		assert.Same(t, first.updates[0], second.updates[0], "one update for all")
		stats := h.hub.Stats()
		assert.Equal(t, 1, stats.Rooms)
		assert.Equal(t, 2, stats.Sinks)
		assert.EqualValues(t, 1, stats.Events[store.Joined])
		assert.Equal(t, map[Cause]uint64{CauseFirst: 1}, stats.Snapshots)
	})
}

func TestUnknownRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s := h.watch()
		assert.Equal(t, View{encoded: s.view.encoded, Listing: Listing{Present: wire.Text{listOpen, listClose}}}, s.view)
		assert.Equal(t, "[]", text(s.view))
		assert.Equal(t, "{}", string(s.view.States()))
		h.send(h.redis.join(room, "a"))
		assert.Equal(t, []string{`join a {"n":"a"}`}, s.takeLines())
		assert.EqualValues(t, 1, s.updates[0].Seq)
		h.sleep(time.Minute)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestWatchFailsWhileRedisIsDown(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.set(func(f *fakeRedis) { f.down = true })
		s := &fakeSink{t: t}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := h.hub.Watch(ctx, room, s, s.ready)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Zero(t, s.views)
		assert.False(t, h.hub.Unwatch(room, s))
		_, ok := h.hub.View(room)
		assert.False(t, ok)
		_, ok = h.hub.StaleView(room)
		assert.False(t, ok)
		h.sleep(6 * time.Second)
		assert.Zero(t, h.hub.Stats().Rooms)
		assert.Equal(t, 1, h.listener.removed)

		// Redis comes back while a watcher waits.
		time.AfterFunc(500*time.Millisecond, func() { h.redis.set(func(f *fakeRedis) { f.down = false }) })
		h.redis.join(room, "a")
		assert.Equal(t, []string{"a"}, h.watch().ids())
	})
}

func TestUnwatchAndLinger(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		s, other := h.watch(), h.watch()
		assert.True(t, h.hub.Unwatch(room, s))
		assert.False(t, h.hub.Unwatch(room, s))
		h.send(h.redis.join(room, "a"))
		assert.Empty(t, s.takeLines())
		assert.Len(t, other.takeLines(), 1)
		assert.True(t, h.hub.Unwatch(room, other))

		h.sleep(4 * time.Second)
		h.send(h.redis.join(room, "b"))
		before := h.snapshots()
		back := h.watch()
		assert.Equal(t, []string{"a", "b"}, back.ids())
		assert.Equal(t, before, h.snapshots(), "the mirror has lingered")

		h.sleep(10 * time.Second)
		assert.Equal(t, 1, h.hub.Stats().Rooms)
		assert.True(t, h.hub.Unwatch(room, back))
		h.sleep(6 * time.Second)
		assert.Zero(t, h.hub.Stats().Rooms)
		assert.Equal(t, 1, h.listener.removed)
		assert.Empty(t, h.listener.rooms)
		h.send(h.redis.join(room, "c")) // a late event
		assert.EqualValues(t, 1, h.hub.Stats().Strays)
	})
}

func TestStop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		redis, listener := newFakeRedis(), &fakeListener{rooms: map[string]bool{}, silent: true}
		h := New(Config{Store: redis, Listener: listener})
		h.Start()
		h.Start()
		s := &fakeSink{t: t}
		got := make(chan error)
		go func() { got <- h.Watch(t.Context(), room, s, s.ready) }()
		synctest.Wait()
		h.Stop()
		h.Stop()
		require.ErrorIs(t, <-got, ErrStopped)
		require.ErrorIs(t, h.Watch(t.Context(), room, s, s.ready), ErrStopped)
		h.HandleEvent(room, redis.join(room, "a"))
		h.HandleSubscribed(room, false)
		h.HandleDisconnect()
		assert.Zero(t, s.views)
	})
}

func TestSnapshotsAtOnceAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.set(func(f *fakeRedis) { f.delay = 50 * time.Millisecond })
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() { h.watchRoom(fmt.Sprintf("room %d", i)) })
		}
		wg.Wait()
		assert.Equal(t, 8, h.redis.maxReading)
		assert.Equal(t, 100, h.snapshots())
	})
}

// Reads of buckets on a node that never answers fail again and again, while new rooms
// are watched all the time. Rooms of other buckets are still read at once, even if the
// question for the generation also fails.
func TestBucketsShareNoSlots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const hanging, buckets = 21, 64
		h := &harness{t: t, redis: newFakeRedis(), listener: &fakeListener{rooms: make(map[string]bool)}}
		bucket := func(room string) (b int) {
			_, err := fmt.Sscanf(room, "%d", &b)
			assert.NoError(t, err)
			return b
		}
		h.redis.hangs = func(room string) bool { return bucket(room) < hanging }
		h.hub = New(Config{Store: h.redis, Listener: h.listener, Bucket: bucket})
		h.listener.hub = h.hub
		h.hub.Start()
		defer h.hub.Stop()
		h.watchRoom("63 first") // makes the generation known
		h.redis.set(func(f *fakeRedis) { f.generationDelay = 2 * time.Second })

		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				s := &fakeSink{t: t}
				assert.Error(t, h.hub.Watch(ctx, fmt.Sprintf("%d hanging %d", i%hanging, i), s, s.ready))
			})
		}
		h.sleep(8*time.Second + 500*time.Millisecond)
		for i := range 200 {
			began := time.Now()
			h.watchRoom(fmt.Sprintf("%d room %d", hanging+i%(buckets-hanging), i))
			assert.Less(t, time.Since(began), 50*time.Millisecond)
			h.sleep(25 * time.Millisecond)
		}
		h.redis.set(func(f *fakeRedis) {
			assert.Equal(t, readsPerBucket*hanging+1, f.maxReading)
			f.hangs = nil
		})
		cancel()
		wg.Wait()
	})
}
