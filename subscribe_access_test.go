package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

// Metadata that change fast do not hold up events of rooms without guards.
func TestNoGuardsNoPause(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit)
		p, busy := s.Dial(), s.Dial()
		busy.Join("lobby")
		p.Subscribe("lobby")
		for n := range 20 {
			require.NoError(t, s.Connections().SetMetadata(t.Context(), p.ID, n, mesh.MetadataOptions{}))
			began := time.Now()
			require.Equal(t, "true", busy.State("lobby", map[string]any{"n": n}))
			w.Eventually(time.Second, func() bool { return p.Count("state", busy.ID) == n+1 }, "the state")
			require.Less(t, time.Since(began), 20*time.Millisecond)
		}
	})
}

// slowWrites makes each batch that a server writes take d.
func slowWrites(d time.Duration) func(*mesh.Options) {
	return func(o *mesh.Options) {
		testhook.SetSeams(o, func(s *store.Store) testhook.Seams { return testhook.Seams{Local: slowStore{s, d}, Lease: s, Hub: s} })
	}
}

type slowStore struct {
	local.Store
	d time.Duration
}

func (s slowStore) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	time.Sleep(s.d)
	return s.Store.Commit(ctx, bucket, inc, number, known, ops)
}

// A guard that lets members see the room finds the connection out.
func TestAGuardThatAsksWhoIsIn(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, s *mesh.Server, conn string) error{
		"Remove": func(ctx context.Context, s *mesh.Server, conn string) error {
			_, err := s.Rooms().Remove(ctx, "doc", conn)
			return err
		},
		"Clear": func(ctx context.Context, s *mesh.Server, _ string) error { return s.Rooms().Clear(ctx, "doc") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
				home, far := w.Server(slowWrites(50*time.Millisecond)), w.Server()
				for _, s := range []*harness.Server{home, far} {
					s.Track(".*", mesh.PresenceOptions{Guard: func(ctx context.Context, m mesh.Member, room string) (bool, error) {
						return s.Rooms().Contains(ctx, room, m.ID)
					}})
				}
				p, stays := home.Dial(), home.Dial()
				p.Join("doc")
				p.Subscribe("doc")
				require.NoError(t, do(t.Context(), far.Server, p.ID))
				stays.Join("doc")
				w.Eventually(2*time.Second, func() bool { return p.Pushed("mesh/presence-ended") == 1 }, "the end")
				assert.Zero(t, p.Count("join", stays.ID))
			})
		})
	}
}

// Calls that were called off and need a moment to return are no reason to let
// events through to a connection that has lost the right.
func TestGuardsThatAreCalledOffHoldEvents(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, ctx := w.Server(harness.NoCommandLimit), t.Context()
		var slow, banned atomic.Bool
		s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) {
			out := banned.Load()
			if slow.Load() {
				time.Sleep(300 * time.Millisecond)
			}
			return !out, nil
		}})
		p, busy := s.Dial(), s.Dial()
		const rooms = 2 * 16
		for i := range rooms {
			p.Subscribe(fmt.Sprint("doc", i))
		}
		busy.Join("doc0")
		p.Expect(time.Second, "join", busy.ID)
		slow.Store(true)
		require.NoError(t, s.Connections().Recheck(ctx, p.ID))
		w.Sleep(50 * time.Millisecond)
		banned.Store(true)
		require.NoError(t, s.Connections().Recheck(ctx, p.ID))
		var asking sync.WaitGroup
		asking.Go(func() {
			time.Sleep(100 * time.Millisecond)
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.Call("mesh/get-presence-state", harness.InRoomPayload("doc0"))))
		})
		for n := range 20 {
			require.NoError(t, s.Presence().PublishState(ctx, "doc0", busy.ID, map[string]int{"n": n}, mesh.StateOptions{}))
			w.Sleep(50 * time.Millisecond)
		}
		w.Eventually(5*time.Second, func() bool { return p.Pushed("mesh/presence-ended") == rooms }, "all have ended")
		asking.Wait()
		assert.Zero(t, p.Count("state", busy.ID))
	})
}

// A command handler may end its own connection.
func TestACommandEndsItsConnection(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		var ended atomic.Int64
		s.OnDisconnection(func(_ context.Context, _ *mesh.Connection, reason error) {
			assert.ErrorIs(t, reason, mesh.ErrClosed)
			ended.Add(1)
		})
		done := make(chan error, 1)
		require.NoError(t, s.HandleCommand("bye", func(ctx context.Context, c *mesh.Connection, _ json.RawMessage) (any, error) {
			err := s.Presence().Disconnect(ctx, c.ID())
			done <- err
			return nil, err
		}))
		p := s.Dial()
		p.Join("lobby")
		_, _ = p.TryCall("bye", nil)
		err := <-done
		assert.True(t, err == nil || errors.Is(err, context.Canceled), "%v", err)
		assert.Equal(t, 1000, p.Closed(2*time.Second))
		w.Sleep(time.Second)
		assert.EqualValues(t, 1, ended.Load())
		n, err := s.Presence().Count(t.Context(), "lobby")
		require.NoError(t, err)
		assert.Zero(t, n)
	})
}

// A guard that calls what has it asked again ends in time, and is not asked at
// every turn.
func TestGuardsThatHaveThemselvesAskedAgain(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, s *mesh.Server, conn, room string) error{
		"Recheck": func(ctx context.Context, s *mesh.Server, conn, _ string) error {
			return s.Connections().Recheck(ctx, conn)
		},
		"of rooms": func(ctx context.Context, s *mesh.Server, _, room string) error { return s.Rooms().Recheck(ctx, room) },
		"Remove": func(ctx context.Context, s *mesh.Server, conn, room string) error {
			_, err := s.Rooms().Remove(ctx, room, conn)
			return err
		},
		"Clear": func(ctx context.Context, s *mesh.Server, _, room string) error { return s.Rooms().Clear(ctx, room) },
		"Leave": func(ctx context.Context, s *mesh.Server, conn, room string) error {
			_, err := s.Presence().Leave(ctx, room, conn)
			return err
		},
		"Add": func(ctx context.Context, s *mesh.Server, conn, room string) error {
			return s.Rooms().Add(ctx, room, conn)
		},
		"Disconnect": func(ctx context.Context, s *mesh.Server, conn, _ string) error {
			return s.Presence().Disconnect(ctx, conn)
		},
		"a rule": func(_ context.Context, s *mesh.Server, _, _ string) error {
			return s.TrackPresence(mesh.Exact("other"), mesh.PresenceOptions{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s := w.Server(harness.NoCommandLimit)
				var asked atomic.Int64
				guard := func(ctx context.Context, m mesh.Member, room string) (bool, error) {
					asked.Add(1)
					return true, do(ctx, s.Server, m.ID, room)
				}
				s.Track("^sees", mesh.PresenceOptions{Guard: guard})
				s.Track("^joins", mesh.PresenceOptions{JoinGuard: guard})
				p := s.Dial()
				began := time.Now()
				for _, room := range []string{"sees", "joins"} {
					_, _ = p.TryCall("mesh/join-room", harness.InRoomPayload(room))
					_, _ = p.TryCall("mesh/subscribe-presence", harness.InRoomPayload(room))
				}
				assert.Less(t, time.Since(began), 25*time.Second)
				w.Sleep(30 * time.Second)
				before := asked.Load()
				assert.LessOrEqual(t, before, int64(400))
				w.Sleep(30 * time.Second)
				assert.Equal(t, before, asked.Load(), "it has come to an end")
			})
		})
	}
}

// Through the server: subscriptions and members stay while their guards cannot be
// asked, and are asked about when they can.
func TestWhileABudgetIsUsedUp(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		log := &testlog.TextLog{}
		p := w.Manager(func(o *mesh.Options) {
			o.Logger, o.GuardTimeout, o.HookTimeout = log.Logger(), time.Second, time.Second
		})
		release := make(chan struct{})
		var no, hang sync.Map
		guard := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			if _, ok := hang.Load(m.ID); ok {
				<-release
			}
			_, out := no.Load(m.ID)
			return !out, nil
		}
		require.NoError(t, p.TrackPresence(mesh.Exact("doc"), mesh.PresenceOptions{Guard: guard, JoinGuard: guard}))
		require.NoError(t, p.TrackPresence(mesh.Exact("other"), mesh.PresenceOptions{Guard: func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			return m.ID == "new", nil
		}}))
		for _, id := range []string{"good", "bad", "new", "busy"} {
			require.NoError(t, p.Connect(ctx, id, nil))
		}
		for _, id := range []string{"good", "bad"} {
			require.NoError(t, p.Join(ctx, "doc", id))
		}
		good, bad := w.Tap(p, "doc", mesh.SubscribeOptions{Viewer: "good"}), w.Tap(p, "doc", mesh.SubscribeOptions{Viewer: "bad"})
		good.Wait(w, 1)
		bad.Wait(w, 1)

		var all sync.WaitGroup
		for i := range perRule {
			id := fmt.Sprint("h", i)
			hang.Store(id, true)
			require.NoError(t, p.Connect(ctx, id, nil))
			all.Go(func() { assert.ErrorIs(t, p.Join(ctx, "doc", id), mesh.ErrRefused) })
		}
		all.Wait()
		w.Sleep(time.Second)
		require.EqualValues(t, perRule, p.Stats().GuardsHanging)

		no.Store("bad", true)
		require.NoError(t, p.Connections().SetMetadata(ctx, "bad", "changed", mesh.MetadataOptions{}))
		require.NoError(t, p.Rooms().Recheck(ctx, "doc"))
		require.NoError(t, p.Join(ctx, "doc", "good"), "it is in")
		require.ErrorIs(t, p.Join(ctx, "doc", "new"), mesh.ErrRefused)
		for _, err := range w.Tap(p, "other", mesh.SubscribeOptions{Viewer: "new"}).Wait(w, 1) {
			require.NotNil(t, err)
		}
		w.Sleep(time.Minute)
		n, err := p.Count(ctx, "doc")
		require.NoError(t, err)
		require.Equal(t, 2, n)
		require.NoError(t, p.PublishState(ctx, "doc", "good", map[string]int{"n": 1}, mesh.StateOptions{}))
		w.Sleep(2 * time.Second)
		require.Equal(t, mesh.EventState, good.Got()[len(good.Got())-1].Type)
		require.Contains(t, log.String(), "too many calls of the rule's guards hang")

		close(release)
		w.Sleep(2 * time.Second)
		require.ErrorIs(t, bad.End(w), mesh.ErrRefused)
		ids, err := p.PresentConnections(ctx, "doc")
		require.NoError(t, err)
		require.Equal(t, []string{"good"}, ids)
	})
}

// perRule is the number of hanging calls at which the guards of a rule are not asked.
const perRule = 1024
