package hub

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/wire"
)

const room = "lobby"

// fakeListener confirms every subscription a moment later, unless it is silent.
type fakeListener struct {
	hub *Hub

	mu      sync.Mutex
	silent  bool
	rooms   map[string]bool
	added   int
	removed int
}

func (l *fakeListener) Add(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.added++
	l.rooms[room] = true
	if !l.silent {
		time.AfterFunc(time.Millisecond, func() { l.hub.HandleSubscribed(room, false) })
	}
}

func (l *fakeListener) Remove(room string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removed++
	delete(l.rooms, room)
}

// harness is a hub with its fake surroundings.
type harness struct {
	t        *testing.T
	redis    *fakeRedis
	listener *fakeListener
	hub      *Hub
}

// inBubble runs a test in a synctest bubble with a started hub.
func inBubble(t *testing.T, test func(*testing.T, *harness), setup ...func(*Config)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := &harness{t: t, redis: newFakeRedis(), listener: &fakeListener{rooms: make(map[string]bool)}}
		cfg := Config{Store: h.redis, Listener: h.listener}
		for _, set := range setup {
			set(&cfg)
		}
		h.hub = New(cfg)
		h.listener.hub = h.hub
		h.hub.Start()
		defer h.hub.Stop()
		test(t, h)
	})
}

// send hands messages to the hub in the given order.
func (h *harness) send(messages ...string) {
	for _, m := range messages {
		if m != "" {
			h.hub.HandleEvent(room, m)
		}
	}
}

// watch adds a sink and returns it with its view.
func (h *harness) watch() *fakeSink {
	h.t.Helper()
	return h.watchRoom(room)
}

func (h *harness) watchRoom(name string) *fakeSink {
	h.t.Helper()
	s := newFakeSink(h.t, name)
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*time.Second)
	defer cancel()
	require.NoError(h.t, h.hub.Watch(ctx, name, s, s.ready))
	return s
}

// watchLossOfB watches a room in which Redis has lost the members a and b. Only a has been
// written again, so b is unconfirmed.
func (h *harness) watchLossOfB() *fakeSink {
	h.t.Helper()
	h.redis.join(room, "a")
	h.redis.join(room, "b")
	s := h.watch()
	h.redis.wipe(room, nil)
	h.send(h.redis.join(room, "a"))
	return s
}

// sleep sleeps and then waits until all goroutines block.
func (h *harness) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// snapshots returns the number of snapshots that were read.
func (h *harness) snapshots() int {
	n, _, _ := h.redis.calls()
	return n
}

// checkSink checks that a sink knows the true members and states.
func (h *harness) checkSink(s *fakeSink) {
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

// fakeSink applies the updates that it gets and checks that they are consistent.
type fakeSink struct {
	t    *testing.T
	room string

	mu      sync.Mutex
	view    View
	views   int
	present map[string]bool
	state   map[string]string
	seq     map[string]uint64 // by epoch
	lines   []string
	updates []*wire.Update
}

func newFakeSink(t *testing.T, room string) *fakeSink {
	return &fakeSink{t: t, room: room, state: map[string]string{}, present: map[string]bool{}, seq: map[string]uint64{}}
}

func (s *fakeSink) ready(v View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view = v
	s.views++
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
	assert.Positive(s.t, s.views, "an update before the view")
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
		assert.True(s.t, s.present[u.ConnectionID], "state of %s, which is absent", u.ConnectionID)
		delete(s.state, u.ConnectionID)
		if u.State != nil {
			s.state[u.ConnectionID] = string(u.State)
		}
		line += " " + string(u.State)
	}
	if u.Repair {
		line += " repair"
	}
	s.lines = append(s.lines, strings.Join(strings.Fields(line), " "))
	s.updates = append(s.updates, u)
}

// takeLines returns the updates since the last call, as text.
func (s *fakeSink) takeLines() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	lines := s.lines
	s.lines = nil
	return lines
}

// ids returns the ids of the view's members.
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
