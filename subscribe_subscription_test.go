package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
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
			var told []string
			for i, e := range events[1:] {
				told = append(told, strings.TrimSpace(fmt.Sprint(e.Type, " ", string(e.State), " ", e.Connections, " ", e.Reason)))
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
			require.Equal(t, []string{"join  2", `state {"n":2} 2`, "state  2", "leave  1 left"}, told)
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
		require.ErrorIs(t, w.Tap(p, "lobby", mesh.SubscribeOptions{Viewer: "nobody"}).End(w), mesh.ErrUnknownConnection)

		// Left by break: nothing is watched any more.
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
		require.Empty(t, refused.Got(), "whom the guard refuses learns nothing")

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

		// A viewer that has gone sees nothing more, and whoever sees for it is told.
		require.NoError(t, p.Disconnect(ctx, "other"))
		require.ErrorIs(t, other.End(w), mesh.ErrClosed)
		require.Equal(t, "other", app.Wait(w, 3)[2].ConnectionID)
		require.Equal(t, 1, p.Stats().Subscriptions)
	})
}

func TestAConsumerThatIsTooSlowIsEnded(t *testing.T) {
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
			for range mesh.MaxIteratorEvents + 1 { // while this consumer is busy
				deliver(&wire.Update{Type: wire.UpdateState, RoomName: "lobby", ConnectionID: "c"})
			}
		}
		require.ErrorIs(t, last, mesh.ErrSlowConsumer)
		require.Equal(t, 1, got, "what it would have missed the end of is not begun")
		require.Equal(t, 0, p.Stats().Subscriptions)
	})
}

// While a guard thinks again, what happens is held back; too much of it ends
// the subscription, and what was held goes with it.
func TestWhatIsHeldForAGuardIsBounded(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		ctx := t.Context()
		p := w.Manager(func(o *mesh.Options) { o.Limits.QueueBytes, o.GuardTimeout = 4000, time.Minute })
		thinking, verdict := make(chan struct{}, 10), make(chan bool)
		var slow bool
		require.NoError(t, p.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{Guard: func(ctx context.Context, _ mesh.Member, _ string) (bool, error) {
			if !slow {
				return true, nil
			}
			thinking <- struct{}{}
			select {
			case v := <-verdict:
				return v, nil
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
		<-thinking
		for i := range 5 {
			publish(i)
		}
		require.Len(t, sub.Got(), 1, "nothing is delivered before the verdict")
		verdict <- true
		events := sub.Wait(w, 6)
		for i, e := range events[1:] {
			require.JSONEq(t, fmt.Sprintf(`{"n":%d}`, i), string(e.State))
		}
		require.NoError(t, p.Recheck("viewer"))
		<-thinking
		for i := range 60 {
			publish(i)
		}
		require.ErrorIs(t, sub.End(w), mesh.ErrSlowConsumer)
		require.Len(t, sub.Got(), 6)
		verdict <- true
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
		w.Sleep(5 * time.Second) // until it is known to be away
		began := time.Now()
		fresh := w.Tap(p, "fresh", mesh.SubscribeOptions{})
		require.ErrorIs(t, fresh.End(w), mesh.ErrUnavailable)
		require.LessOrEqual(t, time.Since(began), 2*time.Second)
		began = time.Now()
		require.True(t, a.Subscribe("fresh").Stale, "a client's begins with what is known")
		require.LessOrEqual(t, time.Since(began), testhook.LimitsOf().Away)
		stale := w.Tap(p, "watched", mesh.SubscribeOptions{})
		snap := stale.Wait(w, 1)[0].Snapshot
		require.Len(t, snap.Members, 1, "a watched room is served from memory")
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
