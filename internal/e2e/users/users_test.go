package users

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
)

const grace = 5 * time.Second

// A user arrives with the first connection on any server and leaves with the last one.
// Connections without a user stand alone.
func TestArriveAndLeave(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Users(mesh.PresenceOptions{}), w.Users(mesh.PresenceOptions{})
		h := listen(t, w, s1)
		a1, a2 := h.call("a1", s1.DialAs("ann")), h.call("a2", s2.DialAs("ann"))
		x := h.call("x", s2.DialAs(""))
		v := a1.Join(lobby)
		assert.Equal(t, []int{1, 1}, []int{v.Connections, v.Users})
		v = a2.Join(lobby)
		assert.Equal(t, []int{2, 1}, []int{v.Connections, v.Users})
		v = x.Join(lobby)
		assert.Equal(t, []int{3, 2}, []int{v.Connections, v.Users})
		h.tells("join a1 ann:1 1/1", "join a2 ann:2 2/1", "join x 3/2")
		a1.Leave(lobby)
		a2.Client.Close()
		h.tells("leave a1 ann:1 2/2 left", "leave a2 ann:0 1/1 closed")
		x.Close()
		h.tells("leave x 0/0 lost")
	})
}

// A user whose last connection ends without asking keeps the place, and returns on
// another server: the user neither leaves nor arrives.
func TestReloadWithinGrace(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rule := mesh.PresenceOptions{Grace: grace}
		s1, s2 := w.Users(rule), w.Users(rule)
		h := listen(t, w, s2)
		a1 := h.call("a1", s1.DialAs("ann"))
		a1.Join(lobby)
		a1.State(lobby, map[string]any{"n": 1})
		h.tells("join a1 ann:1 1/1", "state a1 ann:1 1/1")
		a1.Close()
		h.tells("state a1 ann:1 1/1", "disconnect a1 ann:1 1/1 lost")
		members, err := s2.Presence().Members(t.Context(), lobby)
		require.NoError(t, err)
		require.Len(t, members, 1)
		assert.True(t, members[0].Disconnected)
		a2 := h.call("a2", s2.DialAs("ann"))
		v := a2.Join(lobby)
		assert.Equal(t, []string{a2.ID}, v.IDs(t))
		assert.Equal(t, []int{1, 1}, []int{v.Connections, v.Users})
		h.tells("join a2 ann:2 2/1 replaces a1", "leave a1 ann:1 1/1 replaced")
		if w.Virtual {
			h.silence(2 * grace)
		}
	})
}

// A user who does not come back leaves once, when grace is over and not before.
func TestGraceIsOver(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rule := mesh.PresenceOptions{Grace: grace}
		lease := harness.LeaseOf(2 * time.Second) // after that time a new server may end kept places
		if w.Virtual {
			lease = harness.LeaseOf(20 * time.Second) // so long that no heartbeat comes in time
		}
		s1, s2 := w.Users(rule, lease), w.Users(rule, lease)
		h := listen(t, w, s2)
		if w.Virtual {
			w.Sleep(20 * time.Second)
		}
		w.Sleep(2200 * time.Millisecond)
		a1 := h.call("a1", s1.DialAs("ann"))
		a1.Join(lobby)
		a1.Client.Close()
		h.tells("join a1 ann:1 1/1", "disconnect a1 ann:1 1/1 closed")
		if w.Virtual {
			h.silence(grace - 100*time.Millisecond)
			h.w.Sleep(200 * time.Millisecond)
		} else {
			h.w.Sleep(grace)
		}
		h.tells("leave a1 ann:0 0/0 closed")
	})
}

// Only the last connection of a user is kept, and no connection that asks to leave.
func TestOnlyTheLastConnectionIsKept(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Users(mesh.PresenceOptions{Grace: grace})
		h := listen(t, w, s)
		a1, a2 := h.call("a1", s.DialAs("ann")), h.call("a2", s.DialAs("ann"))
		x := h.call("x", s.DialAs(""))
		for _, p := range []*harness.Peer{a1, a2, x} {
			p.Join(lobby)
		}
		h.tells("join a1 ann:1 1/1", "join a2 ann:2 2/1", "join x 3/2")
		a1.Close()
		h.tells("leave a1 ann:1 2/2 lost")
		x.Close()
		h.tells("leave x 1/1 lost")
		a2.Leave(lobby)
		h.tells("leave a2 ann:0 0/0 left")
		a2.Join(lobby)
		a2.Close()
		h.tells("join a2 ann:1 1/1", "disconnect a2 ann:1 1/1 lost")
	})
}

// The ends that the app or the server decides for good keep no place.
func TestEndsThatKeepNoPlace(t *testing.T) {
	t.Parallel()
	ends := map[string]func(t *testing.T, s *harness.Server, p *harness.Peer){
		"removed: Connection.Close": func(t *testing.T, s *harness.Server, p *harness.Peer) {
			c, ok := s.Connection(p.ID)
			require.True(t, ok)
			require.NoError(t, c.Close(0, ""))
		},
		"removed: Connections.Close": func(t *testing.T, s *harness.Server, p *harness.Peer) {
			require.NoError(t, s.Connections().Close(t.Context(), p.ID))
		},
		"removed: Rooms.Remove": func(t *testing.T, s *harness.Server, p *harness.Peer) {
			ok, err := s.Rooms().Remove(t.Context(), lobby, p.ID)
			require.NoError(t, err)
			require.True(t, ok)
		},
		"removed: Rooms.RemoveUser": func(t *testing.T, s *harness.Server, _ *harness.Peer) {
			n, err := s.Rooms().RemoveUser(t.Context(), lobby, "ann")
			require.NoError(t, err)
			require.Equal(t, 1, n)
		},
		"removed: Rooms.Clear": func(t *testing.T, s *harness.Server, _ *harness.Peer) {
			require.NoError(t, s.Rooms().Clear(t.Context(), lobby))
		},
		"removed: Rooms.Delete": func(t *testing.T, s *harness.Server, _ *harness.Peer) {
			require.NoError(t, s.Rooms().Delete(t.Context(), lobby))
		},
		"closed: too large": func(t *testing.T, _ *harness.Server, p *harness.Peer) {
			_ = p.Send(map[string]any{"command": "x", "payload": make([]int, 100_000)}) // fails, or the server closes it after that
			assert.Equal(t, 1009, p.Closed(time.Second))
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s := w.Users(mesh.PresenceOptions{Grace: grace})
				h := listen(t, w, s)
				a := h.call("a", s.DialAs("ann"))
				a.Join(lobby)
				h.tells("join a ann:1 1/1")
				end(t, s, a)
				w.Sleep(3 * time.Second)
				reason, _, _ := strings.Cut(name, ":")
				h.tells("leave a ann:0 0/0 " + reason)
			})
		})
	}
}

// A kept place ends with everything that removes a member.
func TestKeptPlacesAreRemoved(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(t *testing.T, s *harness.Server, conn string){
		"Remove": func(t *testing.T, s *harness.Server, conn string) {
			ok, err := s.Rooms().Remove(t.Context(), lobby, conn)
			require.NoError(t, err)
			require.True(t, ok)
			_, err = s.Rooms().Remove(t.Context(), lobby, conn)
			require.ErrorIs(t, err, mesh.ErrUnknownConnection)
		},
		"RemoveUser": func(t *testing.T, s *harness.Server, _ string) {
			for _, want := range []int{1, 0} {
				n, err := s.Rooms().RemoveUser(t.Context(), lobby, "ann")
				require.NoError(t, err)
				require.Equal(t, want, n)
			}
		},
		"Clear": func(t *testing.T, s *harness.Server, _ string) {
			require.NoError(t, s.Rooms().Clear(t.Context(), lobby))
		},
		"Delete": func(t *testing.T, s *harness.Server, _ string) {
			require.NoError(t, s.Rooms().Delete(t.Context(), lobby))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s1, s2 := w.Users(mesh.PresenceOptions{Grace: grace}), w.Users(mesh.PresenceOptions{Grace: grace})
				h := listen(t, w, s1)
				a := h.call("a", s1.DialAs("ann"))
				a.Join(lobby)
				a.Close()
				h.tells("join a ann:1 1/1", "disconnect a ann:1 1/1 lost")
				page, err := s1.Rooms().Entries(t.Context(), lobby, mesh.EntryQuery{})
				require.NoError(t, err)
				require.Len(t, page.Entries, 1)
				assert.Empty(t, page.Entries[0].Server)
				assert.Equal(t, "ann", page.Entries[0].UserID)
				assert.InDelta(t, float64(grace), float64(page.Entries[0].KeptUntil.Sub(page.Now)), float64(time.Second))
				end(t, s2, a.ID)
				h.tells("leave a ann:0 0/0 removed")
				h.silence(2 * grace)
			})
		})
	}
}

// A client that changed networks takes its own place, although its old socket still looks
// open on another server. That socket is closed.
func TestReplaceAHalfOpenConnection(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rule := mesh.PresenceOptions{Grace: grace, MaxConnections: 1}
		s1, s2 := w.Users(rule), w.Users(rule)
		h := listen(t, w, s1)
		old := h.call("old", s1.DialAs("ann"))
		old.Join(lobby)
		eve := s2.DialAs("eve")
		v := eve.JoinReplacing(lobby, old.ID)
		assert.Equal(t, []any{false, "EFULL", "connections", 1}, []any{v.Success, v.Code, v.Of, v.Max}, "the place of another user")
		now := h.call("now", s2.DialAs("ann"))
		v = now.JoinReplacing(lobby, old.ID)
		require.True(t, v.Success, "%+v", v)
		h.tells("join old ann:1 1/1", "join now ann:2 2/1 replaces old", "leave old ann:1 1/1 replaced")
		old.Closed(5 * time.Second)
		if w.Virtual {
			h.silence(3 * grace)
		}
		now.Leave(lobby)
		h.tells("leave now ann:0 0/0 left")
	})
}

// Caps count kept places, and let further tabs of a present user pass MaxUsers.
func TestCaps(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rule := mesh.PresenceOptions{Grace: grace, MaxUsers: 2}
		s1, s2 := w.Users(rule), w.Users(rule)
		h := listen(t, w, s1)
		ann, bob, eve := h.call("ann", s1.DialAs("ann")), h.call("bob", s2.DialAs("bob")), h.call("eve", s2.DialAs("eve"))
		ann.Join(lobby)
		bob.Join(lobby)
		refused := func() {
			t.Helper()
			v := eve.Room("mesh/join-room", lobby)
			assert.Equal(t, []any{false, "EFULL", "users", 2}, []any{v.Success, v.Code, v.Of, v.Max})
		}
		refused()
		tab := h.call("tab", s2.DialAs("ann"))
		tab.Join(lobby)
		h.tells("join ann ann:1 1/1", "join bob bob:1 2/2", "join tab ann:2 3/2")
		bob.Close()
		h.tells("disconnect bob bob:1 3/2 lost")
		refused()
		err := s1.Rooms().Add(t.Context(), lobby, eve.ID, mesh.AddOptions{})
		require.ErrorIs(t, err, mesh.ErrFull)
		require.ErrorContains(t, err, "2 users")
		require.NoError(t, s1.Rooms().Add(t.Context(), lobby, eve.ID, mesh.AddOptions{OverCap: true}))
		h.tells("join eve eve:1 4/3")
		w.Eventually(time.Second, func() bool { return eve.Pushed("mesh/room-joined") == 1 }, "mesh/room-joined")
		assert.Positive(t, s1.Stats().Full+s2.Stats().Full)
	})
}

// A server that drains or shuts down hands its places over before it closes the sockets,
// and a client that returns to another server is the same user for all subscribers.
func TestDrainHandsOver(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		rule := mesh.PresenceOptions{Grace: grace, MaxConnections: 2}
		s1, s2 := w.Users(rule), w.Users(rule)
		h := listen(t, w, s2)
		a, b := h.call("a", s1.DialAs("ann")), h.call("b", s1.DialAs("bob"))
		a.Join(lobby)
		b.Join(lobby)
		h.tells("join a ann:1 1/1", "join b bob:1 2/2")
		done := make(chan error, 1)
		go func() { done <- s1.Drain(t.Context(), 0) }()
		for name, p := range map[string]*harness.Peer{"ann": a, "bob": b} {
			assert.Equal(t, 1012, p.Closed(3*time.Second))
			back := h.call(name, s2.DialAs(name))
			v := back.Room("mesh/join-room", lobby) // the rule has no third place
			assert.True(t, v.Success, "%+v", v)
		}
		require.NoError(t, <-done)
		var left []string
		for _, e := range h.tap.Wait(w, h.read+6)[h.read:] {
			assert.False(t, e.UserLeft() || e.UserArrived() || e.RoomVacated(), "%s", h.line(e))
			if e.Type == mesh.EventLeave {
				left = append(left, h.line(e))
			}
		}
		assert.Len(t, left, 2)
		for _, line := range left {
			assert.Contains(t, line, string(mesh.ReasonReplaced))
		}
	})
}

// Shutdown without a Drain keeps the places, too, and another server ends those to which no
// user returns.
func TestShutdownKeepsPlaces(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Users(mesh.PresenceOptions{Grace: grace}), w.Users(mesh.PresenceOptions{Grace: grace})
		h := listen(t, w, s2)
		w.Sleep(11 * time.Second) // s2 has been in contact with Redis for its lease
		a := h.call("a", s1.DialAs("ann"))
		a.Join(lobby)
		s1.End()
		h.tells("join a ann:1 1/1", "disconnect a ann:1 1/1 closed")
		h.silence(grace - 100*time.Millisecond)
		w.Sleep(5 * time.Second)
		h.tells("leave a ann:0 0/0 closed")
	})
}

// A place whose index item is lost ends all the same, even if the server that knew it is
// gone: another server that mirrors the room finds it.
func TestLostIndexOfKeptPlaces(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Users(mesh.PresenceOptions{Grace: grace}), w.Users(mesh.PresenceOptions{Grace: grace})
		h := listen(t, w, s2)
		w.Sleep(11 * time.Second)
		a := h.call("a", s1.DialAs("ann"))
		a.Join(lobby)
		a.Close()
		h.tells("join a ann:1 1/1", "disconnect a ann:1 1/1 lost")
		s1.End()
		keys := testhook.PartsOf(s2.Server).Keys
		require.EqualValues(t, 1, w.Client().Del(t.Context(), keys.Kept(keys.RoomBucket(lobby))).Val())
		h.silence(grace)
		w.Sleep(40 * time.Second)
		h.tells("leave a ann:0 0/0 lost")
	})
}

// A user cannot fill Redis with kept places: beyond the limit the oldest one ends.
func TestDisconnectedPerUser(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Users(mesh.PresenceOptions{Grace: grace}, harness.Limits(func(l *mesh.Limits) { l.DisconnectedPerUser = 2 }))
		h := listen(t, w, s)
		a := h.call("a", s.DialAs("ann"))
		a.Join(lobby)
		a.Close()
		h.tells("join a ann:1 1/1", "disconnect a ann:1 1/1 lost")
		b := s.DialAs("ann")
		b.Join("room 2")
		b.Join("room 3")
		b.Close()
		w.Sleep(100 * time.Millisecond)
		h.tells("leave a ann:0 0/0 removed")
		assert.Equal(t, 3, s.Stats().Disconnected)
	})
}

// A change of metadata that brings a user is an update of the member. A change from one
// user to another is a leave and a join, and the JoinGuard is asked.
func TestMetadataChangeTheUser(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		guard := func(_ context.Context, m mesh.Member, _ string) (bool, error) { return m.UserID != "eve", nil }
		s1, s2 := w.Users(mesh.PresenceOptions{Grace: grace, JoinGuard: guard}), w.Users(mesh.PresenceOptions{Grace: grace, JoinGuard: guard})
		h := listen(t, w, s2)
		x := h.call("x", s1.DialAs(""))
		x.Join(lobby)
		set := func(user string) {
			t.Helper()
			require.NoError(t, s2.Connections().SetMetadata(t.Context(), x.ID, map[string]string{"userId": user}, mesh.MetadataOptions{}))
		}
		set("ann")
		h.tells("join x 1/1", "metadata x ann:1 1/1")
		events := h.tap.Got()
		assert.True(t, events[len(events)-1].UserArrived())
		set("bob")
		w.Sleep(time.Second)
		h.tells("leave x ann:0 0/0 closed", "join x bob:1 1/1")
		set("eve")
		w.Sleep(time.Second)
		events = h.tap.Got() // the guard may answer before or after the change is written
		last := events[len(events)-1]
		assert.Equal(t, []any{mesh.EventLeave, mesh.ReasonRemoved, 0}, []any{last.Type, last.Reason, last.Connections})
		assert.Equal(t, 1, x.Pushed("mesh/membership-ended"))
	})
}

// A refused JoinGuard ends the place that the room keeps for the user.
func TestRefusedReturnEndsThePlace(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		var banned atomic.Bool
		s := w.Users(mesh.PresenceOptions{
			Grace: grace, JoinGuard: func(context.Context, mesh.Member, string) (bool, error) { return !banned.Load(), nil },
		})
		h := listen(t, w, s)
		a := h.call("a", s.DialAs("ann"))
		a.Join(lobby)
		a.Close()
		h.tells("join a ann:1 1/1", "disconnect a ann:1 1/1 lost")
		banned.Store(true)
		v := s.DialAs("ann").Room("mesh/join-room", lobby)
		assert.Equal(t, "EREFUSED", v.Code)
		h.tells("leave a ann:0 0/0 removed")
	})
}

// An app with its own transport resumes a connection under the same id: the same member
// is back, and the time of the join stays.
func TestResumeUnderTheSameID(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p1, p2 := w.Manager(harness.WithUsers), w.Manager(harness.WithUsers)
		for _, p := range []*mesh.PresenceManager{p1, p2} {
			require.NoError(t, p.TrackPresence(mesh.Exact(lobby), mesh.PresenceOptions{Grace: grace}))
		}
		tap := w.Tap(p2, lobby, mesh.SubscribeOptions{})
		tap.Wait(w, 1)
		ctx, ann := t.Context(), map[string]string{"userId": "ann"}
		require.NoError(t, p1.Connect(ctx, "phone", ann))
		require.NoError(t, p1.Join(ctx, lobby, "phone"))
		require.NoError(t, p1.Disconnect(ctx, "phone"))
		w.Sleep(time.Second)
		require.NoError(t, p2.Connect(ctx, "phone", ann))
		require.NoError(t, p2.Join(ctx, lobby, "phone"))
		events := tap.Wait(w, 4)
		require.Equal(t, []mesh.EventType{mesh.EventSnapshot, mesh.EventJoin, mesh.EventDisconnect, mesh.EventReconnect},
			[]mesh.EventType{events[0].Type, events[1].Type, events[2].Type, events[3].Type})
		assert.Equal(t, events[1].JoinedAt, events[3].JoinedAt)
		assert.NotEqual(t, events[1].EntryID, events[3].EntryID)
		w.Sleep(2 * grace)
		assert.Len(t, tap.Got(), 4)
		users, err := p1.Users(ctx, lobby)
		require.NoError(t, err)
		require.Len(t, users, 1)
		assert.Equal(t, "ann", users[0].ID)
		assert.False(t, users[0].Members[0].Disconnected)
		s, err := p1.Snapshot(ctx, lobby)
		require.NoError(t, err)
		assert.Equal(t, []int{1, 1, 1}, []int{s.Total, s.Users, len(s.Members)})
	})
}

// A connection is removed at the moment at which it ends, before its server has written
// that its place is kept. The place does not stay.
func TestRemovedWhileItEnds(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]func(s *harness.Server, conn string) error{
		"Remove": func(s *harness.Server, conn string) error {
			_, err := s.Rooms().Remove(s.W.T.Context(), lobby, conn)
			return err
		},
		"RemoveUser": func(s *harness.Server, _ string) error {
			_, err := s.Rooms().RemoveUser(s.W.T.Context(), lobby, "ann")
			return err
		},
		"Clear": func(s *harness.Server, _ string) error { return s.Rooms().Clear(s.W.T.Context(), lobby) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			harness.Embedded(t, func(t *testing.T, w *harness.World) {
				s1, s2 := w.Users(mesh.PresenceOptions{Grace: grace}, slow), w.Users(mesh.PresenceOptions{Grace: grace})
				a := s1.DialAs("ann")
				a.Join(lobby)
				a.Close()
				w.Sleep(20 * time.Millisecond)
				require.NoError(t, remove(s2, a.ID))
				w.Sleep(200 * time.Millisecond)
				count, err := s2.Presence().Count(t.Context(), lobby)
				require.NoError(t, err)
				assert.Zero(t, count)
			})
		})
	}
}

// The app closes a connection for good while a drain hands its places over. They end. But
// a Close after the end of a connection changes nothing: its place is kept.
func TestCloseBesideAnotherEnd(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Users(mesh.PresenceOptions{Grace: grace}, slow), w.Users(mesh.PresenceOptions{Grace: grace})
		a, b := s1.DialAs("ann"), s1.DialAs("bob")
		a.Join(lobby)
		b.Join(lobby)
		kicked, ok := s1.Connection(a.ID)
		require.True(t, ok)
		ended, ok := s1.Connection(b.ID)
		require.True(t, ok)
		b.Close()
		w.Sleep(time.Second)
		require.NoError(t, ended.Close(0, ""))
		go func() { _ = s1.Drain(t.Context(), 0) }()
		w.Sleep(20 * time.Millisecond)
		require.NoError(t, kicked.Close(1000, "kicked"))
		w.Sleep(2 * time.Second)
		members, err := s2.Presence().Members(t.Context(), lobby)
		require.NoError(t, err)
		require.Len(t, members, 1)
		assert.Equal(t, []any{"bob", true}, []any{members[0].UserID, members[0].Disconnected})
	})
}

// slow makes a hand-over stay under way for a while.
func slow(o *mesh.Options) {
	testhook.SetSeams(o, func(s *store.Store) testhook.Seams {
		return testhook.Seams{Local: slowCommits{s}, Lease: s, Hub: s}
	})
}

// slowCommits is a store whose batches take 60 ms on their way.
type slowCommits struct{ *store.Store }

func (s slowCommits) Commit(ctx context.Context, bucket int, inc string, number, known uint64, ops []store.Op) ([]store.OpResult, error) {
	time.Sleep(60 * time.Millisecond)
	return s.Store.Commit(ctx, bucket, inc, number, known, ops)
}
