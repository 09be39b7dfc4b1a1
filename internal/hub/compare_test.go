package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestSilentLossIsNoticed(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.leave(room, "a")
		h.pass(9 * time.Second)
		assert.Empty(t, s.heard())
		h.pass(1500 * time.Millisecond)
		assert.Equal(t, []string{"leave a repair"}, s.heard())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseCompare])
	})
}

func TestEventsInFlightAreNoLoss(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.pass(5 * time.Second)
		// Comparisons at 10, 20, … s find events that are 200 ms old.
		for range 20 {
			h.pass(900 * time.Millisecond)
			first, second := h.redis.state(room, "a", "1", false), h.redis.state(room, "a", "2", false)
			h.pass(200 * time.Millisecond)
			h.send(first, second)
		}
		for i := range 3000 { // a very busy room
			m := h.redis.state(room, "a", fmt.Sprint(i), false)
			time.AfterFunc(20*time.Millisecond, func() { h.send(m) })
			h.pass(3 * time.Millisecond)
		}
		h.pass(time.Second)
		assert.Equal(t, 1, h.snapshots())
		assert.Zero(t, h.hub.Stats().Repairs)
		h.agree(s)
	})
}

func TestRedisWentBackInSilence(t *testing.T) {
	t.Parallel()
	for _, more := range []int{0, 1, 2, 3} { // events after it went back by 2
		t.Run(fmt.Sprint(more), func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
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
				h.pass(11 * time.Second)
				assert.Len(t, s.heard(), more)
				h.pass(12 * time.Second)
				assert.ElementsMatch(t, []string{"leave b repair", "leave c repair"}, s.heard())
				h.agree(s)
			})
		})
	}
}

func TestBurstOfResubscriptions(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		const rooms = 1200
		sinks := make([]*fakeSink, rooms)
		name := func(i int) string { return fmt.Sprintf("room %d", i) }
		for i := range rooms {
			h.redis.join(name(i), "a")
			h.redis.join(name(i), "b")
			sinks[i] = h.watchRoom(name(i))
		}
		h.pass(9 * time.Second)
		before, _, asked := h.redis.calls()
		assert.Equal(t, rooms, before)

		h.hub.HandleLost()
		assert.Equal(t, rooms, h.hub.Stats().Stale)
		_, ok := h.hub.View(name(1))
		assert.False(t, ok)
		v, ok := h.hub.StaleView(name(1))
		assert.True(t, ok)
		assert.True(t, v.Stale)
		for i := range 10 {
			h.redis.leave(name(i), "a")
		}
		h.pass(time.Millisecond)
		_, compared, _ := h.redis.calls()
		for i := range rooms {
			h.hub.HandleSubscribed(name(i), true)
			if i%10 == 0 {
				h.pass(time.Millisecond)
			}
		}
		h.pass(500 * time.Millisecond)
		after, calls, askedAgain := h.redis.calls()
		assert.Equal(t, before+10, after, "only those that differ are read")
		assert.Less(t, calls-compared, 15)
		assert.LessOrEqual(t, askedAgain-asked, 1, "asked once per burst")
		assert.Zero(t, h.hub.Stats().Stale)
		for i, s := range sinks {
			if i < 10 {
				assert.Equal(t, []string{"leave a repair"}, s.heard())
			} else {
				assert.Empty(t, s.heard())
			}
		}
	})
}

func TestFailoverWithLostWrites(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.redis.join(room, "b")
		s := h.watch()
		h.send(h.redis.join(room, "c"))
		s.heard()
		h.hub.HandleLost()
		// The replica never had c, and has counted on past us since.
		h.redis.wipe(room, nil)
		for _, c := range []string{"a", "b", "x", "y"} {
			h.redis.join(room, c)
		}
		h.redis.set(func(f *fakeRedis) {
			f.generation = "G2"
			f.rooms[room].pos.Epoch = s.view.Epoch
		})
		h.hub.HandleSubscribed(room, true)
		h.pass(500 * time.Millisecond)
		assert.Equal(t, []string{`join x {"n":"x"} repair`, `join y {"n":"y"} repair`}, s.heard())
		h.send(h.redis.join(room, "c")) // its owner has noticed
		h.pass(time.Minute)
		assert.Empty(t, s.heard())
		h.agree(s)
	})
}

func TestComparingIsTriedAgain(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.hub.HandleLost()
		h.redis.leave(room, "a")
		h.redis.set(func(f *fakeRedis) { f.away = true })
		h.hub.HandleSubscribed(room, true)
		h.pass(30 * time.Second)
		assert.Equal(t, 1, h.hub.Stats().Stale)
		h.redis.set(func(f *fakeRedis) { f.away = false })
		h.pass(5 * time.Second)
		assert.Equal(t, []string{"leave a repair"}, s.heard())
		assert.Zero(t, h.hub.Stats().Stale)
	})
}

func TestWatchWhileConnectionIsLost(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		h.watch()
		h.hub.HandleLost()
		began := time.Now()
		s := h.watch()
		assert.True(t, s.view.Stale)
		assert.Equal(t, inFlight, time.Since(began))
		// It is only a moment away.
		time.AfterFunc(100*time.Millisecond, func() { h.hub.HandleSubscribed(room, true) })
		s = h.watch()
		assert.False(t, s.view.Stale)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestIdleHubAsksNothing(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.pass(time.Hour)
		s, p, g := h.redis.calls()
		assert.Zero(t, s+p+g)
	})
}

// Rooms that are kept elsewhere do not wait for those whose place does not
// answer.
func TestOnePlaceDoesNotAnswer(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.hub.cfg.Bucket = func(room string) int { return len(room) }
		var here, there []*fakeSink
		for i := range 20 {
			name := fmt.Sprint("room ", i)
			h.redis.join(name, "a")
			if s := h.watchRoom(name); i < 10 {
				there = append(there, s)
			} else {
				here = append(here, s)
			}
		}
		h.redis.set(func(f *fakeRedis) { f.lost = func(room string) bool { return len(room) == len("room 1") } })
		for _, s := range here {
			h.redis.join(s.room, "unheard")
		}
		h.hub.Resync()
		h.pass(3 * time.Second)
		assert.Equal(t, len(there), h.hub.Stats().Stale)
		for _, s := range here {
			h.agree(s)
		}
		h.redis.set(func(f *fakeRedis) { f.lost = nil })
		h.pass(11 * time.Second)
		assert.Zero(t, h.hub.Stats().Stale)
	})
}
