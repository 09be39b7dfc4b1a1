package mesh

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// counted are guards that count how often they were asked about each room.
type counted struct{ rooms sync.Map }

func (c *counted) guard(_ context.Context, _ Member, room string) (bool, error) {
	n, _ := c.rooms.LoadOrStore(room, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
	return true, nil
}

func (c *counted) of(room string) int64 {
	n, ok := c.rooms.Load(room)
	if !ok {
		return 0
	}
	return n.(*atomic.Int64).Load()
}

// A rule that is added, replaced or removed has the guards asked again in the
// rooms that it is about, and nowhere else.
func TestRulesAreAskedAboutTheirRoomsOnly(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server()
		var asked counted
		s.track("^room", PresenceOptions{Guard: asked.guard})
		p := s.dial()
		for i := range 5 {
			p.join(fmt.Sprint("room", i))
			p.subscribe(fmt.Sprint("room", i))
		}
		want := map[string]int64{"room0": 1, "room1": 1, "room2": 1, "room3": 1, "room4": 1}
		check := func(what string) {
			t.Helper()
			w.sleep(200 * time.Millisecond)
			for room, n := range want {
				assert.Equal(t, "true", p.state(room, map[string]any{"x": 1}))
				assert.Equal(t, n, asked.of(room), "%s, %s", what, room)
			}
		}
		check("at first")
		for i := range 1000 {
			require.NoError(t, s.TrackPresence(Exact(fmt.Sprint("other", i)), PresenceOptions{Guard: asked.guard}))
		}
		s.track("^other", PresenceOptions{Guard: asked.guard})
		check("rules about other rooms")

		require.NoError(t, s.TrackPresence(Exact("room3"), PresenceOptions{}))
		want["room3"]++
		check("a name")
		s.track("^room[12]$", PresenceOptions{})
		want["room1"]++
		want["room2"]++
		check("a pattern")
		s.track("^room[12]$", PresenceOptions{TTL: time.Minute})
		want["room1"]++
		want["room2"]++
		check("a pattern again")
		require.True(t, s.UntrackPresence(Exact("room3")))
		want["room3"]++
		check("without the name")
		require.True(t, s.UntrackPresence(Regexp(regexp.MustCompile("^room[12]$"))))
		want["room1"]++
		want["room2"]++
		check("without the pattern")
		for i := range 1000 {
			require.True(t, s.UntrackPresence(Exact(fmt.Sprint("other", i))))
		}
		check("without rules about other rooms")
	})
}

func TestUntrackPresence(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.server()
		all := Regexp(mustCompile("^room"))
		require.False(t, s.UntrackPresence(all))
		require.False(t, s.UntrackPresence(Pattern{}))
		require.NoError(t, s.TrackPresence(all, PresenceOptions{TTL: time.Minute}))
		require.NoError(t, s.TrackPresence(Exact("room2"), PresenceOptions{}))
		p, watcher := s.dial(), s.dial()
		for _, room := range []string{"room1", "room2"} {
			p.join(room)
			watcher.subscribe(room)
		}
		require.Equal(t, "true", p.state("room1", map[string]any{"x": 1}))
		ended := make(chan error, 1)
		first := make(chan struct{})
		go func() { // ends with the subscription
			var last error
			for e, err := range s.Presence().Subscribe(t.Context(), "room1", SubscribeOptions{}) {
				if e.Type == EventSnapshot {
					close(first)
				}
				last = err
			}
			ended <- last
		}()
		<-first

		key := w.keys().Conn("room1", p.id)
		require.Positive(t, w.client().PTTL(t.Context(), key).Val())
		require.True(t, s.Presence().UntrackPresence(Regexp(mustCompile("^room"))), "another value of the same expression")
		require.False(t, s.UntrackPresence(all))
		require.ErrorIs(t, <-ended, ErrNotTracked)
		w.eventually(w.unhurried(time.Second), func() bool { return watcher.endedRoom("room1") }, "the client is told")
		assert.False(t, watcher.endedRoom("room2"), "the name's rule stands")
		w.eventually(w.unhurried(2*time.Second), func() bool { return w.client().Exists(t.Context(), key).Val() == 0 }, "there is no TTL any more")

		ids, err := s.Rooms().Members(t.Context(), "room1")
		require.NoError(t, err)
		assert.Equal(t, []string{p.id}, ids, "members stay")
		assert.Equal(t, "false", p.state("room1", map[string]any{"x": 2}))
		assert.False(t, watcher.room("mesh/subscribe-presence", "room1").Success)
		assert.False(t, watcher.room("mesh/get-presence-state", "room1").Success)
		members, err := s.Presence().Members(t.Context(), "room1")
		require.NoError(t, err)
		assert.JSONEq(t, `{"x":1}`, string(members[0].State), "the state stays")
		assert.Equal(t, "true", p.state("room2", map[string]any{"x": 1}))
		w.eventually(w.unhurried(time.Second), func() bool { return watcher.count("state", p.id) == 2 }, "room2 goes on")

		require.NoError(t, s.TrackPresence(all, PresenceOptions{TTL: time.Minute}))
		w.eventually(w.unhurried(2*time.Second), func() bool { return w.client().Exists(t.Context(), key).Val() == 1 }, "and now there is one")
		assert.Equal(t, []string{p.id}, watcher.subscribe("room1").ids(t))
		require.True(t, s.UntrackPresence(Exact("room2")))
		assert.Equal(t, "true", p.state("room2", map[string]any{"x": 3}), "the pattern decides now")
		assert.False(t, watcher.endedRoom("room2"))
	})
}

// endedRoom reports whether the peer was told that its subscription to a room ended.
func (p *peer) endedRoom(room string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.pushes {
		if f.Command == "mesh/presence-ended" && string(f.Payload) == fmt.Sprintf(`{"roomName":%q}`, room) {
			return true
		}
	}
	return false
}

// However rules come and go while clients join, subscribe and leave: in the end
// each room's subscriptions and entries are as its rules say.
func TestRulesChangeUnderLoad(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(noCommandLimit)
		pattern, name := Regexp(mustCompile("^r")), Exact("r1")
		var work sync.WaitGroup
		var peers []*peer
		for range 4 {
			p := s.dial()
			peers = append(peers, p)
			work.Go(func() {
				for i := range 100 {
					room := fmt.Sprint("r", i%3)
					for _, command := range []string{"join-room", "subscribe-presence", "leave-room", "join-room"} {
						p.call("mesh/"+command, inRoomPayload(room))
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		work.Go(func() {
			for range 50 {
				assert.NoError(t, errors.Join(s.TrackPresence(pattern, PresenceOptions{TTL: 20 * time.Second}), s.TrackPresence(name, PresenceOptions{})))
				time.Sleep(time.Millisecond)
				s.UntrackPresence(pattern)
				time.Sleep(time.Millisecond)
				s.UntrackPresence(name)
			}
		})
		work.Wait()
		require.NoError(t, s.TrackPresence(name, PresenceOptions{TTL: 10 * time.Second}))
		w.sleep(time.Second)
		require.Zero(t, s.Stats().Subscriptions-len(s.n.watchers.byRoom["r1"]), "no room but this one is tracked")
		for _, p := range peers {
			assert.Equal(t, 10*time.Second, s.n.rules.match("r1").ttl)
			assert.Equal(t, int64(1), w.client().Exists(t.Context(), w.keys().Conn("r1", p.id)).Val())
			assert.Zero(t, w.client().Exists(t.Context(), w.keys().Conn("r0", p.id)).Val())
			assert.Equal(t, []string{"r0", "r1", "r2"}, mustOf(t, s, p.id))
		}
	})
}

func mustOf(t *testing.T, s *testServer, conn string) []string {
	t.Helper()
	rooms, err := s.Rooms().Of(t.Context(), conn)
	require.NoError(t, err)
	return rooms
}
