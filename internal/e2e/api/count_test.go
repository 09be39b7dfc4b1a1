package api

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// Counts returns the same numbers as Count, in one round trip for many rooms of all
// buckets.
func TestCounts(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		p, hook := w.Counting()
		other := w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("doc-1"), mesh.PresenceOptions{}))
		want := make(map[string]int)
		var rooms []string
		for i := range 200 {
			room := fmt.Sprint("doc-", i)
			rooms = append(rooms, room)
			want[room] = 0
		}
		for i := range 3 {
			id := fmt.Sprint("c", i)
			at := []*mesh.PresenceManager{p, other}[i%2]
			require.NoError(t, at.Connect(t.Context(), id, nil))
			for room := i; room < 10; room++ {
				require.NoError(t, at.Join(t.Context(), rooms[room], id))
				want[rooms[room]]++
			}
		}
		hook.Trips.Store(0)
		got, err := p.Counts(t.Context(), append(rooms, rooms[1], rooms[1])...)
		require.NoError(t, err)
		assert.Equal(t, want, got)
		assert.EqualValues(t, 1, hook.Trips.Load())
		for _, room := range rooms[:12] {
			one, err := p.Count(t.Context(), room)
			require.NoError(t, err)
			assert.Equal(t, want[room], one, room)
		}

		hook.Trips.Store(0)
		none, err := p.Counts(t.Context())
		require.NoError(t, err)
		assert.NotNil(t, none)
		assert.Empty(t, none)
		assert.Zero(t, hook.Trips.Load())

		many := make([]string, 2500)
		for i := range many {
			many[i] = fmt.Sprint("doc-", i)
		}
		got, err = p.Counts(t.Context(), many...)
		require.NoError(t, err)
		assert.Len(t, got, len(many))
		assert.Equal(t, 3, got["doc-2"])
		assert.EqualValues(t, 3, hook.Trips.Load(), "one round trip per 1,024 rooms")
	})
}

// Counts returns either all numbers or an error.
func TestCountsAllOrNone(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p, hook := w.Counting()
		fails := func(want error, rooms ...string) error {
			t.Helper()
			got, err := p.Counts(t.Context(), rooms...)
			require.ErrorIs(t, err, want)
			require.Nil(t, got)
			return err
		}
		for _, bad := range []string{"", "a\x00b", "\xff", strings.Repeat("a", 257)} {
			fails(mesh.ErrInvalidRoom, "lobby", bad)
		}
		require.Zero(t, hook.Trips.Load(), "no call to Redis")

		end := "attic"
		hook.Fail.Store(&end)
		fails(mesh.ErrUnavailable, "lobby", "attic", "cellar")
		hook.Fail.Store(nil)

		require.NoError(t, w.Client().Set(t.Context(), w.Keys().Members("odd"), "mine", 0).Err())
		fails(mesh.ErrUnavailable, "lobby", "odd")

		w.Mem.Hang()
		began := time.Now()
		fails(mesh.ErrUnavailable, "lobby", "attic")
		assert.LessOrEqual(t, time.Since(began), 2*time.Second)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := p.Counts(ctx, "lobby")
		require.ErrorIs(t, err, context.Canceled)
		w.Mem.Resume()
		_, err = p.Counts(t.Context(), "lobby", "attic")
		require.NoError(t, err)

		idle, err := mesh.NewPresenceManager(w.Options())
		require.NoError(t, err)
		_, err = idle.Counts(t.Context())
		require.ErrorIs(t, err, mesh.ErrNotStarted)
		require.NoError(t, idle.Shutdown(t.Context()))
		_, err = idle.Counts(t.Context(), "lobby")
		require.ErrorIs(t, err, mesh.ErrClosed)
	})
}
