package local

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// A join that Redis has not taken in time reports whether it is kept, and waits no longer
// than its time limit.
func TestKeptJoin(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		r.away()
		left := make(chan Joined)
		go func() {
			joined, err := c.Join(r.Context(), "y")
			assert.ErrorIs(r, err, ErrUnavailable)
			left <- joined
		}()
		r.sleep(10 * time.Millisecond)
		go func() { _, _ = c.Leave(r.Context(), "y", store.CauseLeft) }()
		require.False(r, (<-left).Kept, "it has left")

		began := time.Now()
		joined, err := c.JoinIf(r.Context(), "x", JoinOptions{Within: 50 * time.Millisecond})
		require.ErrorIs(r, err, ErrUnavailable)
		require.True(r, joined.Kept)
		require.False(r, joined.Again)
		require.Equal(r, 50*time.Millisecond, time.Since(began))
		require.Equal(r, 50*time.Millisecond, joined.Waited)

		joined, err = c.Join(r.Context(), "x")
		require.ErrorIs(r, err, ErrUnavailable)
		require.True(r, joined.Kept && joined.Again)
		r.heal()
		r.sleep(5 * time.Second)
		_, in := r.storedEntry("x", "a")
		require.True(r, in)
		_, in = r.storedEntry("y", "a")
		require.False(r, in)
	})
}

// A join that Redis refuses by itself is kept too.
func TestRefusedJoinIsKept(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		require.NoError(r, c.Registered(r.Context()))
		r.refuse(func(op store.Op) bool { return op.Kind == store.OpJoin })
		joined, err := c.Join(r.Context(), "x")
		require.ErrorIs(r, err, ErrUnavailable)
		require.True(r, joined.Kept)
		require.Less(r, joined.Waited, 100*time.Millisecond, "the answer is known at once")
		r.heal()
		r.sleep(2 * time.Second)
		_, in := r.storedEntry("x", "a")
		require.True(r, in)
	})
}

// Rooms that a connection has left while Redis is away do not count for the limit. Their
// number is limited all the same.
func TestRoomsLeftDoNotCount(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.join(c, "y")
		r.away()
		r.sleep(2 * time.Second)
		kept := func(room string) {
			r.Helper()
			joined, err := c.JoinIf(r.Context(), room, JoinOptions{Within: time.Millisecond})
			require.ErrorIs(r, err, ErrUnavailable)
			require.True(r, joined.Kept)
		}
		leave := func(room string) error {
			r.Helper()
			was, err := c.Leave(r.Context(), room, store.CauseLeft)
			require.True(r, was)
			return err
		}
		require.ErrorIs(r, leave("x"), ErrUnavailable, "Redis holds this one")
		kept("z")
		_, err := c.Join(r.Context(), "x")
		require.ErrorIs(r, err, ErrTooMany, "it has left that one, and is in two others")
		_ = leave("z") // fails if the join is on its way: Redis may hold it
		kept("x")
		require.ErrorIs(r, leave("x"), ErrUnavailable)

		for i := range 4 * maxLeaving {
			room := fmt.Sprint(i)
			joined, err := c.JoinIf(r.Context(), room, JoinOptions{Within: time.Millisecond})
			require.ErrorIs(r, err, ErrUnavailable)
			require.True(r, joined.Kept)
			_ = leave(room)
		}
		c.mu.Lock()
		require.LessOrEqual(r, len(c.entries), maxLeaving+2)
		c.mu.Unlock()
		kept("last")
		require.Equal(r, []string{"last", "y"}, c.Rooms())
		r.heal()
		r.sleep(5 * time.Second)
		for _, room := range []string{"y", "last"} {
			_, in := r.storedEntry(room, "a")
			require.True(r, in, room)
		}
		require.Equal(r, 3, r.owned(), "these two, and the connection")
		r.atRest()
	}, func(cfg *Config) { cfg.MaxRooms = 2 })
}

func TestSomeInRoom(t *testing.T) {
	virtual(t, func(r *rig) {
		for _, id := range []string{"a", "b", "c"} {
			r.join(r.connect(id), "x")
		}
		for limit, want := range map[int]int{-1: 3, 0: 0, 2: 2, 5: 3} {
			list, total := r.Some("x", limit)
			require.Len(r, list, want)
			require.Equal(r, 3, total)
		}
		list, total := r.Some("y", 1)
		require.Empty(r, list)
		require.Zero(r, total)
	})
}
