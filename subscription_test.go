package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/socket"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/wire"
)

// tap takes what a Subscribe yields, on a goroutine of its own.
type tap struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex // guards the fields below
	events []Event
	err    error
}

func (w *world) tap(p *PresenceManager, room string, opts SubscribeOptions) *tap {
	ctx, cancel := context.WithCancel(w.t.Context())
	a := &tap{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(a.done)
		for e, err := range p.Subscribe(ctx, room, opts) {
			a.mu.Lock()
			if err != nil {
				a.err = errors.Join(a.err, err)
			} else {
				a.events = append(a.events, e)
			}
			a.mu.Unlock()
		}
	}()
	w.t.Cleanup(func() {
		cancel()
		<-a.done
	})
	return a
}

func (a *tap) got() []Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.events)
}

// wait waits until so many events have come.
func (a *tap) wait(w *world, n int) []Event {
	w.t.Helper()
	w.eventually(3*time.Second, func() bool { return len(a.got()) >= n }, "%d events, got %v", n, a.got())
	return a.got()
}

// end waits until the iterator has ended and returns its error.
func (a *tap) end(w *world) error {
	w.t.Helper()
	w.eventually(5*time.Second, func() bool {
		select {
		case <-a.done:
			return true
		default:
			return false
		}
	}, "the subscription has not ended")
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

func TestSubscribeYieldsASnapshotThenEveryChange(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s, p := w.tracked(), w.manager()
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{}))
		a, b := s.dial(), s.dial()
		require.NoError(t, s.Connections().SetMetadata(ctx, a.id, map[string]string{"name": "A"}, MetadataOptions{}))
		a.join("lobby")
		a.state("lobby", map[string]any{"n": 1})
		began := time.Now()
		first, second := w.tap(p, "lobby", SubscribeOptions{}), w.tap(s.Presence(), "lobby", SubscribeOptions{})
		first.wait(w, 1)
		second.wait(w, 1)
		b.join("lobby")
		b.state("lobby", map[string]any{"n": 2})
		b.call("mesh/clear-presence-state", map[string]any{"roomName": "lobby"})
		b.leave("lobby")
		for _, sub := range []*tap{first, second} {
			events := sub.wait(w, 5)
			require.Len(t, events, 5)
			snap := events[0]
			require.Equal(t, EventSnapshot, snap.Type)
			require.Equal(t, []Member{{ID: a.id, Metadata: json.RawMessage(`{"name":"A"}`), State: json.RawMessage(`{"n":1}`)}}, snap.Snapshot.Members)
			require.Equal(t, 1, snap.Snapshot.Total)
			require.False(t, snap.Snapshot.Stale)
			require.Equal(t, snap.Seq, snap.Snapshot.Seq)
			require.Equal(t, snap.Seq+1, events[1].Seq)
			var told []string
			for i, e := range events[1:] {
				told = append(told, fmt.Sprint(e.Type, " ", string(e.State)))
				require.Equal(t, b.id, e.ConnectionID)
				require.Equal(t, "lobby", e.Room)
				require.Equal(t, snap.Epoch, e.Epoch)
				require.Greater(t, e.Seq, events[i].Seq)
				require.False(t, e.Repair)
				require.Nil(t, e.Snapshot)
				require.WithinRange(t, e.Time, began.Add(-time.Second), time.Now().Add(time.Second))
			}
			require.Equal(t, []string{"join ", `state {"n":2}`, "state ", "leave "}, told)
		}
	})
}

func TestSubscribeEnds(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		p := w.manager()
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{}))
		require.ErrorIs(t, w.tap(p, "untracked", SubscribeOptions{}).end(w), ErrNotTracked)
		require.ErrorIs(t, w.tap(p, "", SubscribeOptions{}).end(w), ErrInvalidRoom)
		require.ErrorIs(t, w.tap(p, "lobby", SubscribeOptions{Viewer: "nobody"}).end(w), ErrUnknownConnection)

		// Left by break: nothing is watched any more.
		seq := p.Subscribe(ctx, "lobby", SubscribeOptions{})
		for range 2 { // each range is a subscription of its own
			for e, err := range seq {
				require.NoError(t, err)
				require.Equal(t, EventSnapshot, e.Type)
				require.Equal(t, 1, p.Stats().Subscriptions)
				break
			}
			require.Equal(t, 0, p.Stats().Subscriptions)
		}

		ends, stays := w.tap(p, "lobby", SubscribeOptions{}), w.tap(p, "lobby", SubscribeOptions{})
		ends.wait(w, 1)
		stays.wait(w, 1)
		ends.cancel()
		require.ErrorIs(t, ends.end(w), context.Canceled)
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "lobby", "c"))
		require.Equal(t, "c", stays.wait(w, 2)[1].ConnectionID)
		require.Len(t, ends.got(), 1)
		reason := errors.New("enough")
		caused, cancel := context.WithCancelCause(ctx)
		cancel(reason)
		for _, err := range p.Subscribe(caused, "lobby", SubscribeOptions{}) {
			if err != nil {
				require.ErrorIs(t, err, reason)
			}
		}
		require.NoError(t, p.Shutdown(ctx))
		require.ErrorIs(t, stays.end(w), ErrClosed)
		require.ErrorIs(t, w.tap(p, "lobby", SubscribeOptions{}).end(w), ErrClosed)
	})
}

func TestSubscribeOnBehalfOfAViewer(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		p := w.manager()
		admins := func(_ context.Context, m Member, _ string) (bool, error) {
			v, err := MetadataOf[struct{ Admin bool }](m)
			return v.Admin, err
		}
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{Guard: admins}))
		admin, user := map[string]bool{"admin": true}, map[string]bool{"admin": false}
		require.NoError(t, p.Connect(ctx, "boss", admin))
		require.NoError(t, p.Connect(ctx, "other", admin))
		require.NoError(t, p.Connect(ctx, "user", user))
		require.NoError(t, p.Join(ctx, "lobby", "user"))

		refused := w.tap(p, "lobby", SubscribeOptions{Viewer: "user"})
		require.ErrorIs(t, refused.end(w), ErrRefused)
		require.Empty(t, refused.got(), "whom the guard refuses learns nothing")

		boss, other, app := w.tap(p, "lobby", SubscribeOptions{Viewer: "boss"}), w.tap(p, "lobby", SubscribeOptions{Viewer: "other"}), w.tap(p, "lobby", SubscribeOptions{})
		boss.wait(w, 1)
		other.wait(w, 1)
		app.wait(w, 1)
		require.NoError(t, p.Connections().SetMetadata(ctx, "boss", user, MetadataOptions{}))
		require.ErrorIs(t, boss.end(w), ErrRefused)
		require.NoError(t, p.Join(ctx, "lobby", "other"))
		require.Equal(t, "other", other.wait(w, 2)[1].ConnectionID)
		require.Equal(t, "other", app.wait(w, 2)[1].ConnectionID)
		require.Len(t, boss.got(), 1)

		// A viewer that has gone sees nothing more, and whoever sees for it is told.
		require.NoError(t, p.Disconnect(ctx, "other"))
		require.ErrorIs(t, other.end(w), ErrClosed)
		require.Equal(t, "other", app.wait(w, 3)[2].ConnectionID)
		require.Equal(t, 1, p.Stats().Subscriptions)
	})
}

func TestAConsumerThatIsTooSlowIsEnded(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		p := w.manager()
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{}))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var got int
		var last error
		for e, err := range p.Subscribe(ctx, "lobby", SubscribeOptions{}) {
			if last = err; err != nil {
				break
			}
			if got++; e.Type != EventSnapshot {
				continue
			}
			subs := p.n.watchers.of("")
			require.Len(t, subs, 1)
			for range eventsHeld + 1 { // while this consumer is busy
				subs[0].Deliver(&wire.Update{Type: wire.UpdateState, RoomName: "lobby", ConnectionID: "c"})
			}
		}
		require.ErrorIs(t, last, ErrSlowConsumer)
		require.Equal(t, 1, got, "what it would have missed the end of is not begun")
		require.Equal(t, 0, p.Stats().Subscriptions)
	})
}

// While a guard thinks again, what happens is held back; too much of it ends
// the subscription, and what was held goes with it.
func TestWhatIsHeldForAGuardIsBounded(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		p := w.manager(func(o *Options) { o.Limits.QueueBytes, o.GuardTimeout = 4000, time.Minute })
		thinking, verdict := make(chan struct{}, 10), make(chan bool)
		var slow bool
		require.NoError(t, p.TrackPresence(Exact("lobby"), PresenceOptions{Guard: func(ctx context.Context, _ Member, _ string) (bool, error) {
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
			require.NoError(t, p.PublishState(ctx, "lobby", "c", map[string]int{"n": n}, StateOptions{}))
			w.sleep(10 * time.Millisecond)
		}
		sub := w.tap(p, "lobby", SubscribeOptions{Viewer: "viewer"})
		sub.wait(w, 1)
		slow = true
		require.NoError(t, p.Recheck("viewer"))
		<-thinking
		for i := range 5 {
			publish(i)
		}
		require.Len(t, sub.got(), 1, "nothing is delivered before the verdict")
		verdict <- true
		events := sub.wait(w, 6)
		for i, e := range events[1:] {
			require.JSONEq(t, fmt.Sprintf(`{"n":%d}`, i), string(e.State))
		}
		require.NoError(t, p.Recheck("viewer"))
		<-thinking
		for i := range 60 {
			publish(i)
		}
		require.ErrorIs(t, sub.end(w), ErrSlowConsumer)
		require.Len(t, sub.got(), 6)
		verdict <- true
		w.sleep(time.Second)
		require.Equal(t, 0, p.Stats().Subscriptions)
	})
}

func TestSubscribeWithoutRedis(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		s, p := w.tracked(), w.manager()
		require.NoError(t, p.TrackPresence(Regexp(mustCompile(".*")), PresenceOptions{}))
		require.NoError(t, p.Connect(ctx, "c", nil))
		require.NoError(t, p.Join(ctx, "watched", "c"))
		before := w.tap(p, "watched", SubscribeOptions{})
		before.wait(w, 1)
		a := s.dial()
		w.away()
		w.sleep(5 * time.Second) // until it is known to be away
		began := time.Now()
		fresh := w.tap(p, "fresh", SubscribeOptions{})
		require.ErrorIs(t, fresh.end(w), ErrUnavailable)
		require.LessOrEqual(t, time.Since(began), 2*time.Second)
		began = time.Now()
		require.Equal(t, "EUNAVAILABLE", a.room("mesh/subscribe-presence", "fresh").Code)
		require.LessOrEqual(t, time.Since(began), 2*time.Second)
		stale := w.tap(p, "watched", SubscribeOptions{})
		snap := stale.wait(w, 1)[0].Snapshot
		require.Len(t, snap.Members, 1, "a watched room is served from memory")
		w.back()
		w.sleep(10 * time.Second)
		require.NoError(t, p.Disconnect(ctx, "c"))
		for _, sub := range []*tap{before, stale} {
			events := sub.wait(w, 2)
			require.Len(t, events, 2)
			require.Equal(t, EventLeave, events[1].Type)
		}
		require.Equal(t, 0, w.tap(p, "fresh", SubscribeOptions{}).wait(w, 1)[0].Snapshot.Total)
	})
}

// A failed second subscription puts the first one back while that one is being
// ended: neither waits for the other.
func TestPutBackWhileEnding(t *testing.T) {
	t.Parallel()
	wheel := clock.NewWheel(0)
	for i := range 20000 {
		c := &Connection{subs: map[string]*subscription{}, sock: socket.NewGroup(socket.Config{Wheel: wheel}).New(nil, nil)}
		subscribed := func() *subscription {
			out := &socketOutlet{c: c, room: "r", answered: true}
			return &subscription{room: "r", viewer: "v", out: out, most: -1}
		}
		old, next := subscribed(), subscribed()
		c.subs["r"] = next
		var both sync.WaitGroup
		both.Go(func() { old.finish(ErrRefused) })
		both.Go(func() {
			for range i % 400 {
				_ = c.ID()
			}
			c.unsubscribe(next, old)
		})
		both.Wait()
		require.Empty(t, c.subs, "ended is ended, whoever was first")
	}
}
