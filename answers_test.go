package mesh

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestCostOfJoinAnswers: while one connection after the other joins a room,
// here and on another server, the answers come from memory, hold everybody who
// has joined before, and cost Redis nothing beside the joins.
func TestCostOfJoinAnswers(t *testing.T) {
	t.Parallel()
	w := realWorld(t)
	c := newCosts(t, w)
	defer c.print()
	s, other := w.tracked(), w.tracked()
	channel := s.n.keys.EventsPrefix() + "lobby"
	heard := func() int64 {
		counts, err := c.admin.PubSubNumSub(t.Context(), channel).Result()
		require.NoError(t, err)
		return counts[channel]
	}
	joined := map[string]bool{}
	join := func(s *testServer) *peer {
		p := s.dial()
		joined[p.id] = true
		ids := p.join("lobby").ids(t)
		assert.Len(t, ids, len(joined))
		for _, id := range ids {
			assert.True(t, joined[id], id)
		}
		return p
	}
	join(other)
	join(other)
	join(other)
	join(s)
	assert.Zero(t, heard(), "a join or two start no mirror")
	mirrored := func() bool {
		_, ok := s.n.hub.View("lobby")
		return ok
	}
	for range 2 {
		join(s)
	}
	w.eventually(5*time.Second, mirrored, "the room is mirrored")

	const more = 20
	c.measure("join through the socket, room busy", 2*more, func() {
		for range more {
			join(s)
			join(other) // mirrored there by now, or not: its answers are as good
		}
	})
	w.eventually(5*time.Second, func() bool { _, ok := other.n.hub.View("lobby"); return ok }, "there, too")
	got := c.measure("join through the socket, room mirrored", more, func() {
		for range more {
			join(s)
		}
	})
	// Where an event takes longer than a quarter of a second Redis is asked.
	assert.Less(t, got["hscan"], more/2, "%v", got)
	w.eventually(20*time.Second, func() bool { return heard() == 0 }, "the mirrors go when nobody joins any more")
}

// Who joins at the same time is answered with those whose joins came before.
func TestJoinAnswersOfMany(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked()
		const many = 40
		peers := make([]*peer, many)
		for i := range peers {
			peers[i] = s.dial()
		}
		var mu sync.Mutex // guards the following
		done := map[string]bool{}
		var joining sync.WaitGroup
		for _, p := range peers {
			joining.Go(func() {
				mu.Lock()
				before := fmt.Sprint(done)
				want := make([]string, 0, len(done)+1)
				for id := range done {
					want = append(want, id)
				}
				mu.Unlock()
				ids := p.join("lobby").ids(t)
				assert.Subset(t, ids, append(want, p.id), before)
				mu.Lock()
				done[p.id] = true
				mu.Unlock()
			})
		}
		joining.Wait()
	})
}
