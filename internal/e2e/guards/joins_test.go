package guards

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
)

// flightCase is a change while a join waits for its guard.
type flightCase struct {
	name string
	do   func(t *testing.T, w *harness.World, here, there *harness.Server, p *harness.Peer)
	ends bool // the change ends the connection
	// joins allows the join to take place for a moment.
	joins bool
}

var flightCases = []flightCase{
	{name: "metadata", do: func(t *testing.T, _ *harness.World, here, _ *harness.Server, p *harness.Peer) {
		require.NoError(t, here.Connections().SetMetadata(t.Context(), p.ID, "banned", mesh.MetadataOptions{}))
	}},
	{name: "metadata, from another server", do: func(t *testing.T, _ *harness.World, _, there *harness.Server, p *harness.Peer) {
		require.NoError(t, there.Connections().SetMetadata(t.Context(), p.ID, "banned", mesh.MetadataOptions{}))
	}},
	{name: "rule", do: func(t *testing.T, _ *harness.World, here, _ *harness.Server, _ *harness.Peer) {
		require.NoError(t, here.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{JoinGuard: harness.Never}))
	}},
	{name: "Remove", do: func(t *testing.T, _ *harness.World, here, _ *harness.Server, p *harness.Peer) {
		was, err := here.Rooms().Remove(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
		assert.False(t, was, "not a member yet")
	}},
	{name: "Remove, from another server", do: func(t *testing.T, _ *harness.World, _, there *harness.Server, p *harness.Peer) {
		_, err := there.Rooms().Remove(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
	}},
	{name: "Remove after Add", joins: true, do: func(t *testing.T, _ *harness.World, here, there *harness.Server, p *harness.Peer) {
		require.NoError(t, there.Rooms().Add(t.Context(), "lobby", p.ID, mesh.AddOptions{}))
		was, err := here.Rooms().Remove(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
		assert.True(t, was)
	}},
	{name: "Clear", do: func(t *testing.T, _ *harness.World, here, _ *harness.Server, _ *harness.Peer) {
		require.NoError(t, here.Rooms().Clear(t.Context(), "lobby"))
	}},
	{name: "Clear, from another server", do: func(t *testing.T, _ *harness.World, _, there *harness.Server, _ *harness.Peer) {
		require.NoError(t, there.Rooms().Clear(t.Context(), "lobby"))
	}},
	{name: "Delete, from another server", do: func(t *testing.T, _ *harness.World, _, there *harness.Server, _ *harness.Peer) {
		require.NoError(t, there.Rooms().Delete(t.Context(), "lobby"))
	}},
	{name: "Leave", do: func(t *testing.T, _ *harness.World, here, _ *harness.Server, p *harness.Peer) {
		_, err := here.Presence().Leave(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
	}},
	{name: "Disconnect", ends: true, do: func(t *testing.T, _ *harness.World, here, _ *harness.Server, p *harness.Peer) {
		require.NoError(t, here.Presence().Disconnect(t.Context(), p.ID))
	}},
	{name: "Close, from another server", ends: true, do: func(t *testing.T, _ *harness.World, _, there *harness.Server, p *harness.Peer) {
		require.NoError(t, there.Connections().Close(t.Context(), p.ID))
	}},
	{name: "the client closes", ends: true, do: func(_ *testing.T, _ *harness.World, _, _ *harness.Server, p *harness.Peer) { p.Close() }},
}

func TestABanBeatsAJoinInFlight(t *testing.T) {
	t.Parallel()
	for _, c := range flightCases {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
				here, there := w.Server(harness.ByHeader), w.Server(harness.ByHeader)
				for _, s := range []*harness.Server{here, there} {
					s.Track(".*", mesh.PresenceOptions{JoinGuard: harness.NotBanned})
				}
				p, watcher := here.Dial(harness.Meta(`{}`)), there.Dial(harness.Meta(`{}`))
				watcher.Subscribe("lobby")
				answer := make(chan string, 1)
				var asking sync.WaitGroup
				asking.Go(func() {
					data, err := p.TryCall("mesh/join-room", harness.InRoomPayload("lobby"))
					answer <- fmt.Sprint(string(data), err)
				})
				w.Sleep(100 * time.Millisecond)
				c.do(t, w, here, there, p)
				asking.Wait()
				if got := <-answer; !c.ends && !c.joins {
					assert.Contains(t, got, `"success":false`)
				}
				w.Sleep(400 * time.Millisecond)
				ids, err := there.Rooms().ConnectionIDs(t.Context(), "lobby")
				require.NoError(t, err)
				assert.Empty(t, ids)
				assert.Equal(t, watcher.Count("join", p.ID), watcher.Count("leave", p.ID))
				if c.ends {
					p.Closed(2 * time.Second)
					return
				}
				require.NoError(t, there.Rooms().Send(t.Context(), "lobby", "chat", "hello"))
				w.Sleep(50 * time.Millisecond)
				assert.Zero(t, p.Pushed("chat"))
			})
		})
	}
}

// Add was called after the guard, so it wins.
func TestAddOverrulesAJoinGuardInFlight(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		here, there := w.Server(harness.ByHeader), w.Server(harness.ByHeader)
		here.Track(".*", mesh.PresenceOptions{JoinGuard: harness.NotBanned})
		p := here.Dial(harness.Meta(`"banned"`))
		var asking sync.WaitGroup
		asking.Go(func() { assert.True(t, p.Room("mesh/join-room", "lobby").Success) })
		w.Sleep(100 * time.Millisecond)
		require.NoError(t, there.Rooms().Add(t.Context(), "lobby", p.ID, mesh.AddOptions{}))
		asking.Wait()
		in, err := there.Rooms().Contains(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
		assert.True(t, in)
	})
}

// A join guard that changes the metadata of its connection has no lasting answer. The
// join is refused in time, and the guard is asked a limited number of times.
func TestAJoinGuardThatChangesItsInput(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		log := &testlog.TextLog{}
		s := w.Server(func(o *mesh.Options) { o.Logger = log.Logger() })
		var asked atomic.Int64
		s.Track(".*", mesh.PresenceOptions{JoinGuard: func(ctx context.Context, m mesh.Member, _ string) (bool, error) {
			n := asked.Add(1)
			return true, s.Connections().SetMetadata(ctx, m.ID, n, mesh.MetadataOptions{})
		}})
		p := s.Dial()
		began := time.Now()
		assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(p.Call("mesh/join-room", harness.InRoomPayload("lobby"))))
		assert.LessOrEqual(t, time.Since(began), 6*time.Second)
		assert.LessOrEqual(t, asked.Load(), int64(100))
		assert.Contains(t, log.String(), "no lasting answer")
	})
}

// New rules about other rooms do not delay a join.
func TestRulesAboutOtherRoomsDoNotDelayAJoin(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		var asked atomic.Int64
		guard := func(context.Context, mesh.Member, string) (bool, error) {
			asked.Add(1)
			time.Sleep(50 * time.Millisecond)
			return true, nil
		}
		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Guard: guard, JoinGuard: guard}))
		p := s.Dial(harness.Meta(`{}`))
		stop := make(chan struct{})
		var adding sync.WaitGroup
		adding.Go(func() {
			for i := 0; ; i++ {
				assert.NoError(t, s.TrackPresence(mesh.Exact(fmt.Sprint("doc", i)), mesh.PresenceOptions{}))
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
				}
			}
		})
		began := time.Now()
		p.Join("lobby")
		assert.Equal(t, 100*time.Millisecond, time.Since(began), "each guard once")
		close(stop)
		adding.Wait()
		assert.EqualValues(t, 2, asked.Load())
	})
}

// A member that joins again and is refused is no longer a member.
func TestARefusedJoinOfAMember(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.ByHeader)
		s.Track(".*", mesh.PresenceOptions{JoinGuard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			return !strings.Contains(string(m.Metadata), "banned"), nil
		}})
		p := s.Dial(harness.Meta(`{}`))
		p.Join("lobby")
		require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, "banned", mesh.MetadataOptions{}))
		in, err := s.Rooms().Contains(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
		require.True(t, in, "a change of metadata alone removes no member")
		assert.False(t, p.Room("mesh/join-room", "lobby").Success)
		in, err = s.Rooms().Contains(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
		assert.False(t, in)
	})
}

// If a connection is removed or ends while its join waits for the guard, Join returns
// an error at once.
func TestARemovalEndsAJoinAtOnce(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{JoinGuard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
			<-ctx.Done()
			return true, nil
		}}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		time.AfterFunc(time.Second, func() { _, _ = p.Rooms().Remove(ctx, "club", "c") })
		began := time.Now()
		require.ErrorIs(t, p.Join(ctx, "club", "c"), mesh.ErrRefused)
		assert.Equal(t, time.Second, time.Since(began))
		time.AfterFunc(time.Second, func() { _ = p.Disconnect(ctx, "c") })
		require.ErrorIs(t, p.Join(ctx, "club", "c"), mesh.ErrClosed)
	})
}

// A removal wins over a join that waits for Redis, with or without a join guard.
func TestARemovalBeatsAJoinThatWaitsForRedis(t *testing.T) {
	t.Parallel()
	for _, room := range []string{"tracked", "guarded", "untracked"} {
		t.Run(room, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s := w.Server()
				s.Track("^tracked$", mesh.PresenceOptions{})
				s.Track("^guarded$", mesh.PresenceOptions{JoinGuard: func(context.Context, mesh.Member, string) (bool, error) { return true, nil }})
				insider, p := s.Dial(), s.Dial()
				insider.Join(room)
				w.Away()
				var both sync.WaitGroup
				both.Go(func() {
					assert.JSONEq(t, `{"success":false,"present":[],"code":"EREFUSED"}`, string(p.Call("mesh/join-room", harness.InRoomPayload(room))))
				})
				w.Sleep(50 * time.Millisecond)
				both.Go(func() {
					_, err := s.Rooms().Remove(t.Context(), room, p.ID)
					assert.NoError(t, err)
				})
				w.Sleep(50 * time.Millisecond)
				w.Back()
				both.Wait()
				w.Sleep(time.Second)
				ids, err := s.Rooms().ConnectionIDs(t.Context(), room)
				require.NoError(t, err)
				assert.Equal(t, []string{insider.ID}, ids)
			})
		})
	}
}

// TestCancelledWhileGuardsAreAsked checks that a call which the app cancels returns the
// same error while it waits for a guard as while it waits for Redis.
func TestCancelledWhileGuardsAreAsked(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var hangs atomic.Bool
		s := w.Server()
		ask := func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
			if hangs.Load() {
				<-ctx.Done()
			}
			return true, nil
		}
		require.NoError(t, s.TrackPresence(mesh.Exact("club"), mesh.PresenceOptions{TTL: time.Second, JoinGuard: ask}))
		require.NoError(t, s.TrackPresence(mesh.Exact("bar"), mesh.PresenceOptions{JoinGuard: ask}))
		require.NoError(t, s.TrackPresence(mesh.Exact("guarded"), mesh.PresenceOptions{Guard: ask}))
		m := s.Presence()
		require.NoError(t, m.Connect(t.Context(), "c", nil))
		require.NoError(t, m.Join(t.Context(), "club", "c"))
		w.Sleep(4 * time.Second) // the entry ends
		hangs.Store(true)
		for _, tt := range []struct {
			name string
			call func(ctx context.Context) error
		}{
			{"Join", func(ctx context.Context) error { return m.Join(ctx, "bar", "c") }},
			{"PublishState", func(ctx context.Context) error {
				return m.PublishState(ctx, "club", "c", map[string]any{}, mesh.StateOptions{})
			}},
			{"Subscribe", func(ctx context.Context) (err error) {
				for _, err = range m.Subscribe(ctx, "guarded", mesh.SubscribeOptions{Viewer: "c"}) {
				}
				return err
			}},
			{"ClearState", func(ctx context.Context) error { return m.ClearState(ctx, "club", "c") }},
		} {
			ctx, cancel := context.WithCancelCause(t.Context())
			cause := errors.New("the user left")
			time.AfterFunc(10*time.Millisecond, func() { cancel(cause) })
			err := tt.call(ctx)
			require.ErrorIs(t, err, context.Canceled, tt.name)
			require.ErrorIs(t, err, cause, tt.name)
		}
		hangs.Store(false)
	})
}
