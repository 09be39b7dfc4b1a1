package hub

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

func TestUpdatesOfEvents(t *testing.T) {
	t.Parallel()
	// Each case begins with the members a (state 1), b (silent state 2) and c (no state).
	tests := []struct {
		name string
		do   func(r *fakeRedis) string
		want []string
	}{
		{"join", func(r *fakeRedis) string { return r.join(room, "d") }, []string{`join d {"n":"d"}`}},
		{"join without metadata", func(r *fakeRedis) string {
			return r.join(room, "d", func(rec *store.Record) { rec.Meta = nil })
		}, []string{"join d"}},
		{"join with state", func(r *fakeRedis) string { return r.join(room, "d", withState("9", false)) },
			[]string{`join d {"n":"d"}`, "state d 9"}},
		{"join with silent state", func(r *fakeRedis) string { return r.join(room, "d", withState("9", true)) },
			[]string{`join d {"n":"d"}`}},
		{"leave", func(r *fakeRedis) string { return r.leave(room, "a") }, []string{"leave a"}},
		{"state", func(r *fakeRedis) string { return r.state(room, "a", "9", false) }, []string{"state a 9"}},
		{"the same state again", func(r *fakeRedis) string { return r.state(room, "a", "1", false) }, []string{"state a 1"}},
		{"silent state", func(r *fakeRedis) string { return r.state(room, "a", "9", true) }, nil},
		{"clear", func(r *fakeRedis) string { return r.state(room, "a", "", false) }, []string{"state a"}},
		{"clear of a silent state", func(r *fakeRedis) string { return r.state(room, "b", "", false) }, []string{"state b"}},
		{"silent clear", func(r *fakeRedis) string { return r.state(room, "a", "", true) }, []string{"state a"}},
		{"clear of no state", func(r *fakeRedis) string { return r.state(room, "c", "", false) }, []string{"state c"}},
		{"metadata", func(r *fakeRedis) string { return r.meta(room, "a", `{"n":"z"}`) }, []string{`metadata a {"n":"z"}`}},
		{"the same metadata again", func(r *fakeRedis) string { return r.meta(room, "a", `{"n":"a"}`) }, nil},
		{"metadata removed", func(r *fakeRedis) string { return r.meta(room, "a", "") }, []string{"metadata a"}},
		{"replaced, other metadata", func(r *fakeRedis) string {
			return r.join(room, "a", withEntry("e2"), withState("1", false), withMeta("1"))
		}, []string{"metadata a 1"}},
		{"replaced, other metadata and state", func(r *fakeRedis) string {
			return r.join(room, "b", withEntry("e2"), withState("3", false), withMeta("1"))
		}, []string{"metadata b 1", "state b 3"}},
		{"replaced, alike", func(r *fakeRedis) string {
			return r.join(room, "a", withEntry("e2"), withState("1", false))
		}, nil},
		{"replaced, another state", func(r *fakeRedis) string {
			return r.join(room, "a", withEntry("e2"), withState("9", false))
		}, []string{"state a 9"}},
		{"replaced, another silent state", func(r *fakeRedis) string {
			return r.join(room, "a", withEntry("e2"), withState("9", true))
		}, nil},
		{"replaced, without state", func(r *fakeRedis) string { return r.join(room, "a", withEntry("e2")) }, []string{"state a"}},
		{"replaced, silent state no longer silent", func(r *fakeRedis) string {
			return r.join(room, "b", withEntry("e2"), withState("2", false))
		}, []string{"state b 2"}},
		{"replaced, nothing before or after", func(r *fakeRedis) string { return r.join(room, "c", withEntry("e2")) }, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.join(room, "a", withState("1", false))
				h.redis.join(room, "b", withState("2", true))
				h.redis.join(room, "c")
				s := h.watch()
				h.send(tt.do(h.redis))
				assert.Equal(t, tt.want, s.takeLines())
				for _, u := range s.updates {
					assert.EqualValues(t, 4, u.Seq)
				}
				h.checkSink(s)
				// The mirror equals a new snapshot.
				v, ok := h.hub.View(room)
				assert.True(t, ok)
				truth := h.redis.copy(room)
				assert.Len(t, truth.members, v.Total)
				for _, m := range v.Members() {
					rec := truth.members[m.Conn]
					assert.Equal(t, string(rec.Meta), string(m.Meta()))
					assert.Equal(t, string(rec.State), string(m.State))
				}
				h.sleep(11 * time.Second)
				assert.Equal(t, 1, h.snapshots())
			})
		})
	}
}

func TestOrder(t *testing.T) {
	t.Parallel()
	// c0 is in the room, and c1 to c4 join it, as events 2 to 5. Each case is an order
	// of their arrival.
	repair := func(n int) string { return fmt.Sprintf(`join c%d {"n":"c%d"} repair`, n, n) }
	plain := func(n int) string { return fmt.Sprintf(`join c%d {"n":"c%d"}`, n, n) }
	tests := []struct {
		name  string
		order []int
		// at once, and after another 100 ms
		want, later []string
		snapshots   int
	}{
		{"in order", []int{1, 2, 3, 4}, []string{plain(1), plain(2), plain(3), plain(4)}, nil, 1},
		{"doubled", []int{1, 1, 2, 1, 2, 3, 4, 4}, []string{plain(1), plain(2), plain(3), plain(4)}, nil, 1},
		{"overtaken", []int{2, 1, 4, 3}, []string{plain(1), plain(2), plain(3), plain(4)}, nil, 1},
		{"backwards", []int{4, 4, 3, 2, 1}, []string{plain(1), plain(2), plain(3), plain(4)}, nil, 1},
		{"one lost", []int{1, 3, 4}, []string{plain(1)}, []string{repair(2), repair(3), repair(4)}, 2},
		{"the first lost", []int{2, 3, 4}, nil, []string{repair(1), repair(2), repair(3), repair(4)}, 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.redis.join(room, "c0")
				s := h.watch()
				messages := []string{""}
				for i := 1; i <= 4; i++ {
					messages = append(messages, h.redis.join(room, fmt.Sprintf("c%d", i)))
				}
				for _, i := range tt.order {
					h.send(messages[i])
				}
				assert.Equal(t, tt.want, s.takeLines())
				_, ok := h.hub.View(room)
				assert.Equal(t, true, ok, "a view waits for the events before an early one")
				h.sleep(90 * time.Millisecond)
				h.sleep(20 * time.Millisecond)
				assert.Equal(t, tt.later, s.takeLines())
				h.checkSink(s)
				assert.Equal(t, tt.snapshots, h.snapshots())
				h.sleep(11 * time.Second)
				assert.Equal(t, tt.snapshots, h.snapshots())
			})
		})
	}
}

func TestEarlyEventsWaitLimitedTime(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		lost := h.redis.join(room, "b")
		h.send(h.redis.join(room, "c"))
		h.sleep(99 * time.Millisecond)
		assert.Empty(t, s.takeLines())
		assert.Equal(t, 1, h.snapshots())
		assert.Equal(t, 1, h.hub.Stats().Waiting)
		h.sleep(5 * time.Millisecond)
		assert.Equal(t, []string{`join b {"n":"b"} repair`, `join c {"n":"c"} repair`}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseGap])
		assert.EqualValues(t, 1, h.hub.Stats().Early)
		h.send(lost) // it was late, not lost
		assert.Empty(t, s.takeLines())
		assert.Equal(t, 2, h.snapshots())
	})
}

func TestTooManyEarlyEvents(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.redis.join(room, "lost")
		for i := range maxEarly + 1 {
			h.send(h.redis.join(room, fmt.Sprintf("c%d", i)))
		}
		h.sleep(5 * time.Millisecond) // less than earlyTimeout
		assert.Len(t, s.takeLines(), maxEarly+2)
		h.checkSink(s)
	})
}

func TestFork(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		do   func(h *harness) // Redis went back from 5 events to 3
		want []string
	}{
		{"the same numbers again", func(h *harness) {
			h.send(h.redis.join(room, "x"))
		}, []string{`join x {"n":"x"} repair`}},
		{"counted up to the old position", func(h *harness) {
			h.redis.join(room, "x")
			h.redis.join(room, "y")
			h.send(h.redis.join(room, "z"))
		}, []string{`join x {"n":"x"} repair`, `join y {"n":"y"} repair`, `join z {"n":"z"} repair`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				for _, c := range []string{"a", "b"} {
					h.redis.join(room, c)
				}
				s := h.watch()
				h.send(h.redis.join(room, "c"))
				back := h.redis.copy(room)
				h.send(h.redis.join(room, "d"), h.redis.leave(room, "a"))
				s.takeLines()
				h.redis.wipe(room, back)
				tt.do(h)
				h.sleep(5 * time.Millisecond)
				// a is back. d is not in Redis and is unconfirmed.
				assert.Equal(t, append([]string{`join a {"n":"a"} repair`}, tt.want...), s.takeLines())
				assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseFork])
				for _, u := range s.updates {
					assert.Equal(t, s.updates[0].Epoch, u.Epoch)
				}
				v, _ := h.hub.View(room)
				assert.EqualValues(t, 5, min(v.Seq, 5), "seq must not fall")
				h.sleep(12 * time.Second)
				assert.Equal(t, []string{"leave d repair"}, s.takeLines())
				h.checkSink(s)
			})
		})
	}
}

func TestUnreadableAndInconsistentEvents(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.sleep(2 * time.Second)
		h.redis.join(room, "b")
		h.send("no event")
		h.sleep(5 * time.Millisecond)
		assert.Equal(t, []string{`join b {"n":"b"} repair`}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Unreadable)

		// A state of a member that the mirror lacks.
		h.sleep(2 * time.Second)
		m := h.hub.mirror(room)
		m.mu.Lock()
		m.numbers.remove(m.members.remove("b").User)
		m.mu.Unlock()
		s.mu.Lock()
		delete(s.present, "b")
		delete(s.plain, "b")
		s.mu.Unlock()
		h.send(h.redis.state(room, "b", "1", false))
		h.sleep(5 * time.Millisecond)
		assert.Equal(t, []string{`join b {"n":"b"} repair`, "state b 1 repair"}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseInconsistent])
	})
}

func TestDuplicateOlderThanKeptTags(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		old := h.redis.join(room, "a")
		s := h.watch()
		for range recentTags * 3 {
			h.send(h.redis.state(room, "a", "1", false))
		}
		s.takeLines()
		h.sleep(2 * time.Second)
		_, before, _ := h.redis.calls()
		h.send(old)
		h.sleep(time.Second)
		_, after, _ := h.redis.calls()
		assert.Equal(t, before+1, after, "compared as a precaution")
		assert.Equal(t, 1, h.snapshots())
		assert.Empty(t, s.takeLines())
	})
}

func TestViewShowsOwnWrites(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.watch()
		m := h.redis.join(room, "a")
		pos := h.redis.copy(room).pos
		h.hub.Expect(room, pos)
		h.hub.Expect("elsewhere", pos)
		time.AfterFunc(100*time.Millisecond, func() { h.send(m) })
		began := time.Now()
		v, ok := h.hub.View(room)
		assert.True(t, ok)
		assert.Equal(t, 1, v.Total)
		assert.Equal(t, 100*time.Millisecond, time.Since(began))
		h.hub.Expect(room, pos) // already reached
		_, ok = h.hub.View(room)
		assert.True(t, ok)
		assert.Equal(t, 100*time.Millisecond, time.Since(began))

		// The event is lost. A view waits up to 250 ms for it.
		h.redis.join(room, "b")
		h.hub.Expect(room, h.redis.copy(room).pos)
		began = time.Now()
		_, ok = h.hub.View(room)
		assert.False(t, ok)
		assert.Equal(t, deliveryDelay, time.Since(began))
		h.sleep(time.Second)
		assert.Equal(t, []string{"a", "b"}, h.watch().ids(), "the loss was detected")
	})
}
