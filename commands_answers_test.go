package mesh_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// TestCostOfJoinAnswers: while one connection after the other joins a room,
// here and on another server, the answers come from memory, hold everybody who
// has joined before, and cost Redis nothing beside the joins.
func TestCostOfJoinAnswers(t *testing.T) {
	t.Parallel()
	w := harness.RealWorld(t)
	c := harness.NewCosts(t, w)
	defer c.Print()
	s, other := w.Tracked(), w.Tracked()
	channel := testhook.PartsOf(s.Server).Keys.EventsPrefix() + "lobby"
	heard := func() int64 {
		counts, err := c.Admin.PubSubNumSub(t.Context(), channel).Result()
		require.NoError(t, err)
		return counts[channel]
	}
	joined := map[string]bool{}
	join := func(s *harness.Server) *harness.Peer {
		p := s.Dial()
		joined[p.ID] = true
		ids := p.Join("lobby").IDs(t)
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
		_, ok := testhook.PartsOf(s.Server).Hub.View("lobby")
		return ok
	}
	for range 2 {
		join(s)
	}
	w.Eventually(5*time.Second, mirrored, "the room is mirrored")

	const more = 20
	c.Measure("join through the socket, room busy", 2*more, func() {
		for range more {
			join(s)
			join(other) // mirrored there by now, or not: its answers are as good
		}
	})
	w.Eventually(5*time.Second, func() bool { _, ok := testhook.PartsOf(other.Server).Hub.View("lobby"); return ok }, "there, too")
	got := c.Measure("join through the socket, room mirrored", more, func() {
		for range more {
			join(s)
		}
	})
	// If an event takes longer than a quarter of a second, Redis is asked.
	assert.LessOrEqual(t, got["hscan"], more, "%v", got)
	w.Eventually(20*time.Second, func() bool { return heard() == 0 }, "the mirrors go when nobody joins any more")
}

// Who joins at the same time is answered with those whose joins came before.
func TestJoinAnswersOfMany(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		const many = 40
		peers := make([]*harness.Peer, many)
		for i := range peers {
			peers[i] = s.Dial()
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
				ids := p.Join("lobby").IDs(t)
				assert.Subset(t, ids, append(want, p.ID), before)
				mu.Lock()
				done[p.ID] = true
				mu.Unlock()
			})
		}
		joining.Wait()
	})
}
