package hub

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

// mirrorAt returns a mirror with the given number of members that has applied events
// of epoch A with the given tags, numbered from 1.
func mirrorAt(members int, tags ...string) *mirror {
	m := newMirror(New(Config{Store: newFakeRedis(), Listener: &fakeListener{}}), room)
	for i, tag := range tags {
		p := store.Position{Epoch: "A", Seq: uint64(i + 1), Tag: tag}
		if i == 0 {
			m.past.jump(p)
		} else {
			m.past.advance(&store.Event{Epoch: p.Epoch, Tag: p.Tag, Record: store.Record{Seq: p.Seq}})
		}
	}
	for i := range members {
		m.members.put(&Member{Conn: string(rune('a' + i))}, 0)
	}
	return m
}

func TestCompareWith(t *testing.T) {
	t.Parallel()
	at := func(epoch string, seq uint64, tag string) store.Position {
		return store.Position{Epoch: epoch, Seq: seq, Tag: tag}
	}
	none := store.Position{}
	tests := []struct {
		name   string
		mirror *mirror
		before comparePoint
		redis  store.Position
		want   comparison
	}{
		{"equal", mirrorAt(1, "x", "y"), comparePoint{pos: at("A", 2, "y")}, at("A", 2, "y"), same},
		{"both empty", mirrorAt(0), comparePoint{empty: true}, none, same},
		{"empty, and Redis forgot the room", mirrorAt(0, "x", "y"), comparePoint{pos: at("A", 2, "y"), empty: true}, none, same},
		{"first member joined since", mirrorAt(1, "x"), comparePoint{empty: true}, none, same},
		{"Redis forgot members", mirrorAt(1, "x"), comparePoint{pos: at("A", 1, "x")}, none, differs},
		{"events on their way", mirrorAt(1, "x"), comparePoint{pos: at("A", 1, "x")}, at("A", 9, "z"), behind},
		{"room is new", mirrorAt(0), comparePoint{empty: true}, at("B", 1, "z"), behind},
		{"another epoch", mirrorAt(1, "x"), comparePoint{pos: at("A", 1, "x")}, at("B", 1, "z"), behind},
		{"another epoch since", mirrorAt(1, "x"), comparePoint{pos: at("0", 7, "x")}, at("0", 7, "x"), same},
		{"passed", mirrorAt(1, "x", "y", "z"), comparePoint{pos: at("A", 1, "x")}, at("A", 2, "y"), same},
		{"passed with another tag", mirrorAt(1, "x", "y", "z"), comparePoint{pos: at("A", 1, "x")}, at("A", 2, "?"), differs},
		{"another tag", mirrorAt(1, "x", "y"), comparePoint{pos: at("A", 2, "y")}, at("A", 2, "?"), differs},
		{"went back", mirrorAt(1, "x", "y"), comparePoint{pos: at("A", 2, "y")}, at("A", 1, "x"), differs},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, tt.mirror.compareWith(tt.before, tt.redis))
		})
	}
}

func TestCheckpointWithAnotherTag(t *testing.T) {
	inBubble(t, func(t *testing.T, h *harness) {
		h.redis.join(room, "a")
		s := h.watch()
		h.sleep(9950 * time.Millisecond)
		// Redis is at seq 2 of one history. The mirror gets event 2 of another.
		fork := h.redis.copy(room)
		other := h.redis.join(room, "x")
		h.redis.wipe(room, fork)
		h.redis.join(room, "y")
		h.sleep(100 * time.Millisecond)
		h.send(other)
		h.sleep(5 * time.Millisecond)
		assert.Equal(t, []string{`join x {"n":"x"}`, `join y {"n":"y"} repair`}, s.takeLines())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseFork])
		h.sleep(12 * time.Second)
		assert.Equal(t, []string{"leave x repair"}, s.takeLines())
	})
}

func TestUnreadableEventsWhileReading(t *testing.T) {
	t.Parallel()
	for _, paged := range []bool{true, false} {
		test := func(t *testing.T, h *harness) {
			h.redis.join(room, "a")
			h.redis.set(func(f *fakeRedis) {
				f.paged = paged
				f.afterRead = func(string) {
					f.set(func(f *fakeRedis) { f.afterRead = nil })
					h.send("?")
				}
				f.betweenPages = func(string) {
					f.set(func(f *fakeRedis) { f.betweenPages = nil })
					f.join(room, "b")
					time.AfterFunc(50*time.Millisecond, func() { h.send("?") })
				}
			})
			s := h.watch()
			h.sleep(time.Second)
			h.checkSink(s)
			assert.GreaterOrEqual(t, h.snapshots(), 2)
		}
		t.Run("", func(t *testing.T) { inBubble(t, test) })
	}
}

func TestCauses(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for c := causeNone; c <= numCauses; c++ {
		assert.NotEmpty(t, c.String())
		assert.False(t, seen[c.String()])
		seen[c.String()] = true
	}
}
