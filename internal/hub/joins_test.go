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

// enter has a connection join a room, as an owner does, and asks for the answer.
// The event is on its way until it is sent.
func (h *house) enter(room, conn string) (event string, l Listing, ok bool) {
	event = h.redis.join(room, conn)
	r := h.redis.copy(room)
	l, ok = h.hub.Joined(room, conn, r.pos, len(r.members))
	return event, l, ok
}

// crowded fills a room and has two connections join it, so that it is mirrored.
func (h *house) crowded(room string) {
	h.t.Helper()
	for i := range 10 {
		h.redis.join(room, fmt.Sprint("c", i))
	}
	for _, conn := range []string{"first", "second"} {
		_, _, ok := h.enter(room, conn)
		assert.False(h.t, ok, "Redis is to be asked")
	}
	h.pass(10 * time.Millisecond) // it is subscribed to, and read
}

// subscribed returns how many rooms are subscribed to.
func (h *house) subscribed() int {
	h.listener.mu.Lock()
	defer h.listener.mu.Unlock()
	return len(h.listener.rooms)
}

// waiting returns how many wait for their own joins.
func (h *house) waiting() int {
	m := h.hub.mirror(room)
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.arrivals)
}

func present(l Listing) string { return string(l.Present.Append(nil)) }

func TestJoinsOfABusyRoomAreAnsweredFromAMirror(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		assert.Equal(t, 1, h.snapshots())
		event := h.redis.join(room, "third")
		time.AfterFunc(5*time.Millisecond, func() { h.hub.HandleEvent(room, event) })
		r := h.redis.copy(room)
		began := time.Now()
		l, ok := h.hub.Joined(room, "third", r.pos, len(r.members))
		require.True(t, ok)
		assert.Equal(t, 5*time.Millisecond, time.Since(began), "its own join has been seen")
		assert.Contains(t, present(l), `{"id":"third","metadata":{"n":"third"}}`)
		assert.Equal(t, 13, l.Total)
		assert.Equal(t, r.pos.Seq, l.Seq)
		assert.False(t, l.Bounded)
		assert.Equal(t, 1, h.snapshots(), "and Redis is not asked")
	})
}

// What is answered is bounded, and the one that asks is in it.
func TestJoinAnswerOfALargeRoom(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		h.hub.cfg.Listed = 3
		event := h.redis.join(room, "last")
		h.hub.HandleEvent(room, event)
		r := h.redis.copy(room)
		l, ok := h.hub.Joined(room, "last", r.pos, len(r.members))
		require.True(t, ok)
		assert.True(t, l.Bounded)
		assert.Equal(t, 13, l.Total)
		assert.Contains(t, present(l), `{"id":"last","metadata":{"n":"last"}}`)
		assert.Len(t, l.Present, 5, "three members")
	})
}

// A mirror that joins keep goes when they end, and one that does not cost more
// than it is worth is not made.
func TestMirrorsForJoinsEnd(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		for i := range 5 {
			h.pass(4 * time.Second)
			event := h.redis.join(room, fmt.Sprint("more", i))
			h.send(event)
			r := h.redis.copy(room)
			_, ok := h.hub.Joined(room, fmt.Sprint("more", i), r.pos, len(r.members))
			assert.True(t, ok)
		}
		assert.EqualValues(t, 17, h.hub.joins.kept.Load())
		h.pass(4 * time.Second)
		assert.Equal(t, 1, h.subscribed())
		h.pass(2 * time.Second)
		assert.Zero(t, h.subscribed())
		assert.Zero(t, h.hub.Stats().Rooms)
		assert.Zero(t, h.hub.joins.kept.Load())
	})
}

func TestJoinsThatStartNoMirror(t *testing.T) {
	t.Parallel()
	tests := map[string]func(h *house){
		"one alone": func(h *house) {
			for i := range 10 {
				h.redis.join(room, fmt.Sprint("c", i))
			}
			h.enter(room, "a")
		},
		"one every ten seconds": func(h *house) {
			for i := range 10 {
				h.enter(room, fmt.Sprint("c", i))
				h.pass(10 * time.Second)
			}
		},
		"a room of three": func(h *house) {
			for i := range 3 {
				h.enter(room, fmt.Sprint("c", i))
			}
		},
		"a huge room": func(h *house) {
			for range 3 {
				h.hub.Joined(room, "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, most+1)
			}
		},
		"a large room, of which joins list a tenth, five times": func(h *house) {
			h.hub.cfg.Listed = callCosts // and a call costs as much again
			for range 5 {
				h.hub.Joined(room, "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, 10*callCosts)
			}
		},
		"Redis has lost the position": func(h *house) {
			for range 3 {
				_, ok := h.hub.Joined(room, "c", store.Position{}, 0)
				assert.False(h.t, ok)
			}
		},
	}
	for name, join := range tests {
		t.Run(name, func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				join(h)
				assert.Zero(t, h.listener.added)
				assert.Zero(t, h.snapshots())
			})
		})
	}
}

// The sixth join of a room of which each lists a tenth starts a mirror: those
// before it have cost as much, five calls and half of the members.
func TestMirrorOfALargeRoom(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.hub.cfg.Listed = callCosts
		const members = 10 * callCosts
		for i := range members {
			h.redis.join(room, fmt.Sprint("c", i))
		}
		r := h.redis.copy(room)
		for i := range 6 {
			assert.Zero(t, h.subscribed())
			_, ok := h.hub.Joined(room, "c3", r.pos, members)
			assert.False(t, ok, "%d", i)
		}
		h.pass(10 * time.Millisecond)
		l, ok := h.hub.Joined(room, "c25", r.pos, members)
		require.True(t, ok)
		assert.True(t, l.Bounded)
		assert.Contains(t, present(l), `"c25"`)
	})
}

// However many rooms are joined, what is mirrored for joins is bounded, and so
// is what is remembered of them.
func TestMirrorsForJoinsAreBounded(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		const rooms, members = 1000, 400
		for range 2 {
			for i := range rooms {
				_, ok := h.hub.Joined(fmt.Sprint("room", i), "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, members)
				assert.False(t, ok)
			}
		}
		assert.EqualValues(t, mostKept/members*members, h.hub.joins.kept.Load())
		assert.Equal(t, mostKept/members, h.listener.added)
		h.pass(6 * time.Second)
		assert.Zero(t, h.hub.joins.kept.Load())
		assert.Zero(t, h.subscribed())

		for i := range 100_000 {
			h.hub.Joined(fmt.Sprint("once", i), "c", store.Position{Epoch: "e", Seq: 1, Tag: "t"}, members)
		}
		assert.LessOrEqual(t, len(h.hub.joins.young)+len(h.hub.joins.old), joinsNoted)
	})
}

// A room that has grown, or that others have taken the place of, is not kept
// for joins any more; while it is watched it is mirrored anyway.
func TestMirrorOfAGrownRoom(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		for range 3 {
			h.pass(2 * time.Second)
			h.hub.Joined(room, "second", h.redis.copy(room).pos, most+1)
		}
		assert.Zero(t, h.subscribed())

		h.crowded(room)
		s := h.watch()
		event, _, _ := h.enterSeen(room, "third")
		assert.Zero(t, h.hub.joins.kept.Load(), "it is watched")
		assert.Equal(t, []string{`join third {"n":"third"}`}, s.heard())
		assert.NotEmpty(t, event)
		assert.True(t, h.hub.Unwatch(room, s))
		h.pass(6 * time.Second)
		assert.Zero(t, h.subscribed())
	})
}

// Where events are late, not every join of a client that joins many rooms waits.
func TestJoinsDoNotAllWaitInVain(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		inVain := func(conn string) time.Duration {
			began := time.Now()
			_, _, ok := h.enter(room, conn)
			assert.False(t, ok)
			return time.Since(began)
		}
		waits := []time.Duration{inFlight, inFlight, 0, 0}
		for i, want := range waits {
			assert.Equal(t, want, inVain(fmt.Sprint("late", i)), "%d", i)
		}
		h.pass(hasty)
		waits = []time.Duration{inFlight, 0} // it has been tried again
		for i, want := range waits {
			assert.Equal(t, want, inVain(fmt.Sprint("later", i)), "%d", i)
		}
		h.pass(time.Second) // it has been read anew
		_, _, ok := h.enterSeen(room, "seen")
		assert.True(t, ok, "where nothing is to be waited for, the mirror answers")

		event := h.redis.join(room, "waits")
		r := h.redis.copy(room)
		time.AfterFunc(inFlight/2, func() { h.hub.HandleEvent(room, event) })
		_, ok = h.hub.Joined(room, "waits", r.pos, len(r.members))
		assert.True(t, ok)
		assert.Equal(t, inFlight, inVain("once"))
		assert.Equal(t, inFlight, inVain("twice"), "once in vain is no habit")
	})
}

// Who is not in the room any more when the answer is made is not answered with a
// list in which it is missing.
func TestJoinOfOneThatHasLeft(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		join := h.redis.join(room, "third")
		r := h.redis.copy(room)
		h.send(join, h.redis.leave(room, "third"))
		_, ok := h.hub.Joined(room, "third", r.pos, len(r.members))
		assert.False(t, ok)
	})
}

// enterSeen is enter where the event has come before the answer.
func (h *house) enterSeen(room, conn string) (event string, l Listing, ok bool) {
	event = h.redis.join(room, conn)
	h.hub.HandleEvent(room, event)
	r := h.redis.copy(room)
	l, ok = h.hub.Joined(room, conn, r.pos, len(r.members))
	return event, l, ok
}

// Whoever waits for his own join is answered by Redis where the event is lost,
// where events may be missed, and where the mirror goes on in another epoch.
func TestJoinWhoseEventDoesNotCome(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		after time.Duration
		do    func(h *house)
	}{
		"lost":      {inFlight, func(*house) {}},
		"cut off":   {10 * time.Millisecond, func(h *house) { h.hub.HandleLost() }},
		"new epoch": {inFlight, func(h *house) { h.redis.wipe(room, nil); h.send(h.redis.join(room, "x")) }},
		"stopped":   {10 * time.Millisecond, func(h *house) { h.hub.cancel() }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			live(t, func(t *testing.T, h *house) {
				h.crowded(room)
				h.redis.join(room, "third")
				r := h.redis.copy(room)
				h.hub.Expect(room, r.pos)
				time.AfterFunc(10*time.Millisecond, func() { tt.do(h) })
				began := time.Now()
				_, ok := h.hub.Joined(room, "third", r.pos, len(r.members))
				assert.False(t, ok)
				assert.Equal(t, tt.after, time.Since(began))
				if name == "lost" {
					h.pass(time.Second)
					assert.Equal(t, 2, h.snapshots(), "the mirror has been compared")
					_, ok = h.hub.Joined(room, "third", r.pos, len(r.members))
					assert.True(t, ok)
				}
			})
		})
	}
}

// Each of many who join at once is woken by its own event.
func TestManyWaitForTheirOwnJoins(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.crowded(room)
		var wg sync.WaitGroup
		var events []string
		for i := range 100 {
			conn := fmt.Sprint("many", i)
			events = append(events, h.redis.join(room, conn))
			r := h.redis.copy(room)
			wg.Go(func() {
				l, ok := h.hub.Joined(room, conn, r.pos, len(r.members))
				assert.True(t, ok)
				assert.Contains(t, present(l), `{"id":"`+conn+`",`)
				assert.GreaterOrEqual(t, l.Seq, r.pos.Seq)
			})
		}
		for i, event := range events {
			h.pass(time.Millisecond)
			assert.Equal(t, 100-i, h.waiting())
			h.send(event)
		}
		wg.Wait()
	})
}
