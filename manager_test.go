package mesh_test

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/redistest"
	"github.com/meshpresence/mesh/meshtest"
)

func TestManagerWithTheAppsOwnTransport(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Tracked(), w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		watcher := s.Dial()
		watcher.Subscribe("lobby")

		require.NoError(t, p.Connect(ctx, "sse-1", map[string]string{"name": "Ann"}))
		require.NoError(t, p.Connect(ctx, "sse-2", nil))
		require.ErrorIs(t, p.Connect(ctx, "sse-1", nil), mesh.ErrConnectionExists)
		require.NoError(t, p.Join(ctx, "lobby", "sse-1"))
		require.NoError(t, p.Join(ctx, "lobby", "sse-1"), "a second join changes nothing")
		require.NoError(t, p.Join(ctx, "lobby", "sse-2"))
		require.JSONEq(t, `{"name":"Ann"}`, string(watcher.Expect(2*time.Second, "join", "sse-1").Metadata))
		require.Nil(t, watcher.Expect(2*time.Second, "join", "sse-2").Metadata)

		require.NoError(t, p.Connections().SetMetadata(ctx, "sse-2", map[string]string{"name": "Bob"}, mesh.MetadataOptions{}))
		require.NoError(t, p.PublishState(ctx, "lobby", "sse-2", map[string]bool{"typing": true}, mesh.StateOptions{}))
		require.NoError(t, p.ClearState(ctx, "lobby", "sse-2"))
		watcher.ExpectStates(2*time.Second, "sse-2", `{"typing":true}`, "null")
		members, err := s.Presence().Members(ctx, "lobby")
		require.NoError(t, err)
		require.Len(t, members, 2)

		left, err := p.Leave(ctx, "lobby", "sse-1")
		require.NoError(t, err)
		require.True(t, left)
		left, err = p.Leave(ctx, "lobby", "sse-1")
		require.NoError(t, err)
		require.False(t, left)
		watcher.Expect(2*time.Second, "leave", "sse-1")
		require.NoError(t, p.Disconnect(ctx, "sse-2"))
		require.Empty(t, s.Present("lobby"), "Redis has the leave when Disconnect returns")
		watcher.Expect(2*time.Second, "leave", "sse-2")
		require.ErrorIs(t, p.Disconnect(ctx, "sse-2"), mesh.ErrUnknownConnection)

		// The id is free again.
		require.NoError(t, p.Connect(ctx, "sse-2", nil))
		require.NoError(t, p.Join(ctx, "lobby", "sse-2"))
		w.Eventually(2*time.Second, func() bool { return watcher.Count("join", "sse-2") == 2 }, "the second join")
		require.Equal(t, 1, watcher.Count("join", "sse-1"))
		require.Equal(t, 2, watcher.Count("leave", ""))
	})
}

func TestInvalidCallsOfManager(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		fresh, err := mesh.NewPresenceManager(mesh.Options{Redis: w.Client()})
		require.NoError(t, err)
		require.NoError(t, fresh.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}), "rules may be added before Start")
		require.ErrorIs(t, fresh.Ready(ctx), mesh.ErrNotStarted)
		require.ErrorIs(t, fresh.Connect(ctx, "c", nil), mesh.ErrNotStarted)
		require.ErrorIs(t, fresh.Join(ctx, "lobby", "c"), mesh.ErrNotStarted)
		_, err = fresh.Count(ctx, "lobby")
		require.ErrorIs(t, err, mesh.ErrNotStarted)
		require.NoError(t, fresh.Shutdown(ctx))
		require.ErrorIs(t, fresh.Start(ctx), mesh.ErrClosed)

		p := w.Manager()
		require.NoError(t, p.Start(ctx), "a second Start does nothing")
		require.NoError(t, p.Ready(ctx))
		require.NoError(t, p.TrackPresence(mesh.Exact("closed"), mesh.PresenceOptions{
			JoinGuard: func(context.Context, mesh.Member, string) (bool, error) { return false, nil },
		}))
		for _, id := range []string{"", "a:b", "a b", "a\nb", "\xff", strings.Repeat("x", 129)} {
			require.ErrorIs(t, p.Connect(ctx, id, nil), mesh.ErrInvalidConnectionID, "%q", id)
			require.ErrorIs(t, p.Join(ctx, "lobby", id), mesh.ErrInvalidConnectionID, "%q", id)
			require.ErrorIs(t, p.Touch(id), mesh.ErrInvalidConnectionID, "%q", id)
		}
		require.ErrorIs(t, p.Connect(ctx, "c", func() {}), mesh.ErrInvalidMetadata)
		require.ErrorIs(t, p.Touch("c"), mesh.ErrUnknownConnection)
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.ErrorIs(t, p.Join(ctx, "", "c"), mesh.ErrInvalidRoom)
		require.ErrorIs(t, p.Join(ctx, "closed", "c"), mesh.ErrRefused)
		_, err = p.Leave(ctx, "lobby", "unknown")
		require.ErrorIs(t, err, mesh.ErrUnknownConnection)

		require.NoError(t, p.Shutdown(ctx))
		require.NoError(t, p.Shutdown(ctx), "a second Shutdown")
		require.ErrorIs(t, p.Ready(ctx), mesh.ErrClosed)
		require.ErrorIs(t, p.Connect(ctx, "d", nil), mesh.ErrClosed)
		require.ErrorIs(t, p.Join(ctx, "lobby", "c"), mesh.ErrClosed)
	})
}

func TestMissingTouchesEndAnEntry(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const ttl = time.Second
		ctx := t.Context()
		s, p := w.Server(), w.Manager()
		s.Track(".*", mesh.PresenceOptions{TTL: ttl})
		require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{TTL: ttl}))
		watcher := s.Dial()
		watcher.Subscribe("lobby")
		for _, id := range []string{"busy", "silent", "gone"} {
			require.NoError(t, p.Connect(ctx, id, nil))
			require.NoError(t, p.Join(ctx, "lobby", id))
		}
		last := time.Now()
		for time.Since(last) < 2*ttl {
			require.NoError(t, p.Touch("busy"))
			w.Sleep(200 * time.Millisecond)
		}
		for _, id := range []string{"silent", "gone"} {
			u := watcher.Expect(0, "leave", id)
			require.WithinRange(t, time.UnixMilli(u.Timestamp), last.Add(ttl-100*time.Millisecond), last.Add(w.Unhurried(ttl+time.Second)))
		}
		require.Equal(t, []string{"busy"}, s.Present("lobby"))
		_, err := p.Leave(ctx, "lobby", "gone") // ends its membership
		require.NoError(t, err)
		for range 3 {
			for _, id := range []string{"busy", "silent", "gone"} {
				require.NoError(t, p.Touch(id))
			}
			w.Sleep(200 * time.Millisecond)
		}
		require.Equal(t, 2, watcher.Count("join", "silent"), "the next Touch joins it again")
		require.ElementsMatch(t, []string{"busy", "silent"}, s.Present("lobby"))
		require.Equal(t, 1, watcher.Count("leave", "silent"))
		require.Equal(t, watcher.Count("join", "gone"), watcher.Count("leave", "gone"))
		require.Equal(t, 1, watcher.Count("join", "busy"))
		require.Equal(t, 0, watcher.Count("leave", "busy"))
	})
}

// TestLeaveOfAnExpiredEntry checks that Leave does not join a connection again, although
// it is a sign of life. The other rooms of the connection are joined again.
func TestLeaveOfAnExpiredEntry(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Server(), w.Manager()
		s.Track(".*", mesh.PresenceOptions{TTL: time.Second})
		require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{TTL: time.Second}))
		watcher := s.Dial()
		watcher.Subscribe("lobby")
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "lobby", "c"))
		require.NoError(t, p.Join(ctx, "other", "c"))
		watcher.Expect(3*time.Second, "leave", "c")
		_, err := p.Leave(ctx, "lobby", "c")
		require.NoError(t, err)
		w.Eventually(2*time.Second, func() bool { return len(s.Present("other")) == 1 }, "the return to the other room")
		w.Sleep(200 * time.Millisecond)
		require.Equal(t, 1, watcher.Count("join", "c"), "%v", watcher.Got())
		require.Equal(t, 1, watcher.Count("leave", "c"))
		require.Empty(t, s.Present("lobby"))
	})
}

func TestShutdownEndsAllEntries(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Tracked(), w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		watcher := s.Dial()
		watcher.Subscribe("lobby")
		for _, id := range []string{"a", "b", "c"} {
			require.NoError(t, p.Connect(ctx, id, nil))
			require.NoError(t, p.Join(ctx, "lobby", id))
			require.NoError(t, p.PublishState(ctx, "lobby", id, map[string]int{"n": 1}, mesh.StateOptions{}))
		}
		require.NoError(t, p.Shutdown(ctx))
		require.Empty(t, s.Present("lobby"), "Redis has the leaves when Shutdown returns")
		for _, id := range []string{"a", "b", "c"} {
			watcher.Expect(2*time.Second, "leave", id)
			watcher.ExpectStates(0, id, `{"n":1}`)
		}
		require.Equal(t, 3, watcher.Count("leave", ""))
	})
}

// TestManagerWithoutRedis checks that joins, leaves and states that failed while Redis
// was away take effect when it is back.
func TestManagerWithoutRedis(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Tracked(), w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		watcher := s.Dial()
		watcher.Subscribe("lobby")
		for _, id := range []string{"stays", "comes", "goes"} {
			require.NoError(t, p.Connect(ctx, id, nil))
		}
		for _, id := range []string{"stays", "goes"} {
			require.NoError(t, p.Join(ctx, "lobby", id))
			watcher.Expect(time.Second, "join", id)
		}
		w.Away()
		for name, do := range map[string]func() error{
			"join":  func() error { return p.Join(ctx, "lobby", "comes") },
			"leave": func() error { _, err := p.Leave(ctx, "lobby", "goes"); return err },
			"state": func() error {
				return p.PublishState(ctx, "lobby", "stays", map[string]int{"n": 1}, mesh.StateOptions{})
			},
			"members": func() error { _, err := p.Members(ctx, "lobby"); return err },
			"count":   func() error { _, err := p.Count(ctx, "lobby"); return err },
		} {
			began := time.Now()
			require.ErrorIs(t, do(), mesh.ErrUnavailable, name)
			require.LessOrEqual(t, time.Since(began), 2*time.Second, name)
		}
		require.Len(t, watcher.Got(), 2)
		w.Back()
		watcher.Expect(3*time.Second, "join", "comes")
		watcher.Expect(3*time.Second, "leave", "goes")
		watcher.ExpectStates(3*time.Second, "stays", `{"n":1}`)
		w.Sleep(20 * time.Second)
		require.Len(t, watcher.Got(), 5, "%v", watcher.Got())
		require.ElementsMatch(t, []string{"stays", "comes"}, s.Present("lobby"))
	})
}

// benchRedis returns a client of a real Redis if it is installed, and otherwise of the
// embedded one.
func benchRedis(b *testing.B) *redis.Client {
	b.Helper()
	if redistest.Available() {
		return redistest.Start(b).Client(b)
	}
	r, err := meshtest.NewRedis()
	require.NoError(b, err)
	b.Cleanup(func() { _ = r.Close() })
	c := r.Client()
	b.Cleanup(func() { _ = c.Close() })
	return c
}

const (
	benchCallers = 512
	benchRooms   = 1000
)

// BenchmarkJoinLeave makes one join and one leave per iteration. "mesh" has 512 callers
// of a PresenceManager. For comparison, "pipeline" has one goroutine that stores and
// publishes the same with plain commands in pipelines, without any guarantee.
func BenchmarkJoinLeave(b *testing.B) {
	b.Run("mesh", func(b *testing.B) {
		off := false
		p, err := mesh.NewPresenceManager(mesh.Options{Redis: benchRedis(b), EnablePresenceExpirationEvents: &off})
		require.NoError(b, err)
		require.NoError(b, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		require.NoError(b, p.Start(b.Context()))
		b.Cleanup(func() { require.NoError(b, p.Shutdown(context.Background())) })
		rooms := make(chan string)
		var callers sync.WaitGroup
		for i := range benchCallers {
			id := fmt.Sprintf("conn%d", i)
			require.NoError(b, p.Connect(b.Context(), id, nil))
			callers.Go(func() {
				for room := range rooms {
					if err := p.Join(b.Context(), room, id); err != nil {
						b.Error(err)
					}
					if _, err := p.Leave(b.Context(), room, id); err != nil {
						b.Error(err)
					}
				}
			})
		}
		n := 0
		before := p.Stats()
		for b.Loop() {
			rooms <- fmt.Sprintf("room%d", n%benchRooms)
			n++
		}
		b.ReportMetric(2*float64(n)/b.Elapsed().Seconds(), "ops/s")
		close(rooms)
		callers.Wait()
		after := p.Stats()
		b.ReportMetric(float64(after.Changes-before.Changes)/float64(after.Batches-before.Batches), "ops/call")
	})
	b.Run("pipeline", func(b *testing.B) {
		ctx, c := b.Context(), benchRedis(b)
		pipe := c.Pipeline()
		n := 0
		for b.Loop() {
			room, id := fmt.Sprintf("room%d", n%benchRooms), fmt.Sprintf("conn%d", n%benchCallers)
			pipe.HSet(ctx, "members:"+room, id, "{}")
			pipe.SAdd(ctx, "owned", room+" "+id)
			pipe.Publish(ctx, "events:"+room, "join "+id)
			pipe.HDel(ctx, "members:"+room, id)
			pipe.SRem(ctx, "owned", room+" "+id)
			pipe.Publish(ctx, "events:"+room, "leave "+id)
			if n++; n%128 == 0 {
				_, err := pipe.Exec(ctx)
				require.NoError(b, err)
			}
		}
		b.ReportMetric(2*float64(n)/b.Elapsed().Seconds(), "ops/s")
	})
}

// BenchmarkTrackPresence adds a rule with an exact name to a manager that already has
// many rules, and 1,000 subscriptions to other rooms with a guard.
func BenchmarkTrackPresence(b *testing.B) {
	for _, rules := range []int{1_000, 20_000} {
		b.Run(fmt.Sprintf("rules=%d", rules), func(b *testing.B) {
			r := meshtest.StartRedis(b)
			p, err := mesh.NewPresenceManager(mesh.Options{Redis: r.Client(), Limits: mesh.Limits{RoomsPerConnection: -1}})
			require.NoError(b, err)
			require.NoError(b, p.Start(b.Context()))
			b.Cleanup(func() { require.NoError(b, p.Shutdown(context.WithoutCancel(b.Context()))) })
			require.NoError(b, p.Connect(b.Context(), "viewer", nil))
			var asked harness.Counted
			for i := range rules {
				opts := mesh.PresenceOptions{}
				if i < 1000 {
					opts.Guard = asked.Guard
				}
				require.NoError(b, p.TrackPresence(mesh.Exact(fmt.Sprint("room", i)), opts))
			}
			for i := range 1000 {
				room := fmt.Sprint("room", i)
				require.NoError(b, p.Join(b.Context(), room, "viewer"))
				require.NoError(b, p.WatchSilently(b.Context(), room, "viewer"))
			}
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				require.NoError(b, p.TrackPresence(mesh.Exact(fmt.Sprint("new", n)), mesh.PresenceOptions{Guard: asked.Guard}))
				n++
			}
			b.StopTimer()
			for i := range 1000 {
				require.EqualValues(b, 1, asked.Of(fmt.Sprint("room", i)), "no other guard is asked again")
			}
		})
	}
}
