package hub

import (
	"context"
	"encoding/json"
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
	s := h.newSink()
	s.room = name
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

// checkSink checks that a sink knows the true members, with their users, metadata and
// states.
func (h *harness) checkSink(s *fakeSink) {
	h.t.Helper()
	truth := h.redis.copy(s.room)
	s.mu.Lock()
	defer s.mu.Unlock()
	assert.ElementsMatch(h.t, slices.Collect(maps.Keys(truth.members)), slices.Collect(maps.Keys(s.present)))
	assert.Len(h.t, s.plain, len(truth.members))
	for conn, rec := range truth.members {
		seen := s.present[conn]
		if seen == nil {
			continue
		}
		if !s.counts {
			rec.User = ""
		}
		assert.Equal(h.t, rec.User, seen.user, "user of %s", conn)
		assert.Equal(h.t, rec.Kept(), seen.kept, "place of %s", conn)
		assert.Equal(h.t, string(rec.Meta), seen.meta, "metadata of %s", conn)
		if !rec.StateSilent {
			assert.Equal(h.t, string(rec.State), seen.state, "state of %s", conn)
		}
	}
}

// seenMember is a member as a subscriber knows it.
type seenMember struct {
	user, meta, state string
	kept              bool
}

// fakeSink applies the updates that it gets and checks that they are consistent.
type fakeSink struct {
	t      *testing.T
	room   string
	counts bool // users are counted

	bounded bool // it does not know all members

	mu      sync.Mutex
	view    View
	views   int
	present map[string]*seenMember
	plain   map[string]bool   // the members of a subscriber of level 1
	seq     map[string]uint64 // by epoch
	lines   []string
	updates []*wire.Update

	repaired time.Time // of the last update that was part of a repair
	left     string    // the connection that left just before in this repair
	leaves   bool      // others have left in it
	replaced string    // the connection whose place the last join took; its leave is the next event
	joined   *wire.Update
}

// newSink returns a sink that watches nothing yet.
func (h *harness) newSink() *fakeSink {
	return &fakeSink{
		t: h.t, room: room, counts: h.hub.cfg.CountUsers, present: map[string]*seenMember{}, plain: map[string]bool{}, seq: map[string]uint64{},
	}
}

func (s *fakeSink) ready(v View) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.view = v
	s.views++
	s.seq[v.Epoch] = v.Seq
	clear(s.present)
	clear(s.plain)
	for _, m := range v.Members() {
		s.present[m.Conn] = &seenMember{m.User, string(m.Meta()), string(m.State), m.Disconnected()}
		s.plain[m.Conn] = true
	}
	s.bounded = s.bounded || v.Bounded
	if !s.bounded {
		assert.Equal(s.t, v.Total, len(s.present))
		assert.Equal(s.t, s.numbers().Users, v.Users)
	}
	assert.True(s.t, json.Valid(v.Present.Append(nil)), "%s", v.Present.Append(nil))
}

// numbers counts the members that the sink knows.
func (s *fakeSink) numbers() wire.Numbers {
	n := wire.Numbers{Connections: wire.CountOf(len(s.present))}
	if s.counts {
		users, alone := map[string]bool{}, 0
		for _, m := range s.present {
			if m.user == "" {
				alone++
			} else {
				users[m.user] = true
			}
		}
		n.Users = wire.CountOf(alone + len(users))
	}
	return n
}

// connections counts the connections of a user that the sink knows.
func (s *fakeSink) connections(user string) (n int) {
	for _, m := range s.present {
		if user != "" && m.user == user {
			n++
		}
	}
	return n
}

func (s *fakeSink) Deliver(u *wire.Update) {
	s.mu.Lock()
	defer s.mu.Unlock()
	assert.Positive(s.t, s.views, "an update before the view")
	assert.Equal(s.t, s.room, u.RoomName)
	assert.Positive(s.t, u.Timestamp)
	assert.NotEmpty(s.t, u.Epoch)
	assert.GreaterOrEqual(s.t, u.Seq, s.seq[u.Epoch], "seq fell in epoch %s", u.Epoch)
	assert.True(s.t, s.counts || u.UserID == "", "a user although users are not counted")
	s.seq[u.Epoch] = u.Seq
	s.checkOrder(u)
	before := s.connections(u.UserID)
	s.lines = append(s.lines, s.apply(u))
	s.updates = append(s.updates, u)
	// Repairs included, the numbers are those of the members as they are now.
	if !s.bounded {
		assert.Equal(s.t, s.numbers(), u.Numbers, "%s", u.Frame().Bytes())
		assert.Equal(s.t, s.connections(u.UserID), u.UserConnections, "%s", u.Frame().Bytes())
	}
	if u.UserID != "" && u.Type == wire.UpdateJoin {
		assert.Equal(s.t, before == 0, u.UserConnections == 1, "1 means that the user arrived")
	}
	if u.UserID != "" && u.Type == wire.UpdateLeave {
		assert.Equal(s.t, before == 1, u.UserConnections == 0, "0 means that the user left")
	}
	s.applyPlain(u)
}

// apply applies an update and returns it as text.
func (s *fakeSink) apply(u *wire.Update) string {
	line := []string{u.Type, u.ConnectionID}
	member := s.present[u.ConnectionID]
	if u.Type == wire.UpdateJoin {
		assert.Nil(s.t, member, "%s joined twice", u.ConnectionID)
		member = &seenMember{user: u.UserID, meta: string(u.Metadata)}
		s.present[u.ConnectionID] = member
		line = append(line, string(u.Metadata))
	}
	if !assert.NotNil(s.t, member, "%s of %s, which is absent", u.Type, u.ConnectionID) {
		return strings.Join(line, " ")
	}
	switch u.Type {
	case wire.UpdateLeave:
		delete(s.present, u.ConnectionID)
		assert.Equal(s.t, member.meta, string(u.Metadata), "the last metadata of %s", u.ConnectionID)
		assert.NotEmpty(s.t, u.Reason)
	case wire.UpdateState:
		assert.False(s.t, member.kept && u.State != nil, "state of %s, whose place is kept", u.ConnectionID)
		member.state = string(u.State)
		line = append(line, string(u.State))
	case wire.UpdateMetadata:
		assert.True(s.t, member.meta != string(u.Metadata) || u.NewUser, "the same metadata of %s again", u.ConnectionID)
		assert.Equal(s.t, u.NewUser, member.user == "" && u.UserID != "")
		member.meta = string(u.Metadata)
		if u.NewUser {
			member.user = u.UserID
		}
		line = append(line, string(u.Metadata))
	case wire.UpdateDisconnect:
		assert.False(s.t, member.kept, "%s disconnected twice", u.ConnectionID)
		assert.Empty(s.t, member.state, "null comes before the disconnect of %s", u.ConnectionID)
		assert.NotEmpty(s.t, u.Reason)
		member.kept = true
		line = append(line, u.Reason)
	case wire.UpdateReconnect:
		assert.True(s.t, member.kept, "%s reconnected, which was connected", u.ConnectionID)
		member.kept = false
	}
	assert.Equal(s.t, member.user, u.UserID)
	if u.UserID != "" && (u.Type == wire.UpdateJoin || u.Type == wire.UpdateLeave || u.NewUser) {
		line = append(line, u.UserID, fmt.Sprint(u.UserConnections))
	}
	if u.UserID != "" && u.Type == wire.UpdateLeave {
		line = append(line, u.Reason)
	}
	if u.Replaces != "" {
		line = append(line, "replaces", u.Replaces)
	}
	if u.Repair {
		line = append(line, "repair")
	}
	return strings.Join(strings.Fields(strings.Join(line, " ")), " ")
}

// applyPlain applies an update as a client of level 1 does, which gets no other types.
func (s *fakeSink) applyPlain(u *wire.Update) {
	if u.Level() > 1 {
		return
	}
	present := s.plain[u.ConnectionID]
	switch u.Type {
	case wire.UpdateJoin:
		assert.False(s.t, present, "level 1: %s joined twice", u.ConnectionID)
		s.plain[u.ConnectionID] = true
	case wire.UpdateLeave:
		assert.True(s.t, present, "level 1: %s left twice", u.ConnectionID)
		delete(s.plain, u.ConnectionID)
	case wire.UpdateState:
		assert.True(s.t, present, "level 1: state of %s, which is absent", u.ConnectionID)
	default:
		assert.Fail(s.t, "unknown type", u.Type)
	}
	if !s.bounded {
		assert.Equal(s.t, wire.CountOf(len(s.plain)), u.Connections, "level 1")
	}
}

// checkOrder checks that the joins of a repair come before its leaves, except for a
// connection that leaves and joins as another user, and that the leave of a connection
// whose place was taken follows.
func (s *fakeSink) checkOrder(u *wire.Update) {
	if now := time.Now(); !u.Repair || !now.Equal(s.repaired) { // no two repairs are made in the same instant
		s.left, s.leaves, s.repaired = "", false, now
	}
	switch {
	case !u.Repair:
	case u.Type == wire.UpdateJoin:
		assert.False(s.t, s.leaves || s.left != "" && s.left != u.ConnectionID, "repair: %s joined after another had left", u.ConnectionID)
		s.left = ""
	case u.Type == wire.UpdateLeave:
		s.left, s.leaves = u.ConnectionID, s.leaves || s.left != ""
	}
	if s.replaced != "" && !u.Repair && u.Epoch == s.joined.Epoch && u.Seq == s.joined.Seq+1 {
		assert.Equal(s.t, "leave "+s.replaced+" "+wire.ReasonReplaced, u.Type+" "+u.ConnectionID+" "+u.Reason)
	}
	if u.Type != wire.UpdateState {
		s.replaced = ""
	}
	if u.Replaces != "" && s.present[u.Replaces] != nil {
		s.replaced, s.joined = u.Replaces, u
	}
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
