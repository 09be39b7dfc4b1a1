package faults

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// slowScripts delays each script by a duration that can be changed.
type slowScripts struct{ by atomic.Int64 }

func (*slowScripts) DialHook(next redis.DialHook) redis.DialHook { return next }

func (*slowScripts) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h *slowScripts) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if cmd.Name() == "evalsha" {
			time.Sleep(time.Duration(h.by.Load()))
		}
		return next(ctx, cmd)
	}
}

// crowded returns two servers with members in a room, on a Redis so slow that one call
// of two seconds is not enough for all members.
func crowded(t *testing.T, w *harness.World, room string, by time.Duration, setup ...func(*mesh.Options)) (here, there *mesh.PresenceManager, slow *slowScripts, members int) {
	t.Helper()
	const each = 1500
	slow = new(slowScripts)
	start := func(name string) *mesh.PresenceManager {
		opts := w.Options()
		opts.Redis.AddHook(slow)
		for _, f := range setup {
			f(&opts)
		}
		m, err := mesh.NewPresenceManager(opts)
		require.NoError(t, err)
		require.NoError(t, m.Start(t.Context()))
		t.Cleanup(func() { require.NoError(t, m.Shutdown(context.Background())) })
		require.NoError(t, m.TrackPresence(mesh.Exact("timed"), mesh.PresenceOptions{TTL: time.Second}))
		return m
	}
	here, there = start("a"), start("b")
	joined := make(chan error, 2*each)
	for i := range each {
		for name, m := range map[string]*mesh.PresenceManager{"a": here, "b": there} {
			go func() {
				id := fmt.Sprint(name, i)
				joined <- errors.Join(m.Connect(t.Context(), id, nil), m.Join(t.Context(), room, id))
			}()
		}
	}
	for range cap(joined) {
		require.NoError(t, <-joined)
	}
	slow.by.Store(int64(by))
	return here, there, slow, 2 * each
}

// Clear runs until its context ends, and reports its progress.
func TestClearOfManyMembers(t *testing.T) {
	t.Parallel()
	harness.Long(t, "thousands of members")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		here, there, slow, members := crowded(t, w, "room", 300*time.Millisecond)
		defer slow.by.Store(0)
		count := func() int {
			n, err := here.Count(t.Context(), "room")
			require.NoError(t, err)
			return n
		}
		for i, clear := range []func(context.Context, string) error{here.Rooms().Clear, there.Rooms().Delete} {
			before, began := count(), time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 1300*time.Millisecond)
			err := clear(ctx, "room")
			cancel()
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.NotErrorIs(t, err, mesh.ErrUnavailable, "Redis is available")
			require.Equal(t, 1300*time.Millisecond, time.Since(began))
			var how *mesh.ProgressError
			require.ErrorAs(t, err, &how)
			require.Positive(t, how.Done)
			require.ErrorContains(t, err, fmt.Sprint(how.Done))
			require.NotZero(t, count())
			require.LessOrEqual(t, how.Done, before-count(), "Done exceeds the number of leaves, %d", i)
		}
		began := time.Now()
		require.NoError(t, there.Rooms().Delete(t.Context(), "room"))
		require.Greater(t, time.Since(began), testhook.LimitsOf().Call)
		require.Zero(t, count(), "of %d", members)
		require.NoError(t, here.Rooms().Clear(t.Context(), "room"), "without members")

		slow.by.Store(0)
		require.NoError(t, here.Join(t.Context(), "room", "a0"))
		w.Mem.Cut()
		require.ErrorIs(t, here.Rooms().Clear(t.Context(), "room"), mesh.ErrUnavailable)
		w.Mem.Heal()
		w.Sleep(20 * time.Second)
	})
}

// Connections that join again at once do not keep Clear running for ever.
func TestClearOfConnectionsThatComeBack(t *testing.T) {
	t.Parallel()
	harness.Long(t, "thousands of members")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		here, there, slow, members := crowded(t, w, "room", 100*time.Millisecond)
		defer slow.by.Store(0)
		require.NoError(t, here.TrackPresence(mesh.Exact("room"), mesh.PresenceOptions{}))
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var left atomic.Int64
		watching, gone := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(gone)
			for event, err := range here.Subscribe(ctx, "room", mesh.SubscribeOptions{}) {
				switch {
				case err != nil:
					return
				case event.Type == mesh.EventSnapshot:
					close(watching)
				case event.Type == mesh.EventLeave:
					left.Add(1)
					m := here
					if event.ConnectionID[0] == 'b' {
						m = there
					}
					go func() { _ = m.Join(ctx, "room", event.ConnectionID) }()
				}
			}
		}()
		<-watching
		require.NoError(t, here.Rooms().Clear(t.Context(), "room"))
		w.Sleep(5 * time.Second)
		require.EqualValues(t, members, left.Load(), "each connection has left once")
		n, err := here.Count(t.Context(), "room")
		require.NoError(t, err)
		require.Equal(t, members, n)
		stop()
		<-gone
	})
}

// CleanExpired runs until its context ends, and reports its progress.
func TestCleanExpiredOfManyMembers(t *testing.T) {
	t.Parallel()
	harness.Long(t, "thousands of members")
	off := false
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		here, _, slow, members := crowded(t, w, "timed", 200*time.Millisecond, func(o *mesh.Options) { o.EnablePresenceExpirationEvents = &off })
		defer slow.by.Store(0)
		w.Sleep(15 * time.Second) // all connections are silent, and the server is in contact
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		first, err := here.CleanExpired(ctx, "timed")
		cancel()
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Less(t, first, members)
		began := time.Now()
		second, err := here.CleanExpired(t.Context(), "timed")
		require.NoError(t, err)
		require.Greater(t, time.Since(began), testhook.LimitsOf().Call)
		n, err := here.Count(t.Context(), "timed")
		require.NoError(t, err)
		require.Zero(t, n)
		require.LessOrEqual(t, first+second, members)
		require.Greater(t, first+second, members*3/4, "all but those whose answer came too late")
	})
}

// TestJoinOfAnIDThatAnotherServerHas checks that the last join takes over the id, and
// that the other server notices at its next change.
func TestJoinOfAnIDThatAnotherServerHas(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		managers := make([]*mesh.PresenceManager, 2)
		for i := range managers {
			m, err := mesh.NewPresenceManager(w.Options())
			require.NoError(t, err)
			require.NoError(t, m.Start(t.Context()))
			defer func() { require.NoError(t, m.Shutdown(context.Background())) }()
			require.NoError(t, m.TrackPresence(mesh.Exact("room"), mesh.PresenceOptions{}))
			require.NoError(t, m.Connect(t.Context(), "id", map[string]int{"server": i}))
			managers[i] = m
		}
		a, b := managers[0], managers[1]
		metadata := func() string {
			members, err := a.Members(t.Context(), "room")
			require.NoError(t, err)
			require.Len(t, members, 1)
			return string(members[0].Metadata)
		}
		require.NoError(t, a.Join(t.Context(), "room", "id"))
		require.NoError(t, b.Join(t.Context(), "room", "id"), "server b takes over the id")
		require.JSONEq(t, `{"server":1}`, metadata())
		require.NoError(t, a.Join(t.Context(), "room", "id"), "server a does not know yet")
		require.JSONEq(t, `{"server":1}`, metadata())
		require.ErrorIs(t, a.PublishState(t.Context(), "room", "id", map[string]int{"n": 1}, mesh.StateOptions{}), mesh.ErrConflict)
		require.ErrorIs(t, a.PublishState(t.Context(), "room", "id", map[string]int{"n": 2}, mesh.StateOptions{}), mesh.ErrNotPresent, "server a knows now")
		require.NoError(t, b.PublishState(t.Context(), "room", "id", map[string]int{"n": 3}, mesh.StateOptions{}))
		require.NoError(t, a.Join(t.Context(), "room", "id"), "server a takes over the id")
		require.JSONEq(t, `{"server":0}`, metadata())
		left, err := b.Leave(t.Context(), "room", "id")
		require.NoError(t, err)
		require.True(t, left, "server b does not know yet")
		require.JSONEq(t, `{"server":0}`, metadata())
	})
}
