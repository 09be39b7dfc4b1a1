package watch

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/guards"
	"github.com/meshpresence/mesh/internal/occupancy"
	"github.com/meshpresence/mesh/internal/store"
)

// numbersRig is Access over occupancy.Rooms, whose store and channels belong to the test.
// The rooms "r0", "r1" … are tracked.
type numbersRig struct {
	*testing.T
	*Access
	rooms *occupancy.Rooms
	guard atomic.Pointer[guards.Func] // nil: allows
	meta  atomic.Uint64               // version of the metadata of every connection
	cache *guards.Cache
	rules *guards.RuleSet

	mu      sync.Mutex // guards the fields below
	numbers map[string]int
	seq     uint64
	slow    time.Duration // of a reading
	added   map[string]int
}

func (r *numbersRig) Occupancy(_ context.Context, rooms ...string) ([]store.Occupancy, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.slow > 0 {
		r.mu.Unlock()
		time.Sleep(r.slow)
		r.mu.Lock()
	}
	list := make([]store.Occupancy, len(rooms))
	for i, room := range rooms {
		list[i].Position = store.Position{Epoch: "e", Seq: r.seq}
		list[i].Connections, list[i].Users = r.numbers[room], r.numbers[room]
	}
	return list, nil
}

// set changes the numbers of a room.
func (r *numbersRig) set(room string, n int) {
	r.mu.Lock()
	r.numbers[room] = n
	r.seq++
	r.mu.Unlock()
	r.rooms.HandleEvent(room, "")
}

// Add implements occupancy.Listener. It confirms the subscription a moment later.
func (r *numbersRig) Add(room string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.added[room]++
	go r.rooms.HandleSubscribed(room, false)
}

func (r *numbersRig) Remove(room string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.added[room]--; r.added[room] == 0 {
		delete(r.added, room)
	}
}

// numbersLog is an output that keeps what it gets.
type numbersLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *numbersLog) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *numbersLog) Update(u *occupancy.Update)   { l.add("%s %d", u.Room, u.Connections) }
func (l *numbersLog) Ended(room string, err error) { l.add("%s ended: %v", room, err) }
func (l *numbersLog) answered(results ...OccupancyResult) {
	for _, r := range results {
		if r.Err != nil {
			l.add("%s refused: %v", r.Room, r.Err)
			continue
		}
		l.add("%s = %d", r.Room, r.Update.Connections)
	}
}

// take returns the lines since the last call, when nothing moves any more.
func (l *numbersLog) take() []string {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	lines := l.lines
	l.lines = nil
	return lines
}

// inNumbersRig runs a test in a synctest bubble.
func inNumbersRig(t *testing.T, test func(r *numbersRig)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &numbersRig{T: t, numbers: map[string]int{}, added: map[string]int{}, rules: &guards.RuleSet{}}
		calls := callbacks.New(t.Context(), callbacks.Config{})
		r.cache = guards.NewCache(guards.Config{Rules: r.rules, Calls: calls, GuardTimeout: 5 * time.Second, JoinTimeout: time.Second})
		r.cache.AddConn("c")
		wheel := clock.NewWheel(50 * time.Millisecond)
		r.rooms = occupancy.New(occupancy.Config{Store: r, Listener: r, Wheel: wheel})
		wheel.Start()
		for i := range 100 {
			r.track(fmt.Sprint("r", i))
		}
		member := func(conn string) guards.MemberFunc {
			return func() (guards.Member, uint64) { return guards.Member{ID: conn}, r.meta.Load() + 1 }
		}
		r.Access = New(Config{
			Hub: &plainHub{}, Numbers: r.rooms, Rules: r.rules, Cache: r.cache, Context: t.Context(), Member: member, Before: func() {},
			CheckViewer: func(string) error { return nil },
			ToError:     func(_ context.Context, err error) error { return err },
			EarlyLimit:  func(string) time.Duration { return 2 * time.Second },
		})
		t.Cleanup(func() {
			r.Close()
			require.Empty(t, r.counted.byViewer)
			require.Empty(t, r.counted.byRoom)
			require.Zero(t, r.rooms.Stats().Watches)
			r.rooms.Stop()
			wheel.Stop()
			require.NoError(t, calls.Close(context.Background()))
		})
		test(r)
	})
}

// track adds a rule whose guard is r.guard.
func (r *numbersRig) track(room string) {
	r.rules.Add(guards.Pattern{Exact: room}, guards.Options{Guard: func(ctx context.Context, m guards.Member, room string) (bool, error) {
		if guard := r.guard.Load(); guard != nil {
			return (*guard)(ctx, m, room)
		}
		return true, nil
	}})
}

// guardIs sets the guard.
func (r *numbersRig) guardIs(guard guards.Func) { r.guard.Store(&guard) }

// subscription returns a subscription without rooms.
func (r *numbersRig) subscription(viewer string) (*OccupancySubscription, *numbersLog) {
	out := &numbersLog{}
	return &OccupancySubscription{Viewer: viewer, Out: out}, out
}

// subscribe subscribes to rooms, and returns the results.
func (r *numbersRig) subscribe(s *OccupancySubscription, rooms ...string) []string {
	r.Helper()
	out := s.Out.(*numbersLog)
	require.NoError(r, r.SubscribeOccupancy(r.Context(), s, rooms, func(results []OccupancyResult) { out.answered(results...) }))
	return out.take()
}

func TestOccupancySubscription(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		r.set("r1", 3)
		s, out := r.subscription("c")
		require.Equal(t, []string{"r0 = 0", "r1 = 3"}, r.subscribe(s, "r0", "r1"))
		require.Equal(t, 2, s.Rooms())
		require.Equal(t, 3, s.With([]string{"r1", "r2"}))
		require.True(t, s.Has("r0"))
		require.ElementsMatch(t, []string{"r0", "r1"}, r.Rooms())

		r.set("r0", 1)
		time.Sleep(20 * time.Millisecond)
		require.Equal(t, []string{"r0 1"}, out.take(), "the first member shows at once")
		require.Equal(t, []string{"r1 = 3", "x refused: " + guards.NotTracked("x").Error()}, r.subscribe(s, "r1", "x"))
		require.Equal(t, 2, s.Rooms())

		require.Equal(t, 1, r.UnsubscribeOccupancy(s, "r0", "x"))
		r.set("r0", 2)
		r.set("r1", 4)
		time.Sleep(2 * time.Second)
		require.Equal(t, []string{"r1 4"}, out.take())
		require.Equal(t, 1, r.rooms.Stats().Watches)

		r.CloseOccupancy(s, nil)
		require.Empty(t, out.take())
		require.Empty(t, r.Rooms())
		time.Sleep(6 * time.Second)
		r.mu.Lock()
		defer r.mu.Unlock()
		require.Empty(t, r.added, "channels are left")
	})
}

// Nothing of a room reaches a viewer while its guard is asked, and the last numbers follow
// the yes.
func TestOccupancyIsHeldBackWhileAGuardIsAsked(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		s, out := r.subscription("c")
		r.subscribe(s, "r0", "r1")
		var allowed atomic.Bool
		allowed.Store(true)
		r.guardIs(func(_ context.Context, _ guards.Member, room string) (bool, error) {
			time.Sleep(3 * time.Second)
			return allowed.Load() || room == "r1", nil
		})
		r.RecheckViewers("r0")
		r.set("r0", 1)
		time.Sleep(1100 * time.Millisecond)
		r.set("r0", 2)
		time.Sleep(1500 * time.Millisecond)
		require.Empty(t, out.take())
		time.Sleep(time.Second)
		require.Equal(t, []string{"r0 2"}, out.take(), "only the last numbers")

		allowed.Store(false)
		r.meta.Add(1)
		r.RecheckViewer("c")
		r.set("r0", 3)
		r.set("r1", 3)
		time.Sleep(4 * time.Second)
		got := out.take()
		slices.Sort(got)
		require.Equal(t, []string{"r0 ended: mesh: refused", "r1 3"}, got)
		require.Equal(t, 1, s.Rooms())
		require.Equal(t, []string{"r0 refused: mesh: refused"}, r.subscribe(s, "r0"))
	})
}

// A change that comes while the numbers are read is noticed before the answer.
func TestOccupancyOfAViewerThatChanges(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		r.slow = 200 * time.Millisecond
		var banned atomic.Bool
		r.guardIs(func(context.Context, guards.Member, string) (bool, error) { return !banned.Load(), nil })
		s, out := r.subscription("c")
		time.AfterFunc(100*time.Millisecond, func() {
			banned.Store(true)
			r.meta.Add(1)
			r.RecheckViewer("c")
		})
		require.Equal(t, []string{"r0 refused: mesh: refused"}, r.subscribe(s, "r0"))
		r.set("r0", 1)
		time.Sleep(2 * time.Second)
		require.Empty(t, out.take())
		require.Zero(t, r.rooms.Stats().Watches)

		// A connection that changes all the time has no lasting answer.
		banned.Store(false)
		r.guardIs(func(context.Context, guards.Member, string) (bool, error) {
			r.meta.Add(1)
			go r.RecheckViewer("c")
			return true, nil
		})
		began := time.Now()
		got := r.subscribe(s, "r0")
		require.Len(t, got, 1)
		require.Contains(t, got[0], "r0 refused: mesh: refused")
		require.Less(t, time.Since(began), 20*time.Second)
	})
}

// The end of a connection ends a subscription that has just begun, too.
func TestOccupancyOfAConnectionThatEnds(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		for _, after := range []time.Duration{0, time.Millisecond, 50 * time.Millisecond} {
			r.slow = 100 * time.Millisecond
			r.guardIs(func(context.Context, guards.Member, string) (bool, error) {
				time.Sleep(50 * time.Millisecond)
				return true, nil
			})
			r.meta.Add(1)
			s, out := r.subscription("c")
			time.AfterFunc(after, func() { r.Forget("c") })
			room := fmt.Sprint("r", after.Milliseconds())
			for _, line := range r.subscribe(s, room) {
				require.Contains(t, line, "mesh: closed", "after %v", after)
			}
			r.set(room, 1)
			time.Sleep(2 * time.Second)
			require.Empty(t, out.take())
			require.Zero(t, s.Rooms())
			require.Zero(t, r.rooms.Stats().Watches)
		}
		s, out := r.subscription("c")
		r.subscribe(s, "r0")
		r.Forget("c")
		require.Equal(t, []string{"r0 ended: mesh: closed"}, out.take())
		r.Close()
		require.ErrorIs(t, r.SubscribeOccupancy(t.Context(), s, []string{"r0"}, func([]OccupancyResult) {}), errs.Closed)
	})
}

// Guards of many rooms are asked some at a time, and one that hangs delays only those of
// its place.
func TestOccupancyOfManyRooms(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		var now, most atomic.Int64
		r.guardIs(func(_ context.Context, _ guards.Member, room string) (bool, error) {
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			defer now.Add(-1)
			time.Sleep(100 * time.Millisecond)
			return room != "r7", nil
		})
		var rooms []string
		for i := range 100 {
			rooms = append(rooms, fmt.Sprint("r", i))
		}
		s, out := r.subscription("c")
		require.Len(t, r.subscribe(s, rooms...), 100)
		require.Equal(t, 99, s.Rooms())
		require.EqualValues(t, maxAsking, most.Load())
		most.Store(0)
		r.meta.Add(1)
		r.RecheckViewer("c")
		for i := range 100 {
			r.set(fmt.Sprint("r", i), 1)
		}
		time.Sleep(3 * time.Second)
		require.Len(t, out.take(), 99)
		require.EqualValues(t, maxAsking, most.Load())
		require.Zero(t, s.workers)
	})
}

// The rooms of the app itself end if they are not tracked any more.
func TestOccupancyOfTheApp(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		r.guardIs(func(context.Context, guards.Member, string) (bool, error) { return false, nil })
		s, out := r.subscription("")
		require.Equal(t, []string{"r0 = 0", "r1 = 0"}, r.subscribe(s, "r0", "r1"))
		r.RecheckAll()
		require.Empty(t, out.take())
		r.rules.Remove(guards.Pattern{Exact: "r1"})
		r.RecheckRooms([]string{"r0", "r1"})
		require.Equal(t, []string{"r1 ended: " + guards.NotTracked("r1").Error()}, out.take())
		r.set("r0", 5)
		time.Sleep(2 * time.Second)
		require.Equal(t, []string{"r0 5"}, out.take())
	})
}

// A room may be subscribed to again at the moment at which a guard ends it.
func TestOccupancyIsSubscribedToAgain(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		s, out := r.subscription("c")
		for i := range 30 {
			r.guardIs(func(context.Context, guards.Member, string) (bool, error) { return true, nil })
			r.meta.Add(1)
			r.subscribe(s, "r0")
			r.guardIs(func(context.Context, guards.Member, string) (bool, error) { return i%2 == 0, nil })
			r.meta.Add(1)
			r.RecheckViewer("c")
			got := r.subscribe(s, "r0") // not after the recheck
			require.NotEmpty(t, got)
			require.Equal(t, i%2 == 0, s.Has("r0"), "%v", got)
			r.set("r0", i+1)
			time.Sleep(2 * time.Second)
			want := []string{fmt.Sprint("r0 ", i+1)}
			if i%2 == 1 {
				want = nil
			}
			require.Equal(t, want, out.take())
		}
	})
}

// Numbers that come after they were read for the answer follow the answer.
func TestOccupancyThatChangesBeforeTheAnswer(t *testing.T) {
	inNumbersRig(t, func(r *numbersRig) {
		r.slow = 200 * time.Millisecond
		r.guardIs(func(context.Context, guards.Member, string) (bool, error) {
			time.Sleep(2 * time.Second)
			return true, nil
		})
		time.AfterFunc(2100*time.Millisecond, func() { // while the numbers are read
			r.meta.Add(1)
			r.RecheckViewer("c")
		})
		time.AfterFunc(2500*time.Millisecond, func() { r.set("r0", 1) }) // while the guard is asked again
		s, out := r.subscription("c")
		require.Equal(t, []string{"r0 = 0", "r0 1"}, r.subscribe(s, "r0"))
		time.Sleep(2 * time.Second)
		require.Empty(t, out.take())
	})
}
