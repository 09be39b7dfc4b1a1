package mesh

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

	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/store"
)

// Metadata that change fast do not hold up events of rooms without guards.
func TestNoGuardsNoPause(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(noCommandLimit)
		p, busy := s.dial(), s.dial()
		busy.join("lobby")
		p.subscribe("lobby")
		for n := range 20 {
			require.NoError(t, s.Connections().SetMetadata(t.Context(), p.id, n, MetadataOptions{}))
			began := time.Now()
			require.Equal(t, "true", busy.state("lobby", map[string]any{"n": n}))
			w.eventually(time.Second, func() bool { return p.count("state", busy.id) == n+1 }, "the state")
			require.Less(t, time.Since(began), 20*time.Millisecond)
		}
	})
}

// slowStore takes a moment for what the owner writes.
type slowStore struct{ owner.Store }

func (s slowStore) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	time.Sleep(50 * time.Millisecond)
	return s.Store.Commit(ctx, bucket, inc, number, known, ops)
}

// A guard that lets members see the room finds the connection out.
func TestAGuardThatAsksWhoIsIn(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, s *Server, conn string) error{
		"Remove": func(ctx context.Context, s *Server, conn string) error {
			_, err := s.Rooms().Remove(ctx, "doc", conn)
			return err
		},
		"Clear": func(ctx context.Context, s *Server, _ string) error { return s.Rooms().Clear(ctx, "doc") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everywhereOn(t, nil, func(t *testing.T, w *world) {
				home, far := w.server(func(o *Options) {
					o.edge = func(s *store.Store) edge { return edge{owner: slowStore{s}, lease: s, hub: s} }
				}), w.server()
				for _, s := range []*testServer{home, far} {
					s.track(".*", PresenceOptions{Guard: func(ctx context.Context, m Member, room string) (bool, error) {
						return s.Rooms().Contains(ctx, room, m.ID)
					}})
				}
				p, stays := home.dial(), home.dial()
				p.join("doc")
				p.subscribe("doc")
				require.NoError(t, do(t.Context(), far.Server, p.id))
				stays.join("doc")
				w.eventually(w.unhurried(2*time.Second), func() bool { return p.pushed("mesh/presence-ended") == 1 }, "the end")
				assert.Zero(t, p.count("join", stays.id))
			})
		})
	}
}

// Calls that were called off and need a moment to return are no reason to let
// events through to a connection that has lost the right.
func TestGuardsThatAreCalledOffHoldEvents(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s, ctx := w.server(noCommandLimit), t.Context()
		var slow, banned atomic.Bool
		s.track(".*", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) {
			out := banned.Load()
			if slow.Load() {
				time.Sleep(300 * time.Millisecond)
			}
			return !out, nil
		}})
		p, busy := s.dial(), s.dial()
		const rooms = 2 * straysPerConn
		for i := range rooms {
			p.subscribe(fmt.Sprint("doc", i))
		}
		busy.join("doc0")
		p.expect(time.Second, "join", busy.id)
		slow.Store(true)
		require.NoError(t, s.Connections().Recheck(ctx, p.id))
		w.sleep(50 * time.Millisecond)
		banned.Store(true)
		require.NoError(t, s.Connections().Recheck(ctx, p.id))
		var asking sync.WaitGroup
		asking.Go(func() {
			time.Sleep(100 * time.Millisecond)
			assert.JSONEq(t, `{"success":false,"present":[]}`, string(p.call("mesh/get-presence-state", inRoomPayload("doc0"))))
		})
		for n := range 20 {
			require.NoError(t, s.Presence().PublishState(ctx, "doc0", busy.id, map[string]int{"n": n}, StateOptions{}))
			w.sleep(50 * time.Millisecond)
		}
		w.eventually(5*time.Second, func() bool { return p.pushed("mesh/presence-ended") == rooms }, "all have ended")
		asking.Wait()
		assert.Zero(t, p.count("state", busy.id))
	})
}

// A command handler may end its own connection.
func TestACommandEndsItsConnection(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked()
		var ended atomic.Int64
		s.OnDisconnection(func(_ context.Context, _ *Connection, reason error) {
			assert.ErrorIs(t, reason, ErrClosed)
			ended.Add(1)
		})
		done := make(chan error, 1)
		require.NoError(t, s.HandleCommand("bye", func(ctx context.Context, c *Connection, _ json.RawMessage) (any, error) {
			err := s.Presence().Disconnect(ctx, c.ID())
			done <- err
			return nil, err
		}))
		p := s.dial()
		p.join("lobby")
		_, _ = p.tryCall("bye", nil)
		err := <-done
		assert.True(t, err == nil || errors.Is(err, context.Canceled), "%v", err)
		assert.Equal(t, 1000, p.closed(2*time.Second))
		w.sleep(time.Second)
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
	for name, do := range map[string]func(ctx context.Context, s *Server, conn, room string) error{
		"Recheck":  func(ctx context.Context, s *Server, conn, _ string) error { return s.Connections().Recheck(ctx, conn) },
		"of rooms": func(ctx context.Context, s *Server, _, room string) error { return s.Rooms().Recheck(ctx, room) },
		"Remove": func(ctx context.Context, s *Server, conn, room string) error {
			_, err := s.Rooms().Remove(ctx, room, conn)
			return err
		},
		"Clear": func(ctx context.Context, s *Server, _, room string) error { return s.Rooms().Clear(ctx, room) },
		"Leave": func(ctx context.Context, s *Server, conn, room string) error {
			_, err := s.Presence().Leave(ctx, room, conn)
			return err
		},
		"Add":        func(ctx context.Context, s *Server, conn, room string) error { return s.Rooms().Add(ctx, room, conn) },
		"Disconnect": func(ctx context.Context, s *Server, conn, _ string) error { return s.Presence().Disconnect(ctx, conn) },
		"a rule": func(_ context.Context, s *Server, _, _ string) error {
			return s.TrackPresence(Exact("other"), PresenceOptions{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			embedded(t, func(t *testing.T, w *world) {
				s := w.server(noCommandLimit)
				var asked atomic.Int64
				guard := func(ctx context.Context, m Member, room string) (bool, error) {
					asked.Add(1)
					return true, do(ctx, s.Server, m.ID, room)
				}
				s.track("^sees", PresenceOptions{Guard: guard})
				s.track("^joins", PresenceOptions{JoinGuard: guard})
				p := s.dial()
				began := time.Now()
				for _, room := range []string{"sees", "joins"} {
					_, _ = p.tryCall("mesh/join-room", inRoomPayload(room))
					_, _ = p.tryCall("mesh/subscribe-presence", inRoomPayload(room))
				}
				assert.Less(t, time.Since(began), 25*time.Second)
				w.sleep(30 * time.Second)
				before := asked.Load()
				assert.LessOrEqual(t, before, int64(400))
				w.sleep(30 * time.Second)
				assert.Equal(t, before, asked.Load(), "it has come to an end")
			})
		})
	}
}
