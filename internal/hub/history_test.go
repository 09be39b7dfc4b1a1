package hub

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

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
	for s := range uint64(311) {
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
	assert.True(t, h.hasLeft("A"))
	assert.False(t, h.hasLeft("B"))
	assert.False(t, h.hasLeft("C"))
	h.jump(store.Position{})
	epoch, seq = h.shown()
	assert.Equal(t, "B", epoch, "a room that Redis does not know keeps its epoch")
	assert.EqualValues(t, 1, seq)
	h.jump(store.Position{Epoch: "A", Seq: 20, Tag: "?"})
	_, seq = h.shown()
	assert.EqualValues(t, 300, seq, "back in an epoch with a higher floor")
	for e := 'C'; e < 'Z'; e++ {
		h.jump(store.Position{Epoch: string(e), Seq: 1, Tag: "?"})
	}
	assert.Len(t, h.floors, maxFloors)
	assert.False(t, h.hasLeft("A"))
}

func tagOf(seq uint64) string { return string(rune('!' + seq)) }
