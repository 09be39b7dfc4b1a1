package mesh_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

func TestServersOfTheGroup(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s, p := w.Tracked(), w.Manager()
		a, _ := s.Dial(), s.Dial()
		a.Join("lobby")
		a.Join("attic")

		list, err := s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 2)
		for _, info := range list {
			assert.False(t, info.Dead)
			assert.Zero(t, info.DeadFor)
			assert.Positive(t, info.LeaseLeft)
			assert.Less(t, info.LeaseAge, w.Unhurried(10*time.Second))
			assert.Equal(t, 10*time.Second, info.LeaseLeft+info.LeaseAge)
			if info.Self {
				assert.Equal(t, s.Stats().Incarnation, info.Incarnation)
				assert.Equal(t, 4, info.Owned, "two connections and two entries")
			} else {
				assert.Equal(t, p.Stats().Incarnation, info.Incarnation)
				assert.Zero(t, info.Owned)
			}
		}
		require.NoError(t, p.Shutdown(t.Context()))
		list, err = s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 1, "one that was shut down is neither alive nor dead")
		assert.True(t, list[0].Self)
	})
}

// A server that dies is seen to have let its lease run out, then among the
// dead perhaps, and then no more.
func TestADeadServerIsSeenToGo(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		p, die := w.Doomed()
		inc := p.Stats().Incarnation
		for i := range 3 {
			id := fmt.Sprint("c", i)
			require.NoError(t, p.Connect(t.Context(), id, nil))
			require.NoError(t, p.Join(t.Context(), "lobby", id))
		}
		// Once it judges others, it buries this one as soon as the lease is over.
		w.Sleep(11 * time.Second)
		info := w.Found(s, inc)
		require.NotNil(t, info)
		assert.Equal(t, 6, info.Owned)
		assert.Positive(t, info.LeaseLeft)

		die()
		before := info.LeaseLeft
		w.Eventually(12*time.Second, func() bool {
			if info = w.Found(s, inc); info == nil || info.Dead {
				return true
			}
			assert.Less(t, info.LeaseAge, w.Unhurried(11*time.Second), "the promise of a bounded leave")
			before = min(before, info.LeaseLeft)
			return false
		}, "%s is buried", inc)
		if w.Virtual { // else it depends on when it is looked at
			assert.Less(t, before, 2*time.Second, "it was seen to run out")
		}
		w.Eventually(2*time.Second, func() bool { return w.Found(s, inc) == nil }, "%s is cleaned up after", inc)
		count, err := s.Presence().Count(t.Context(), "lobby")
		require.NoError(t, err)
		assert.Zero(t, count)
	})
}

// What is on the lists is shown as it is, by Redis's clock.
func TestServersOnTheLists(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, c := w.Tracked(), w.Client()
		now := time.Now().UnixMilli()
		zadd := func(key string, score int64, inc string) {
			t.Helper()
			require.NoError(t, c.Do(t.Context(), "zadd", key, score, inc).Err())
		}
		zadd(w.Keys().Instances(), now-1500, "late")
		zadd(w.Keys().Dead(), now-2500, "dead")
		require.NoError(t, c.SAdd(t.Context(), w.Keys().Owned(0, "dead"), "c a", "c b").Err())
		list, err := s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 3)
		assert.Equal(t, mesh.ServerInfo{Incarnation: "late", LeaseLeft: -1500 * time.Millisecond, LeaseAge: 11500 * time.Millisecond}, list[0])
		assert.True(t, list[1].Self)
		assert.Equal(t, mesh.ServerInfo{Incarnation: "dead", Dead: true, DeadFor: 2500 * time.Millisecond, Owned: 2}, list[2])
	})
}

func TestLooksNeedAServerThatRuns(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		looks := map[string]func() error{
			"Servers": func() error { _, err := s.Servers(t.Context()); return err },
			"List":    func() error { _, err := s.Rooms().List(t.Context(), mesh.RoomQuery{}); return err },
			"Entries": func() error { _, err := s.Rooms().Entries(t.Context(), "r", mesh.EntryQuery{}); return err },
			"Counts":  func() error { _, err := s.Presence().Counts(t.Context(), "r"); return err },
		}
		for name, look := range looks {
			require.ErrorIs(t, look(), mesh.ErrNotStarted, name)
		}
		_, err = s.Rooms().Watched(t.Context(), mesh.WatchedQuery{})
		require.NoError(t, err, "nobody watches, so nobody has to be asked")
		require.NoError(t, s.Start(t.Context()))
		for name, look := range looks {
			require.NoError(t, look(), name)
		}
		w.Mem.Hang()
		for name, look := range looks {
			began := time.Now()
			require.ErrorIs(t, look(), mesh.ErrUnavailable, name)
			assert.LessOrEqual(t, time.Since(began), 2*time.Second, name)
		}
		w.Mem.Resume()
		require.NoError(t, s.Shutdown(t.Context()))
		for name, look := range looks {
			require.ErrorIs(t, look(), mesh.ErrClosed, name)
		}
	})
}

// Who owns what is not counted where that would be thousands of questions.
func TestServersAreCountedOnlyWhereItIsCheap(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, err := mesh.NewServer(w.Options())
		require.NoError(t, err)
		s.SetBuckets(mesh.MaxOwnedSizes) // as if on a cluster; before anybody looks
		require.NoError(t, s.Start(t.Context()))
		defer func() { require.NoError(t, s.Shutdown(context.Background())) }()
		c := w.Client()
		list, err := s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 1)
		require.NotEqual(t, -1, list[0].Owned)
		require.NoError(t, c.Do(t.Context(), "zadd", w.Keys().Dead(), 1, "dead").Err())
		list, err = s.Servers(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 2)
		for _, info := range list {
			assert.Equal(t, -1, info.Owned)
		}
	})
}
