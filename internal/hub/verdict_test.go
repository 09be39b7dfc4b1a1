package hub

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

// mirrorAt returns a mirror that came through the tags of epoch A, numbered
// from 1, and has as many members.
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
		m.roster.put(&Member{Conn: string(rune('a' + i))})
	}
	return m
}

func TestVerdict(t *testing.T) {
	t.Parallel()
	at := func(epoch string, seq uint64, tag string) store.Position {
		return store.Position{Epoch: epoch, Seq: seq, Tag: tag}
	}
	none := store.Position{}
	tests := []struct {
		name   string
		mirror *mirror
		before check
		redis  store.Position
		want   verdict
	}{
		{"alike", mirrorAt(1, "x", "y"), check{pos: at("A", 2, "y")}, at("A", 2, "y"), same},
		{"both know nothing", mirrorAt(0), check{empty: true}, none, same},
		{"empty, and Redis forgot", mirrorAt(0, "x", "y"), check{pos: at("A", 2, "y"), empty: true}, none, same},
		{"first member came since", mirrorAt(1, "x"), check{empty: true}, none, same},
		{"Redis forgot members", mirrorAt(1, "x"), check{pos: at("A", 1, "x")}, none, differs},
		{"events to come", mirrorAt(1, "x"), check{pos: at("A", 1, "x")}, at("A", 9, "z"), behind},
		{"room is new", mirrorAt(0), check{empty: true}, at("B", 1, "z"), behind},
		{"another epoch", mirrorAt(1, "x"), check{pos: at("A", 1, "x")}, at("B", 1, "z"), behind},
		{"another epoch since", mirrorAt(1, "x"), check{pos: at("0", 7, "x")}, at("0", 7, "x"), same},
		{"came through", mirrorAt(1, "x", "y", "z"), check{pos: at("A", 1, "x")}, at("A", 2, "y"), same},
		{"came another way", mirrorAt(1, "x", "y", "z"), check{pos: at("A", 1, "x")}, at("A", 2, "?"), differs},
		{"another tag", mirrorAt(1, "x", "y"), check{pos: at("A", 2, "y")}, at("A", 2, "?"), differs},
		{"went back", mirrorAt(1, "x", "y"), check{pos: at("A", 2, "y")}, at("A", 1, "x"), differs},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, tt.want, tt.mirror.verdict(tt.before, tt.redis))
		})
	}
}

func TestHistory(t *testing.T) {
	t.Parallel()
	var h history
	event := func(seq uint64) *store.Event {
		return &store.Event{Epoch: "A", Tag: tagOf(seq), Prev: tagOf(seq - 1), Record: store.Record{Seq: seq}}
	}
	epoch, seq := h.shown()
	assert.Empty(t, epoch)
	assert.Zero(t, seq)
	h.jump(store.Position{Epoch: "A", Seq: 10, Tag: tagOf(10)})
	for s := uint64(11); s <= 300; s++ {
		assert.True(t, follows(h.pos, event(s)))
		h.advance(event(s))
	}
	for s := uint64(0); s <= 310; s++ {
		tag, known := h.recall(s)
		assert.Equal(t, s <= 300 && s > 300-recentTags, known)
		if known {
			assert.Equal(t, tagOf(s), tag)
		}
	}
	h.jump(store.Position{Epoch: "A", Seq: 7, Tag: "?"})
	_, known := h.recall(6)
	assert.False(t, known)
	epoch, seq = h.shown()
	assert.Equal(t, "A", epoch)
	assert.EqualValues(t, 300, seq)

	h.jump(store.Position{Epoch: "B", Seq: 1, Tag: "?"})
	assert.True(t, h.left("A"))
	assert.False(t, h.left("B"))
	assert.False(t, h.left("C"))
	h.jump(store.Position{})
	epoch, seq = h.shown()
	assert.Equal(t, "B", epoch, "a room that Redis does not know keeps its epoch")
	assert.EqualValues(t, 1, seq)
	h.jump(store.Position{Epoch: "A", Seq: 20, Tag: "?"})
	_, seq = h.shown()
	assert.EqualValues(t, 300, seq, "back in an epoch that was shown further on")
	for e := 'C'; e < 'Z'; e++ {
		h.jump(store.Position{Epoch: string(e), Seq: 1, Tag: "?"})
	}
	assert.Len(t, h.floors, keptFloors)
	assert.False(t, h.left("A"))
}

func tagOf(seq uint64) string { return string(rune('!' + seq)) }

func TestEra(t *testing.T) {
	t.Parallel()
	never, gone := era{trusted: true}, era{}
	assert.False(t, never.since(never))
	assert.True(t, gone.since(era{id: "1"}))
	assert.True(t, era{id: "1"}.since(never))
	assert.True(t, era{id: "1"}.since(gone))
	assert.True(t, era{id: "2"}.since(era{id: "1"}))
	assert.False(t, era{id: "1"}.since(era{id: "1"}))
}

func TestCheckpointWithAnotherTag(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a")
		s := h.watch()
		h.pass(9950 * time.Millisecond)
		// Redis stands at 2 of one history; we hear of the 2 of another.
		fork := h.redis.copy(room)
		other := h.redis.join(room, "x")
		h.redis.wipe(room, fork)
		h.redis.join(room, "y")
		h.pass(100 * time.Millisecond)
		h.send(other)
		h.pass(5 * time.Millisecond)
		assert.Equal(t, []string{`join x {"n":"x"}`, `join y {"n":"y"} repair`}, s.heard())
		assert.EqualValues(t, 1, h.hub.Stats().Snapshots[CauseFork])
		h.pass(12 * time.Second)
		assert.Equal(t, []string{"leave x repair"}, s.heard())
	})
}

func TestGarbledEventsWhileReading(t *testing.T) {
	t.Parallel()
	for _, paged := range []bool{true, false} {
		live1 := func(t *testing.T, h *house) {
			h.redis.join(room, "a")
			h.redis.set(func(f *fakeRedis) {
				f.paged = paged
				f.snapped = func(string) {
					f.set(func(f *fakeRedis) { f.snapped = nil })
					h.send("?")
				}
				f.between = func(string) {
					f.set(func(f *fakeRedis) { f.between = nil })
					f.join(room, "b")
					time.AfterFunc(50*time.Millisecond, func() { h.send("?") })
				}
			})
			s := h.watch()
			h.pass(time.Second)
			h.agree(s)
			assert.GreaterOrEqual(t, h.snapshots(), 2)
		}
		t.Run("", func(t *testing.T) { live(t, live1) })
	}
}

func TestCauses(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for c := causeNone; c <= causes; c++ {
		assert.NotEmpty(t, c.String())
		assert.False(t, seen[c.String()])
		seen[c.String()] = true
	}
}
