package watch

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/hub"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// record is an output that keeps what it gets.
type record struct {
	snapshots int
	updates   []string // ids of connections
	ended     []error
}

func (r *record) Snapshot(hub.View)     { r.snapshots++ }
func (r *record) Update(u *wire.Update) { r.updates = append(r.updates, u.ConnectionID) }
func (r *record) Ended(err error)       { r.ended = append(r.ended, err) }
func update(conn string) *wire.Update   { return &wire.Update{ConnectionID: conn} }
func newSubscription(maxBytes int) (*Subscription, *record) {
	out := &record{}
	return &Subscription{Room: "lobby", Viewer: "c", Out: out, MaxBytes: maxBytes}, out
}

func TestASubscriptionHoldsUpdatesBack(t *testing.T) {
	t.Parallel()
	s, out := newSubscription(-1)
	s.ready(hub.View{})
	s.Deliver(update("a"))
	s.pause()
	s.Deliver(update("b"))
	s.Deliver(update("c"))
	assert.Equal(t, []string{"a"}, out.updates)
	s.resume()
	s.Deliver(update("d"))
	assert.Equal(t, []string{"a", "b", "c", "d"}, out.updates)
	assert.Equal(t, 1, out.snapshots)
	assert.True(t, s.Finish(errs.Refused))
	assert.False(t, s.Finish(errs.Closed), "it has ended already")
	s.Deliver(update("e"))
	assert.Len(t, out.updates, 4)
	assert.Equal(t, []error{errs.Refused}, out.ended)
	assert.True(t, s.IsOver())
}

func TestASubscriptionEndsIfItsBufferIsFull(t *testing.T) {
	t.Parallel()
	s, out := newSubscription(300)
	s.pause()
	for range 2 {
		s.Deliver(update("a"))
	}
	assert.False(t, s.IsOver())
	s.Deliver(update("a"))
	s.resume()
	assert.Empty(t, out.updates)
	assert.Equal(t, []error{ErrBufferFull}, out.ended)
}

func TestASubscriptionEndsQuietly(t *testing.T) {
	t.Parallel()
	s, out := newSubscription(-1)
	s.pause()
	s.Deliver(update("a"))
	s.EndQuietly()
	s.resume()
	assert.False(t, s.Finish(errs.Closed))
	assert.Empty(t, out.updates)
	assert.Empty(t, out.ended)
}

// A call between updates keeps its place, and comes once in any case.
func TestCallsBetweenUpdates(t *testing.T) {
	t.Parallel()
	s, out := newSubscription(0)
	var calls []string
	note := func(name string) {
		s.between(func(ok bool) { calls = append(calls, fmt.Sprint(name, " ", ok, " ", len(out.updates))) })
	}
	s.Deliver(update("a"))
	note("now")
	s.pause()
	note("held") // it takes no space of the buffer
	s.resume()
	assert.Equal(t, []string{"now true 1", "held true 1"}, calls)
	s.pause()
	note("ended")
	s.Finish(errs.Refused)
	note("after")
	assert.Equal(t, []string{"ended false 1", "after false 1"}, calls[2:])

	s, out = newSubscription(-1)
	s.pause()
	s.Deliver(update("a"))
	note("between")
	s.Deliver(update("b"))
	s.resume()
	assert.Equal(t, "between true 1", calls[4])
	assert.Len(t, out.updates, 2)
	s.pause()
	note("quietly")
	s.EndQuietly()
	assert.Equal(t, "quietly false 2", calls[5])
}

// plainHub shows every room at once.
type plainHub struct{ unwatched atomic.Int64 }

func (*plainHub) Load(context.Context, string) (func(), bool, error) { return func() {}, true, nil }
func (*plainHub) Watch(_ context.Context, _ string, _ hub.Sink, ready func(hub.View)) error {
	ready(hub.View{})
	return nil
}
func (*plainHub) WatchNow(string, hub.Sink, func(hub.View)) error { return nil }
func (*plainHub) Page(_ string, _ hub.Sink, _ hub.PageCursor, _ int, ready func(hub.Page)) bool {
	ready(hub.Page{})
	return true
}
func (h *plainHub) Unwatch(string, hub.Sink) bool { h.unwatched.Add(1); return true }

// A recheck holds updates back until the guard has answered, and its no ends the
// subscription.
func TestRecheck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var banned atomic.Bool
		rules := &guards.RuleSet{}
		rules.Add(guards.Pattern{Exact: "lobby"}, guards.Options{Guard: func(context.Context, guards.Member, string) (bool, error) {
			time.Sleep(time.Second)
			return !banned.Load(), nil
		}})
		calls := callbacks.New(t.Context(), callbacks.Config{})
		cache := guards.NewCache(guards.Config{Rules: rules, Calls: calls, GuardTimeout: time.Minute, JoinTimeout: time.Minute})
		cache.AddConn("c")
		h := &plainHub{}
		member := func(conn string) guards.MemberFunc {
			return func() (guards.Member, uint64) { return guards.Member{ID: conn}, 1 }
		}
		a := New(Config{
			Hub: h, Rules: rules, Cache: cache, Context: t.Context(), Member: member, Before: func() {}, Limit: time.Second,
			InRoom:      func(string) []*local.Conn { return nil },
			CheckViewer: func(string) error { return nil },
			ToError:     func(_ context.Context, err error) error { return err },
			EarlyLimit:  func(string) time.Duration { return time.Second },
			Joins: guards.NewJoins(guards.JoinConfig{
				Cache: cache, Rules: rules, Context: t.Context(), Member: member, OnTakenOut: func(string, string) {},
				Conn:    func(string) (*local.Conn, bool) { return nil, false },
				ToError: func(_ context.Context, err error) error { return err },
			}),
		})
		s, out := newSubscription(-1)
		got := func() (now record) {
			s.Exclusively(func() { now = *out })
			return now
		}
		require.NoError(t, a.Watch(t.Context(), s))
		require.Equal(t, 1, got().snapshots)
		require.Equal(t, 1, a.Count("lobby"))
		require.ErrorIs(t, a.Check(t.Context(), "", "hall"), errs.NotTracked)

		a.RecheckRoom("lobby")
		s.Deliver(update("a"))
		require.Empty(t, got().updates, "the guard has not answered")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.Equal(t, []string{"a"}, got().updates)

		banned.Store(true)
		a.RecheckViewers("lobby")
		s.Deliver(update("b"))
		time.Sleep(2 * time.Second)
		synctest.Wait()
		require.Equal(t, []string{"a"}, got().updates)
		require.Equal(t, []error{errs.Refused}, got().ended)
		require.Zero(t, a.Count("lobby"))
		require.EqualValues(t, 1, h.unwatched.Load())
		require.ErrorIs(t, a.Check(t.Context(), "c", "lobby"), errs.Refused)

		a.Close()
		next, _ := newSubscription(-1)
		require.ErrorIs(t, a.Watch(t.Context(), next), errs.Closed)
		require.NoError(t, calls.Close(t.Context()))
	})
}
