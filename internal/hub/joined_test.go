package hub

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// join writes a join, as an owner does, and calls Joined. It does not send the event.
func (h *harness) join(room, conn string) (event string, l Listing, ok bool) {
	event = h.redis.join(room, conn)
	r := h.redis.copy(room)
	l, ok = h.hub.Joined(room, conn, r.pos, len(r.members))
	return event, l, ok
}

// fillRoom fills a room and lets two connections join it, so that it is mirrored.
func (h *harness) fillRoom(room string) {
	h.t.Helper()
	for i := range 10 {
		h.redis.join(room, fmt.Sprint("c", i))
	}
	for _, conn := range []string{"first", "second"} {
		_, _, ok := h.join(room, conn)
		assert.False(h.t, ok, "the room is not mirrored yet")
	}
	h.sleep(10 * time.Millisecond) // it is subscribed to and read
}

// subscribed returns the number of subscribed rooms.
func (h *harness) subscribed() int {
	h.listener.mu.Lock()
	defer h.listener.mu.Unlock()
	return len(h.listener.rooms)
}

// waitingJoins returns the number of joins that wait for their events.
func (h *harness) waitingJoins() int {
	m := h.hub.mirror(room)
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.seqWaiters)
}

func presentJSON(l Listing) string { return string(l.Present.Append(nil)) }

func TestJoinsOfBusyRoomAreAnsweredByMirror(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		assert.Equal(t, 1, h.snapshots())
		event := h.redis.join(room, "third")
		time.AfterFunc(5*time.Millisecond, func() { h.hub.HandleEvent(room, event) })
		r := h.redis.copy(room)
		began := time.Now()
		l, ok := h.hub.Joined(room, "third", r.pos, len(r.members))
		require.True(t, ok)
		assert.Equal(t, 5*time.Millisecond, time.Since(began), "waits for the event of its join")
		assert.Contains(t, presentJSON(l), `{"id":"third","metadata":{"n":"third"},"joinedAt":9466848000`)
		assert.Equal(t, 13, l.Total)
		assert.Equal(t, r.pos.Seq, l.Seq)
		assert.False(t, l.Bounded)
		assert.Equal(t, 1, h.snapshots(), "Redis is not asked")
	})
}

// A bounded answer contains the connection that joins.
func TestJoinAnswerOfLargeRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		h.hub.cfg.Listed = 3
		event := h.redis.join(room, "last")
		h.hub.HandleEvent(room, event)
		r := h.redis.copy(room)
		l, ok := h.hub.Joined(room, "last", r.pos, len(r.members))
		require.True(t, ok)
		assert.True(t, l.Bounded)
		assert.Equal(t, 13, l.Total)
		assert.Contains(t, presentJSON(l), `{"id":"last","metadata":{"n":"last"},"joinedAt":9466848000`)
		assert.Len(t, l.Present, 5, "three members")
	})
}

// A mirror that exists for joins lingers after the last join and then ends.
func TestMirrorsForJoinsEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		for i := range 5 {
			h.sleep(4 * time.Second)
			event := h.redis.join(room, fmt.Sprint("more", i))
			h.send(event)
			r := h.redis.copy(room)
			_, ok := h.hub.Joined(room, fmt.Sprint("more", i), r.pos, len(r.members))
			assert.True(t, ok)
		}
		assert.EqualValues(t, 17, h.hub.joins.kept.Load())
		h.sleep(4 * time.Second)
		assert.Equal(t, 1, h.subscribed())
		h.sleep(2 * time.Second)
		assert.Zero(t, h.subscribed())
		assert.Zero(t, h.hub.Stats().Rooms)
		assert.Zero(t, h.hub.joins.kept.Load())
	})
}

func TestJoinsThatStartNoMirror(t *testing.T) {
	t.Parallel()
	tests := map[string]func(h *harness){
		"a single join": func(h *harness) {
			for i := range 10 {
				h.redis.join(room, fmt.Sprint("c", i))
			}
			h.join(room, "a")
		},
		"a join every ten seconds": func(h *harness) {
			for i := range 10 {
				h.join(room, fmt.Sprint("c", i))
				h.sleep(10 * time.Second)
			}
		},
		"a room of three": func(h *harness) {
			for i := range 3 {
				h.join(room, fmt.Sprint("c", i))
			}
		},
		"a huge room": func(h *harness) {
			for range 3 {
				h.hub.Joined(room, "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, maxMembers+1)
			}
		},
		"five joins of a large room, each listing a tenth of it": func(h *harness) {
			h.hub.cfg.Listed = callCost // so the call costs as much as the listing
			for range 5 {
				h.hub.Joined(room, "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, 10*callCost)
			}
		},
		"Redis has lost the position": func(h *harness) {
			for range 3 {
				_, ok := h.hub.Joined(room, "c", store.Position{}, 0)
				assert.False(h.t, ok)
			}
		},
	}
	for name, join := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				join(h)
				assert.Zero(t, h.listener.added)
				assert.Zero(t, h.snapshots())
			})
		})
	}
}

// If each join lists a tenth of the room, the sixth join starts a mirror: the five
// calls and listings before it have cost as much as reading all members.
func TestMirrorOfLargeRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.hub.cfg.Listed = callCost
		const members = 10 * callCost
		for i := range members {
			h.redis.join(room, fmt.Sprint("c", i))
		}
		r := h.redis.copy(room)
		for i := range 6 {
			assert.Zero(t, h.subscribed())
			_, ok := h.hub.Joined(room, "c3", r.pos, members)
			assert.False(t, ok, "%d", i)
		}
		h.sleep(10 * time.Millisecond)
		l, ok := h.hub.Joined(room, "c25", r.pos, members)
		require.True(t, ok)
		assert.True(t, l.Bounded)
		assert.Contains(t, presentJSON(l), `"c25"`)
	})
}

// For any number of joined rooms, the mirrors for joins and the counts of joins are
// bounded.
func TestMirrorsForJoinsAreBounded(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		const rooms, members = 1000, 400
		for range 2 {
			for i := range rooms {
				_, ok := h.hub.Joined(fmt.Sprint("room", i), "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, members)
				assert.False(t, ok)
			}
		}
		assert.EqualValues(t, maxKeptMembers/members*members, h.hub.joins.kept.Load())
		assert.Equal(t, maxKeptMembers/members, h.listener.added)
		h.sleep(6 * time.Second)
		assert.Zero(t, h.hub.joins.kept.Load())
		assert.Zero(t, h.subscribed())

		for i := range 100_000 {
			h.hub.Joined(fmt.Sprint("once", i), "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, members)
		}
		assert.LessOrEqual(t, len(h.hub.joins.recent)+len(h.hub.joins.older), maxNotedRooms)
	})
}

// A room that has grown too large is no longer mirrored for joins. A watched room is
// mirrored anyway and has no share.
func TestMirrorOfGrownRoom(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		for range 3 {
			h.sleep(2 * time.Second)
			h.hub.Joined(room, "second", h.redis.copy(room).pos, maxMembers+1)
		}
		assert.Zero(t, h.subscribed())

		h.fillRoom(room)
		s := h.watch()
		event, _, _ := h.joinSeen(room, "third")
		assert.Zero(t, h.hub.joins.kept.Load(), "the room is watched")
		assert.Equal(t, []string{`join third {"n":"third"}`}, s.takeLines())
		assert.NotEmpty(t, event)
		assert.True(t, h.hub.Unwatch(room, s))
		h.sleep(6 * time.Second)
		assert.Zero(t, h.subscribed())
	})
}

// While events are late, only the first joins wait for them.
func TestJoinsSkipWaitWhileEventsAreLate(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		joinInVain := func(conn string) time.Duration {
			began := time.Now()
			_, _, ok := h.join(room, conn)
			assert.False(t, ok)
			return time.Since(began)
		}
		waits := []time.Duration{deliveryDelay, deliveryDelay, 0, 0}
		for i, want := range waits {
			assert.Equal(t, want, joinInVain(fmt.Sprint("late", i)), "%d", i)
		}
		h.sleep(skipWaitFor)
		waits = []time.Duration{deliveryDelay, 0} // one more attempt
		for i, want := range waits {
			assert.Equal(t, want, joinInVain(fmt.Sprint("later", i)), "%d", i)
		}
		h.sleep(time.Second) // the room is read again
		_, _, ok := h.joinSeen(room, "seen")
		assert.True(t, ok, "the mirror answers if no wait is needed")

		event := h.redis.join(room, "waits")
		r := h.redis.copy(room)
		time.AfterFunc(deliveryDelay/2, func() { h.hub.HandleEvent(room, event) })
		_, ok = h.hub.Joined(room, "waits", r.pos, len(r.members))
		assert.True(t, ok)
		assert.Equal(t, deliveryDelay, joinInVain("once"))
		assert.Equal(t, deliveryDelay, joinInVain("twice"), "one timeout does not suffice")
	})
}

// If the connection has left before the answer is made, the mirror does not answer.
func TestJoinOfConnectionThatHasLeft(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		join := h.redis.join(room, "third")
		r := h.redis.copy(room)
		h.send(join, h.redis.leave(room, "third"))
		_, ok := h.hub.Joined(room, "third", r.pos, len(r.members))
		assert.False(t, ok)
	})
}

// joinSeen is like join, and the event arrives before Joined is called.
func (h *harness) joinSeen(room, conn string) (event string, l Listing, ok bool) {
	event = h.redis.join(room, conn)
	h.hub.HandleEvent(room, event)
	r := h.redis.copy(room)
	l, ok = h.hub.Joined(room, conn, r.pos, len(r.members))
	return event, l, ok
}

// Redis must answer a join if its event is lost, if events may have been missed, or if
// the mirror moves to another epoch.
func TestJoinWithoutEvent(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		after time.Duration
		do    func(h *harness)
	}{
		"lost":         {deliveryDelay, func(*harness) {}},
		"disconnected": {10 * time.Millisecond, func(h *harness) { h.hub.HandleDisconnect() }},
		"new epoch":    {deliveryDelay, func(h *harness) { h.redis.wipe(room, nil); h.send(h.redis.join(room, "x")) }},
		"stopped":      {10 * time.Millisecond, func(h *harness) { h.hub.cancel() }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) {
				h.fillRoom(room)
				h.redis.join(room, "third")
				r := h.redis.copy(room)
				h.hub.Expect(room, r.pos)
				time.AfterFunc(10*time.Millisecond, func() { tt.do(h) })
				began := time.Now()
				_, ok := h.hub.Joined(room, "third", r.pos, len(r.members))
				assert.False(t, ok)
				assert.Equal(t, tt.after, time.Since(began))
				if name == "lost" {
					h.sleep(time.Second)
					assert.Equal(t, 2, h.snapshots(), "a comparison found the loss")
					_, ok = h.hub.Joined(room, "third", r.pos, len(r.members))
					assert.True(t, ok)
				}
			})
		})
	}
}

// If many connections join at once, each is woken by its own event.
func TestConcurrentJoinsWaitForTheirEvents(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.fillRoom(room)
		var wg sync.WaitGroup
		var events []string
		for i := range 100 {
			conn := fmt.Sprint("many", i)
			events = append(events, h.redis.join(room, conn))
			r := h.redis.copy(room)
			wg.Go(func() {
				l, ok := h.hub.Joined(room, conn, r.pos, len(r.members))
				assert.True(t, ok)
				assert.Contains(t, presentJSON(l), `{"id":"`+conn+`",`)
				assert.GreaterOrEqual(t, l.Seq, r.pos.Seq)
			})
		}
		for i, event := range events {
			h.sleep(time.Millisecond)
			assert.Equal(t, 100-i, h.waitingJoins())
			h.send(event)
		}
		wg.Wait()
	})
}
