package hub

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const room = "lobby"

// fakeListener confirms every subscription a moment later, unless it is deaf.
type fakeListener struct {
	hub *Hub

	mu      sync.Mutex
	deaf    bool
	rooms   map[string]bool
	added   int
	removed int
}

func (l *fakeListener) Add(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.added++
	l.rooms[room] = true
	if !l.deaf {
		time.AfterFunc(time.Millisecond, func() { l.hub.HandleSubscribed(room, false) })
	}
}

func (l *fakeListener) Remove(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removed++
	delete(l.rooms, room)
}

// house is a hub with all that is around it.
type house struct {
	t        *testing.T
	redis    *fakeRedis
	listener *fakeListener
	hub      *Hub
}

// live runs a test in a bubble, with a hub that has been started.
func live(t *testing.T, test func(*testing.T, *house)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &house{t: t, redis: newFakeRedis(), listener: &fakeListener{rooms: make(map[string]bool)}}
		h.hub = New(Config{Store: h.redis, Listener: h.listener})
		h.listener.hub = h.hub
		h.hub.Start()
		defer h.hub.Stop()
		test(t, h)
	})
}

// send hands messages to the hub in the order given.
func (h *house) send(messages ...string) {
	for _, m := range messages {
		if m != "" {
			h.hub.HandleEvent(room, m)
		}
	}
}

// watch adds a sink and returns it with its view.
func (h *house) watch() *fakeSink {
	h.t.Helper()
	return h.watchRoom(room)
}

func (h *house) watchRoom(name string) *fakeSink {
	h.t.Helper()
	s := &fakeSink{t: h.t, room: name, state: map[string]string{}, present: map[string]bool{}, seq: map[string]uint64{}}
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*time.Second)
	defer cancel()
	require.NoError(h.t, h.hub.Watch(ctx, name, s, s.ready))
	return s
}

// pass lets time go by.
func (h *house) pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// snapshots returns how many were taken.
func (h *house) snapshots() int {
	n, _, _ := h.redis.calls()
	return n
}

// agree checks that a sink has been told what is true.
func (h *house) agree(s *fakeSink) {
	h.t.Helper()
	truth := h.redis.copy(s.room)
	s.mu.Lock()
	defer s.mu.Unlock()
	assert.ElementsMatch(h.t, slices.Collect(maps.Keys(truth.members)), slices.Collect(maps.Keys(s.present)))
	for conn, rec := range truth.members {
		if !rec.StateSilent {
			assert.Equal(h.t, string(rec.State), s.state[conn], "state of %s", conn)
		}
	}
}

// fakeSink folds what it is told and checks that it makes sense.
type fakeSink struct {
	t    *testing.T
	room string

	mu      sync.Mutex
	view    View
	viewed  int
	present map[string]bool
	state   map[string]string
	seq     map[string]uint64 // by epoch
	told    []string
	updates []*wire.Update
}

func (s *fakeSink) ready(v View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view = v
	s.viewed++
	s.seq[v.Epoch] = v.Seq
	clear(s.present)
	clear(s.state)
	for _, m := range v.Members() {
		s.present[m.Conn] = true
		if m.State != nil {
			s.state[m.Conn] = string(m.State)
		}
	}
}

func (s *fakeSink) Deliver(u *wire.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	assert.Positive(s.t, s.viewed, "an update before the view")
	assert.Equal(s.t, s.room, u.RoomName)
	assert.Positive(s.t, u.Timestamp)
	assert.NotEmpty(s.t, u.Epoch)
	assert.GreaterOrEqual(s.t, u.Seq, s.seq[u.Epoch], "seq fell in epoch %s", u.Epoch)
	s.seq[u.Epoch] = u.Seq
	line := u.Type + " " + u.ConnectionID
	switch u.Type {
	case wire.UpdateJoin:
		assert.False(s.t, s.present[u.ConnectionID], "%s joined twice", u.ConnectionID)
		s.present[u.ConnectionID] = true
		line += " " + string(u.Metadata)
	case wire.UpdateLeave:
		assert.True(s.t, s.present[u.ConnectionID], "%s left twice", u.ConnectionID)
		delete(s.present, u.ConnectionID)
		delete(s.state, u.ConnectionID)
	case wire.UpdateState:
		assert.True(s.t, s.present[u.ConnectionID], "state of %s, who is absent", u.ConnectionID)
		delete(s.state, u.ConnectionID)
		if u.State != nil {
			s.state[u.ConnectionID] = string(u.State)
		}
		line += " " + string(u.State)
	}
	if u.Repair {
		line += " repair"
	}
	s.told = append(s.told, strings.Join(strings.Fields(line), " "))
	s.updates = append(s.updates, u)
}

// heard returns what was told since it was last asked.
func (s *fakeSink) heard() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	told := s.told
	s.told = nil
	return told
}

// ids returns who was in the view.
func (s *fakeSink) ids() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var ids []string
	for _, m := range s.view.Members() {
		ids = append(ids, m.Conn)
	}
	slices.Sort(ids)
	return ids
}

func TestFirstWatcherReadsFurtherOnesDoNot(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.join(room, "a", withState(`{"x":1}`, false))
		h.redis.join(room, "b", withState(`{"y":1}`, true))
		first := h.watch()
		assert.Equal(t, []string{"a", "b"}, first.ids())
		assert.False(t, first.view.Stale)
		assert.EqualValues(t, 2, first.view.Seq)
		assert.JSONEq(t, `[{"id":"a","metadata":{"n":"a"}},{"id":"b","metadata":{"n":"b"}}]`, text(first.view))
		assert.JSONEq(t, `{"a":{"x":1},"b":{"y":1}}`, string(first.view.States()))

		s, p, g := h.redis.calls()
		second := h.watch()
		s2, p2, g2 := h.redis.calls()
		assert.Equal(t, []int{s, p, g}, []int{s2, p2, g2}, "a further watcher costs Redis nothing")
		assert.Same(t, first.view.image, second.view.image)
		assert.Equal(t, 1, h.listener.added)

		// Watching twice is a new view, and no second delivery.
		require.NoError(t, h.hub.Watch(t.Context(), room, second, second.ready))
		h.send(h.redis.join(room, "c"))
		assert.Equal(t, []string{`join c {"n":"c"}`}, second.heard())
		assert.Equal(t, []string{`join c {"n":"c"}`}, first.heard())
		assert.Same(t, first.updates[0], second.updates[0], "one update for all")
		stats := h.hub.Stats()
		assert.Equal(t, 1, stats.Rooms)
		assert.Equal(t, 2, stats.Sinks)
		assert.EqualValues(t, 1, stats.Events[store.Joined])
		assert.Equal(t, map[Cause]uint64{CauseFirst: 1}, stats.Snapshots)
	})
}

func TestRoomThatRedisDoesNotKnow(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		s := h.watch()
		assert.Equal(t, View{image: s.view.image, Listing: Listing{Present: wire.Text{open, end}}}, s.view)
		assert.Equal(t, "[]", text(s.view))
		assert.Equal(t, "{}", string(s.view.States()))
		h.send(h.redis.join(room, "a"))
		assert.Equal(t, []string{`join a {"n":"a"}`}, s.heard())
		assert.EqualValues(t, 1, s.updates[0].Seq)
		h.pass(time.Minute)
		assert.Equal(t, 1, h.snapshots())
	})
}

func TestWatchFailsWhereRedisDoesNotAnswer(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.set(func(f *fakeRedis) { f.away = true })
		s := &fakeSink{t: t}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := h.hub.Watch(ctx, room, s, s.ready)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		assert.Zero(t, s.viewed)
		assert.False(t, h.hub.Unwatch(room, s))
		_, ok := h.hub.View(room)
		assert.False(t, ok)
		_, ok = h.hub.StaleView(room)
		assert.False(t, ok)
		h.pass(6 * time.Second)
		assert.Zero(t, h.hub.Stats().Rooms)
		assert.Equal(t, 1, h.listener.removed)

		// Redis is back while somebody waits.
		time.AfterFunc(500*time.Millisecond, func() { h.redis.set(func(f *fakeRedis) { f.away = false }) })
		h.redis.join(room, "a")
		assert.Equal(t, []string{"a"}, h.watch().ids())
	})
}

func TestUnwatchAndLinger(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		s, other := h.watch(), h.watch()
		assert.True(t, h.hub.Unwatch(room, s))
		assert.False(t, h.hub.Unwatch(room, s))
		h.send(h.redis.join(room, "a"))
		assert.Empty(t, s.heard())
		assert.Len(t, other.heard(), 1)
		assert.True(t, h.hub.Unwatch(room, other))

		h.pass(4 * time.Second)
		h.send(h.redis.join(room, "b"))
		before := h.snapshots()
		back := h.watch()
		assert.Equal(t, []string{"a", "b"}, back.ids())
		assert.Equal(t, before, h.snapshots(), "the mirror had lingered")

		h.pass(10 * time.Second)
		assert.Equal(t, 1, h.hub.Stats().Rooms)
		assert.True(t, h.hub.Unwatch(room, back))
		h.pass(6 * time.Second)
		assert.Zero(t, h.hub.Stats().Rooms)
		assert.Equal(t, 1, h.listener.removed)
		assert.Empty(t, h.listener.rooms)
		h.send(h.redis.join(room, "c")) // a straggler
		assert.EqualValues(t, 1, h.hub.Stats().Strays)
	})
}

func TestStop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		redis, listener := newFakeRedis(), &fakeListener{rooms: map[string]bool{}, deaf: true}
		h := New(Config{Store: redis, Listener: listener})
		h.Start()
		h.Start()
		s := &fakeSink{t: t}
		got := make(chan error)
		go func() { got <- h.Watch(t.Context(), room, s, s.ready) }()
		synctest.Wait()
		h.Stop()
		h.Stop()
		require.ErrorIs(t, <-got, ErrStopped)
		require.ErrorIs(t, h.Watch(t.Context(), room, s, s.ready), ErrStopped)
		h.HandleEvent(room, redis.join(room, "a"))
		h.HandleSubscribed(room, false)
		h.HandleLost()
		assert.Zero(t, s.viewed)
	})
}

func TestSnapshotsAreReadAFewAtATime(t *testing.T) {
	live(t, func(t *testing.T, h *house) {
		h.redis.set(func(f *fakeRedis) { f.delay = 50 * time.Millisecond })
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() { h.watchRoom(fmt.Sprintf("room %d", i)) })
		}
		wg.Wait()
		assert.Equal(t, 8, h.redis.mostReading)
		assert.Equal(t, 100, h.snapshots())
	})
}

// Rooms of buckets on a node that swallows everything are read in vain, again
// and again, and new ones are subscribed to all the time: rooms of the others
// are read at once, also while it is asked in vain which Redis this is.
func TestBucketsShareNoPlaces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const lost, buckets = 21, 64
		h := &house{t: t, redis: newFakeRedis(), listener: &fakeListener{rooms: make(map[string]bool)}}
		bucket := func(room string) (b int) {
			_, err := fmt.Sscanf(room, "%d", &b)
			assert.NoError(t, err)
			return b
		}
		h.redis.swallowed = func(room string) bool { return bucket(room) < lost }
		h.hub = New(Config{Store: h.redis, Listener: h.listener, Bucket: bucket})
		h.listener.hub = h.hub
		h.hub.Start()
		defer h.hub.Stop()
		h.watchRoom("63 first") // it is known which Redis this is
		h.redis.set(func(f *fakeRedis) { f.asking = 2 * time.Second })

		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 200 {
			wg.Go(func() {
				s := &fakeSink{t: t}
				assert.Error(t, h.hub.Watch(ctx, fmt.Sprintf("%d lost %d", i%lost, i), s, s.ready))
			})
		}
		h.pass(8*time.Second + 500*time.Millisecond)
		for i := range 200 {
			began := time.Now()
			h.watchRoom(fmt.Sprintf("%d room %d", lost+i%(buckets-lost), i))
			assert.Less(t, time.Since(began), 50*time.Millisecond)
			h.pass(25 * time.Millisecond)
		}
		h.redis.set(func(f *fakeRedis) {
			assert.Equal(t, fewPlaces*lost+1, f.mostReading)
			f.swallowed = nil
		})
		cancel()
		wg.Wait()
	})
}
