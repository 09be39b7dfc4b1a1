package mesh_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/internal/wire"
)

func TestSubscribeYieldsASnapshotThenEveryChange(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Tracked(), w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		a, b := s.Dial(), s.Dial()
		require.NoError(t, s.Connections().SetMetadata(ctx, a.ID, map[string]string{"name": "A"}, mesh.MetadataOptions{}))
		a.Join("lobby")
		a.State("lobby", map[string]any{"n": 1})
		began := time.Now()
		first, second := w.Tap(p, "lobby", mesh.SubscribeOptions{}), w.Tap(s.Presence(), "lobby", mesh.SubscribeOptions{})
		first.Wait(w, 1)
		second.Wait(w, 1)
		b.Join("lobby")
		b.State("lobby", map[string]any{"n": 2})
		b.Call("mesh/clear-presence-state", map[string]any{"roomName": "lobby"})
		b.Leave("lobby")
		for _, sub := range []*harness.Tap{first, second} {
			events := sub.Wait(w, 5)
			require.Len(t, events, 5)
			snap := events[0]
			require.Equal(t, mesh.EventSnapshot, snap.Type)
			require.Len(t, snap.Snapshot.Members, 1)
			member := snap.Snapshot.Members[0]
			require.NotEmpty(t, member.EntryID)
			require.WithinRange(t, member.JoinedAt, began.Add(-time.Minute), began.Add(time.Second))
			member.EntryID, member.JoinedAt = "", time.Time{}
			require.Equal(t, mesh.Member{ID: a.ID, Metadata: json.RawMessage(`{"name":"A"}`), State: json.RawMessage(`{"n":1}`)}, member)
			require.Equal(t, 1, snap.Snapshot.Total)
			require.False(t, snap.Snapshot.Stale)
			require.Equal(t, snap.Seq, snap.Snapshot.Seq)
			require.Equal(t, snap.Seq+1, events[1].Seq)
			var updates []string
			for i, e := range events[1:] {
				updates = append(updates, strings.TrimSpace(fmt.Sprint(e.Type, " ", string(e.State), " ", e.Connections, " ", e.Reason)))
				require.Equal(t, events[1].EntryID, e.EntryID)
				require.Equal(t, events[1].JoinedAt, e.JoinedAt)
				require.Equal(t, i == 0, e.JoinedAt.Equal(e.Time) && e.Type == mesh.EventJoin)
				require.Equal(t, i == 3, e.UserLeft() || e.Reason != "")
				require.False(t, e.UserArrived() || e.RoomOccupied() || e.RoomVacated())
				require.Equal(t, b.ID, e.ConnectionID)
				require.Equal(t, "lobby", e.Room)
				require.Equal(t, snap.Epoch, e.Epoch)
				require.Greater(t, e.Seq, events[i].Seq)
				require.False(t, e.Repair)
				require.Nil(t, e.Snapshot)
				require.WithinRange(t, e.Time, began.Add(-time.Second), time.Now().Add(time.Second))
			}
			require.Equal(t, []string{"join  2", `state {"n":2} 2`, "state  2", "leave  1 left"}, updates)
		}
	})
}

func TestSubscribeEnds(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		require.ErrorIs(t, w.Tap(p, "untracked", mesh.SubscribeOptions{}).End(w), mesh.ErrNotTracked)
		require.ErrorIs(t, w.Tap(p, "", mesh.SubscribeOptions{}).End(w), mesh.ErrInvalidRoom)
		require.ErrorIs(t, w.Tap(p, "lobby", mesh.SubscribeOptions{Viewer: "unknown"}).End(w), mesh.ErrUnknownConnection)

		// A break ends the subscription.
		seq := p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{})
		for range 2 { // each range is a subscription of its own
			for e, err := range seq {
				require.NoError(t, err)
				require.Equal(t, mesh.EventSnapshot, e.Type)
				require.Equal(t, 1, p.Stats().Subscriptions)
				break
			}
			require.Equal(t, 0, p.Stats().Subscriptions)
		}

		ends, stays := w.Tap(p, "lobby", mesh.SubscribeOptions{}), w.Tap(p, "lobby", mesh.SubscribeOptions{})
		ends.Wait(w, 1)
		stays.Wait(w, 1)
		ends.Cancel()
		require.ErrorIs(t, ends.End(w), context.Canceled)
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "lobby", "c"))
		require.Equal(t, "c", stays.Wait(w, 2)[1].ConnectionID)
		require.Len(t, ends.Got(), 1)
		reason := errors.New("enough")
		caused, cancel := context.WithCancelCause(ctx)
		cancel(reason)
		for _, err := range p.Subscribe(caused, "lobby", mesh.SubscribeOptions{}) {
			if err != nil {
				require.ErrorIs(t, err, reason)
			}
		}
		require.NoError(t, p.Shutdown(ctx))
		require.ErrorIs(t, stays.End(w), mesh.ErrClosed)
		require.ErrorIs(t, w.Tap(p, "lobby", mesh.SubscribeOptions{}).End(w), mesh.ErrClosed)
	})
}

func TestSubscribeOnBehalfOfAViewer(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager()
		admins := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			v, err := mesh.MetadataOf[struct{ Admin bool }](m)
			return v.Admin, err
		}
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Guard: admins}))
		admin, user := map[string]bool{"admin": true}, map[string]bool{"admin": false}
		require.NoError(t, p.Connect(ctx, "boss", admin))
		require.NoError(t, p.Connect(ctx, "other", admin))
		require.NoError(t, p.Connect(ctx, "user", user))
		require.NoError(t, p.Join(ctx, "lobby", "user"))

		refused := w.Tap(p, "lobby", mesh.SubscribeOptions{Viewer: "user"})
		require.ErrorIs(t, refused.End(w), mesh.ErrRefused)
		require.Empty(t, refused.Got(), "a refused viewer learns nothing")

		boss, other, app := w.Tap(p, "lobby", mesh.SubscribeOptions{Viewer: "boss"}), w.Tap(p, "lobby", mesh.SubscribeOptions{Viewer: "other"}), w.Tap(p, "lobby", mesh.SubscribeOptions{})
		boss.Wait(w, 1)
		other.Wait(w, 1)
		app.Wait(w, 1)
		require.NoError(t, p.Connections().SetMetadata(ctx, "boss", user, mesh.MetadataOptions{}))
		require.ErrorIs(t, boss.End(w), mesh.ErrRefused)
		require.NoError(t, p.Join(ctx, "lobby", "other"))
		require.Equal(t, "other", other.Wait(w, 2)[1].ConnectionID)
		require.Equal(t, "other", app.Wait(w, 2)[1].ConnectionID)
		require.Len(t, boss.Got(), 1)

		// The subscription of a viewer ends with an error if the viewer disconnects.
		require.NoError(t, p.Disconnect(ctx, "other"))
		require.ErrorIs(t, other.End(w), mesh.ErrClosed)
		require.Equal(t, "other", app.Wait(w, 3)[2].ConnectionID)
		require.Equal(t, 1, p.Stats().Subscriptions)
	})
}

func TestASlowSubscriptionEnds(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p := w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var got int
		var last error
		for e, err := range p.Subscribe(ctx, "lobby", mesh.SubscribeOptions{}) {
			if last = err; err != nil {
				break
			}
			if got++; e.Type != mesh.EventSnapshot {
				continue
			}
			deliver := p.Delivery()
			for range mesh.MaxIteratorEvents + 1 { // while the loop body runs
				deliver(&wire.Update{Type: wire.UpdateState, RoomName: "lobby", ConnectionID: "c"})
			}
		}
		require.ErrorIs(t, last, mesh.ErrSlowConsumer)
		require.Equal(t, 1, got, "the queued events are dropped")
		require.Equal(t, 0, p.Stats().Subscriptions)
	})
}

// TestEventsHeldForAGuardAreBounded checks that events wait while a guard is asked
// again. If more events wait than QueueBytes allows, the subscription ends and they are
// dropped.
func TestEventsHeldForAGuardAreBounded(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager(func(o *mesh.Options) { o.Limits.QueueBytes, o.GuardTimeout = 4000, time.Minute })
		asked, answer := make(chan struct{}, 10), make(chan bool)
		var slow bool
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Guard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
			if !slow {
				return true, nil
			}
			asked <- struct{}{}
			select {
			case ok := <-answer:
				return ok, nil
			case <-ctx.Done():
				return false, ctx.Err()
			}
		}}))
		require.NoError(t, p.Connect(ctx, "viewer", nil))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "lobby", "c"))
		publish := func(n int) {
			require.NoError(t, p.PublishState(ctx, "lobby", "c", map[string]int{"n": n}, mesh.StateOptions{}))
			w.Sleep(10 * time.Millisecond)
		}
		sub := w.Tap(p, "lobby", mesh.SubscribeOptions{Viewer: "viewer"})
		sub.Wait(w, 1)
		slow = true
		require.NoError(t, p.Recheck("viewer"))
		<-asked
		for i := range 5 {
			publish(i)
		}
		require.Len(t, sub.Got(), 1, "no event is delivered before the guard's answer")
		answer <- true
		events := sub.Wait(w, 6)
		for i, e := range events[1:] {
			require.JSONEq(t, fmt.Sprintf(`{"n":%d}`, i), string(e.State))
		}
		require.NoError(t, p.Recheck("viewer"))
		<-asked
		for i := range 60 {
			publish(i)
		}
		require.ErrorIs(t, sub.End(w), mesh.ErrSlowConsumer)
		require.Len(t, sub.Got(), 6)
		answer <- true
		w.Sleep(time.Second)
		require.Equal(t, 0, p.Stats().Subscriptions)
	})
}

func TestSubscribeWithoutRedis(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		s, p := w.Tracked(), w.Manager()
		require.NoError(t, p.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "watched", "c"))
		before := w.Tap(p, "watched", mesh.SubscribeOptions{})
		before.Wait(w, 1)
		a := s.Dial()
		w.Away()
		w.Sleep(5 * time.Second) // until the server knows that Redis is away
		began := time.Now()
		fresh := w.Tap(p, "fresh", mesh.SubscribeOptions{})
		require.ErrorIs(t, fresh.End(w), mesh.ErrUnavailable)
		require.LessOrEqual(t, time.Since(began), 2*time.Second)
		began = time.Now()
		require.True(t, a.Subscribe("fresh").Stale, "a client gets a stale snapshot")
		require.LessOrEqual(t, time.Since(began), testhook.LimitsOf().Away)
		stale := w.Tap(p, "watched", mesh.SubscribeOptions{})
		snap := stale.Wait(w, 1)[0].Snapshot
		require.Len(t, snap.Members, 1, "the snapshot of a watched room comes from the mirror")
		w.Back()
		w.Sleep(10 * time.Second)
		require.NoError(t, p.Disconnect(ctx, "c"))
		for _, sub := range []*harness.Tap{before, stale} {
			events := sub.Wait(w, 2)
			require.Len(t, events, 2)
			require.Equal(t, mesh.EventLeave, events[1].Type)
		}
		require.Equal(t, 0, w.Tap(p, "fresh", mesh.SubscribeOptions{}).Wait(w, 1)[0].Snapshot.Total)
	})
}

// TestMetadataChangesDoNotDelayUnguardedRooms checks that fast changes of a viewer's
// metadata do not delay events of rooms without guards.
func TestMetadataChangesDoNotDelayUnguardedRooms(t *testing.T) {
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

// slowWrites makes each batch of a server take d.
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

// TestAGuardThatReadsMembership has a guard that lets only members see the room. When it
// is asked again after a removal, it must not find the connection in the room.
func TestAGuardThatReadsMembership(t *testing.T) {
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
				w.Eventually(2*time.Second, func() bool { return p.Pushed("mesh/presence-ended") == 1 }, "the push mesh/presence-ended")
				assert.Zero(t, p.Count("join", stays.ID))
			})
		})
	}
}

// TestCancelledGuardCallsHoldEvents checks that a viewer that is now refused receives no
// event while cancelled guard calls about it have not returned.
func TestCancelledGuardCallsHoldEvents(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s, ctx := w.Server(harness.NoCommandLimit), t.Context()
		var slow, banned atomic.Bool
		s.Track(".*", mesh.PresenceOptions{Guard: func(context.Context, mesh.Member, string) (bool, error) {
			refuse := banned.Load()
			if slow.Load() {
				time.Sleep(300 * time.Millisecond)
			}
			return !refuse, nil
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
		w.Eventually(5*time.Second, func() bool { return p.Pushed("mesh/presence-ended") == rooms }, "all subscriptions have ended")
		asking.Wait()
		assert.Zero(t, p.Count("state", busy.ID))
	})
}

// TestGuardsThatCauseRechecks has guards that call methods after which the guards are
// asked again. The commands must be answered in time, and the guards must not be asked
// for ever.
func TestGuardsThatCauseRechecks(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]func(ctx context.Context, s *mesh.Server, conn, room string) error{
		"Connections.Recheck": func(ctx context.Context, s *mesh.Server, conn, _ string) error {
			return s.Connections().Recheck(ctx, conn)
		},
		"Rooms.Recheck": func(ctx context.Context, s *mesh.Server, _, room string) error { return s.Rooms().Recheck(ctx, room) },
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
			return s.Rooms().Add(ctx, room, conn, mesh.AddOptions{})
		},
		"Disconnect": func(ctx context.Context, s *mesh.Server, conn, _ string) error {
			return s.Presence().Disconnect(ctx, conn)
		},
		"TrackPresence": func(_ context.Context, s *mesh.Server, _, _ string) error {
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
				assert.Equal(t, before, asked.Load(), "the guard is not asked any more")
			})
		})
	}
}

// TestTooManyHangingGuards checks that subscriptions and entries stay while the guards of
// a rule are not asked, because too many of them hang. Afterwards the guards must be asked
// about them.
func TestTooManyHangingGuards(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		log := &testlog.TextLog{}
		p := w.Manager(func(o *mesh.Options) {
			o.Logger, o.GuardTimeout, o.HookTimeout = log.Logger(), time.Second, time.Second
		})
		release := make(chan struct{})
		var refused, hanging sync.Map // by connection id
		guard := func(_ context.Context, m mesh.Member, _ string) (bool, error) {
			if _, ok := hanging.Load(m.ID); ok {
				<-release
			}
			_, refuse := refused.Load(m.ID)
			return !refuse, nil
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
		for i := range hangingPerRule {
			id := fmt.Sprint("h", i)
			hanging.Store(id, true)
			require.NoError(t, p.Connect(ctx, id, nil))
			all.Go(func() { assert.ErrorIs(t, p.Join(ctx, "doc", id), mesh.ErrRefused) })
		}
		all.Wait()
		w.Sleep(time.Second)
		require.EqualValues(t, hangingPerRule, p.Stats().GuardsHanging)

		refused.Store("bad", true)
		require.NoError(t, p.Connections().SetMetadata(ctx, "bad", "changed", mesh.MetadataOptions{}))
		require.NoError(t, p.Rooms().Recheck(ctx, "doc"))
		require.NoError(t, p.Join(ctx, "doc", "good"), "a member may join again")
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

// hangingPerRule is the number of hanging guards at which a rule asks its guards no more.
const hangingPerRule = 1024

func TestStatsOfASlowSubscription(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		require.ErrorIs(t, s.FillQueue("lobby", mesh.MaxIteratorEvents+5), mesh.ErrSlowConsumer)
		assert.EqualValues(t, 1, s.Stats().SlowSubscriptions)
	})
}

// TestPutBackWhileEnding ends a subscription while it is restored because a second one
// has failed. The two must not wait for each other.
func TestPutBackWhileEnding(t *testing.T) {
	t.Parallel()
	wheel := clock.NewWheel(0)
	for i := range 20000 {
		twice := mesh.SubscribeTwice(wheel)
		var both sync.WaitGroup
		both.Go(twice.EndFirst)
		both.Go(func() {
			for range i % 400 {
				_ = twice.Conn.ID()
			}
			twice.PutBack()
		})
		both.Wait()
		require.Zero(t, twice.Open(), "the subscription has ended in either order")
	}
}

// benchServer starts a server on TCP and returns it with its address.
func benchServer(b *testing.B) (*mesh.Server, string) {
	b.Helper()
	srv, err := mesh.NewServer(mesh.Options{
		Redis: benchRedis(b), PingInterval: time.Hour, LatencyInterval: -1, Limits: mesh.Limits{CommandsPerSecond: -1},
	})
	require.NoError(b, err)
	require.NoError(b, srv.TrackPresence(mesh.Regexp(regexp.MustCompile(".*")), mesh.PresenceOptions{}))
	require.NoError(b, srv.Start(b.Context()))
	web := httptest.NewServer(srv)
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(b, srv.Shutdown(ctx))
		web.Close()
	})
	return srv, "ws" + strings.TrimPrefix(web.URL, "http")
}

// benchAudience counts the updates that a number of sockets receive. The sockets are no
// clients of meshtest, because decoding would take more time than the server does.
type benchAudience struct {
	want int64 // number of sockets
	got  atomic.Int64
	all  chan struct{} // receives each time that all sockets have received an update
}

// listen reads frames of one socket until it ends, and counts the updates.
func (a *benchAudience) listen(ws *websocket.Conn) {
	for {
		_, data, err := ws.ReadMessage()
		if err != nil {
			return
		}
		if bytes.Contains(data, []byte("presence-update")) && a.got.Add(1)%a.want == 0 {
			a.all <- struct{}{}
		}
	}
}

// BenchmarkFanout delivers one event to 200 subscribers per iteration, and waits until
// all have read it. "mesh" publishes a state through Redis. For comparison, "gorilla"
// writes one prepared frame in a loop over the sockets.
func BenchmarkFanout(b *testing.B) {
	const subscribers = 200
	dial := func(b *testing.B, url string, each func(ws *websocket.Conn)) *benchAudience {
		b.Helper()
		a := &benchAudience{want: subscribers, all: make(chan struct{}, 1)}
		var reading sync.WaitGroup
		b.Cleanup(reading.Wait)
		for range subscribers {
			ws, _, err := websocket.DefaultDialer.Dial(url, nil)
			require.NoError(b, err)
			b.Cleanup(func() { _ = ws.Close() })
			each(ws)
			reading.Go(func() { a.listen(ws) })
		}
		return a
	}
	b.Run("mesh", func(b *testing.B) {
		srv, url := benchServer(b)
		a := dial(b, url, func(ws *websocket.Conn) {
			require.NoError(b, ws.WriteJSON(map[string]any{
				"id": 1, "command": "mesh/subscribe-presence", "payload": map[string]any{"roomName": "lobby"},
			}))
			for { // until the answer
				var f harness.Frame
				require.NoError(b, ws.ReadJSON(&f))
				if f.ID != nil {
					return
				}
			}
		})
		p := srv.Presence()
		require.NoError(b, p.Connect(b.Context(), "speaker", nil))
		require.NoError(b, p.Join(b.Context(), "lobby", "speaker"))
		<-a.all
		n := 0
		for b.Loop() {
			state := json.RawMessage(fmt.Sprintf(`{"n":%d}`, n))
			require.NoError(b, p.PublishState(b.Context(), "lobby", "speaker", state, mesh.StateOptions{}))
			<-a.all
			n++
		}
		b.ReportMetric(subscribers*float64(n)/b.Elapsed().Seconds(), "frames/s")
	})
	b.Run("gorilla", func(b *testing.B) {
		sockets := make(chan *websocket.Conn, subscribers)
		var upgrader websocket.Upgrader
		web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ws, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				b.Error(err)
				return
			}
			sockets <- ws
		}))
		b.Cleanup(web.Close)
		a := dial(b, "ws"+strings.TrimPrefix(web.URL, "http"), func(*websocket.Conn) {})
		list := make([]*websocket.Conn, subscribers)
		for i := range list {
			list[i] = <-sockets
			b.Cleanup(func() { _ = list[i].Close() })
		}
		n := 0
		for b.Loop() {
			text := fmt.Sprintf(`{"command":"mesh/presence-update","payload":{"type":"state","connectionId":"speaker",`+
				`"roomName":"lobby","timestamp":%d,"seq":%d,"epoch":"1","state":{"n":%d}}}`, time.Now().UnixMilli(), n, n)
			m, err := websocket.NewPreparedMessage(websocket.TextMessage, []byte(text))
			require.NoError(b, err)
			for _, ws := range list {
				require.NoError(b, ws.WritePreparedMessage(m))
			}
			<-a.all
			n++
		}
		b.ReportMetric(subscribers*float64(n)/b.Elapsed().Seconds(), "frames/s")
	})
}

// BenchmarkSubscribeWatched subscribes to a room of 500 members that the server already
// watches, over a socket, and unsubscribes. Frames are not decoded, as in benchAudience.
func BenchmarkSubscribeWatched(b *testing.B) {
	srv, url := benchServer(b)
	p := srv.Presence()
	for i := range 500 {
		id := fmt.Sprintf("conn%d", i)
		require.NoError(b, p.Connect(b.Context(), id, map[string]any{"userId": i}))
		require.NoError(b, p.Join(b.Context(), "lobby", id))
	}
	ws, _, err := websocket.DefaultDialer.Dial(url, nil)
	require.NoError(b, err)
	b.Cleanup(func() { _ = ws.Close() })
	ask := func(command string) {
		require.NoError(b, ws.WriteJSON(map[string]any{"id": 1, "command": command, "payload": map[string]any{"roomName": "lobby"}}))
		for {
			_, data, err := ws.ReadMessage()
			require.NoError(b, err)
			if bytes.Contains(data[:min(40, len(data))], []byte(`"id":1,`)) {
				return
			}
		}
	}
	ask("mesh/subscribe-presence") // the mirror stays for a while after its last subscriber
	ask("mesh/unsubscribe-presence")
	before, n := srv.Stats().RedisCalls, 0
	for b.Loop() {
		ask("mesh/subscribe-presence")
		ask("mesh/unsubscribe-presence")
		n++
	}
	b.ReportMetric(float64(srv.Stats().RedisCalls-before)/float64(n), "redis/op")
}
