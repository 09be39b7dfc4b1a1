package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestUnnoticedLossIsDetected(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.leave(room, "a")
		h.sleep(9 * time.Second)
		assert.Empty(t, s.takeLines())
		h.sleep(1500 * time.Millisecond)
		assert.Equal(t, []string{"leave a repair"}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseCompare])
	})
}

func TestLateEventsAreNoLoss(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.sleep(5 * time.Second)
		// The comparisons at 10, 20, … s see events that arrive 200 ms later.
		for range 20 {
			h.sleep(900 * time.Millisecond)
			first, second := h.redis.state(room, "a", "1", false), h.redis.state(room, "a", "2", false)
			h.sleep(200 * time.Millisecond)
			h.send(first, second)
		}
		for i := range 3000 { // a very busy room
			m := h.redis.state(room, "a", fmt.Sprint(i), false)
			time.AfterFunc(20*time.Millisecond, func() { h.send(m) })
			h.sleep(3 * time.Millisecond)
		}
		h.sleep(time.Second)
		assert.Equal(t, 1, h.snapshots())
		assert.Zero(t, h.hub.Stats().Repairs)
		h.checkSink(s)
	})
}

func TestRedisWentBackUnnoticed(t *testing.T) {
	t.Parallel()
	for _, more := range []int{0, 1, 2, 3} { // events after Redis went back by 2
		t.Run(fmt.Sprint(more), func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.join(room, "a")
				back := h.redis.copy(room)
				h.redis.join(room, "b")
				h.redis.join(room, "c")
				s := h.watch()
				h.redis.wipe(room, back)
				h.redis.set(func(f *fakeRedis) { f.generation = "G2" })
				for i := range more {
					h.redis.join(room, fmt.Sprintf("x%d", i))
				}
				h.sleep(11 * time.Second)
				assert.Len(t, s.takeLines(), more)
				h.sleep(12 * time.Second)
				assert.ElementsMatch(t, []string{"leave b repair", "leave c repair"}, s.takeLines())
				h.checkSink(s)
			})
		})
	}
}

func TestBurstOfResubscriptions(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		const rooms = 1200
		sinks := make([]*fakeSink, rooms)
		name := func(i int) string { return fmt.Sprintf("room %d", i) }
		for i := range rooms {
			h.redis.join(name(i), "a")
			h.redis.join(name(i), "b")
			sinks[i] = h.watchRoom(name(i))
		}
		h.sleep(9 * time.Second)
		before, _, asked := h.redis.calls()
		assert.Equal(t, rooms, before)

		h.hub.HandleDisconnect()
		assert.Equal(t, rooms, h.hub.Stats().Stale)
		_, ok := h.hub.View(name(1))
		assert.False(t, ok)
		v, ok := h.hub.StaleView(name(1))
		assert.True(t, ok)
		assert.True(t, v.Stale)
		for i := range 10 {
			h.redis.leave(name(i), "a")
		}
		h.sleep(time.Millisecond)
		_, compared, _ := h.redis.calls()
		for i := range rooms {
			h.hub.HandleSubscribed(name(i), true)
			if i%10 == 0 {
				h.sleep(time.Millisecond)
			}
		}
		h.sleep(500 * time.Millisecond)
		after, calls, askedAgain := h.redis.calls()
		assert.Equal(t, before+10, after, "only rooms that differ are read")
		assert.Less(t, calls-compared, 15)
		assert.LessOrEqual(t, askedAgain-asked, 1, "the generation is asked for once per burst")
		assert.Zero(t, h.hub.Stats().Stale)
		for i, s := range sinks {
			if i < 10 {
				assert.Equal(t, []string{"leave a repair"}, s.takeLines())
			} else {
				assert.Empty(t, s.takeLines())
			}
		}
	})
}

func TestFailoverWithLostWrites(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.send(h.redis.join(room, "c"))
		s.takeLines()
		h.hub.HandleDisconnect()
		// The replica never had c, and is now at a higher seq than the mirror.
		h.redis.wipe(room, nil)
		for _, c := range []string{"a", "b", "x", "y"} {
			h.redis.join(room, c)
		}
		h.redis.set(func(f *fakeRedis) {
			f.generation = "G2"
			f.rooms[room].pos.Epoch = s.view.Epoch
		})
		h.hub.HandleSubscribed(room, true)
		h.sleep(500 * time.Millisecond)
		assert.Equal(t, []string{`join x {"n":"x"} repair`, `join y {"n":"y"} repair`}, s.takeLines())
		h.send(h.redis.join(room, "c")) // by its owner
		h.sleep(time.Minute)
		assert.Empty(t, s.takeLines())
		h.checkSink(s)
	})
}

func TestComparisonIsRetried(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.hub.HandleDisconnect()
		h.redis.leave(room, "a")
		h.redis.set(func(f *fakeRedis) { f.down = true })
		h.hub.HandleSubscribed(room, true)
		h.sleep(30 * time.Second)
		assert.Equal(t, 1, h.hub.Stats().Stale)
		h.redis.set(func(f *fakeRedis) { f.down = false })
		h.sleep(5 * time.Second)
		assert.Equal(t, []string{"leave a repair"}, s.takeLines())
		assert.Zero(t, h.hub.Stats().Stale)
	})
}

func TestWatchWhileListenerIsDisconnected(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		h.watch()
		h.hub.HandleDisconnect()
		began := time.Now()
		s := h.watch()
		assert.True(t, s.view.Stale)
		assert.Equal(t, deliveryDelay, time.Since(began))
		// The listener comes back while the watcher waits.
		time.AfterFunc(100*time.Millisecond, func() { h.hub.HandleSubscribed(room, true) })
		s = h.watch()
		assert.False(t, s.view.Stale)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestIdleHubDoesNotCallRedis(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.sleep(time.Hour)
		s, p, g := h.redis.calls()
		assert.Zero(t, s+p+g)
	})
}

// Rooms do not wait for rooms of another bucket that does not answer.
func TestOneBucketDoesNotAnswer(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.hub.cfg.Bucket = func(room string) int { return len(room) }
		var reachable, unreachable []*fakeSink
		for i := range 20 {
			name := fmt.Sprint("room ", i)
			h.redis.join(name, "a")
			if s := h.watchRoom(name); i < 10 {
				unreachable = append(unreachable, s)
			} else {
				reachable = append(reachable, s)
			}
		}
		h.redis.set(func(f *fakeRedis) { f.unreachable = func(room string) bool { return len(room) == len("room 1") } })
		for _, s := range reachable {
			h.redis.join(s.room, "new")
		}
		h.hub.Resync()
		h.sleep(3 * time.Second)
		assert.Equal(t, len(unreachable), h.hub.Stats().Stale)
		for _, s := range reachable {
			h.checkSink(s)
		}
		h.redis.set(func(f *fakeRedis) { f.unreachable = nil })
		h.sleep(11 * time.Second)
		assert.Zero(t, h.hub.Stats().Stale)
	})
}
