package guards

import (
	"errors"
	"fmt"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// If a rule is added, replaced or removed, the guards are asked again about rooms that
// match it, and about no others.
func TestAChangedRuleOnlyAsksAboutItsRooms(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		var asked harness.Counted
		s.Track("^room", mesh.PresenceOptions{Guard: asked.Guard})
		p := s.Dial()
		for i := range 5 {
			p.Join(fmt.Sprint("room", i))
			p.Subscribe(fmt.Sprint("room", i))
		}
		want := map[string]int64{"room0": 1, "room1": 1, "room2": 1, "room3": 1, "room4": 1}
		check := func(text string) {
			t.Helper()
			w.Sleep(200 * time.Millisecond)
			for room, n := range want {
				assert.Equal(t, "true", p.State(room, map[string]any{"x": 1}))
				assert.Equal(t, n, asked.Of(room), "%s, %s", text, room)
			}
		}
		check("at the start")
		for i := range 1000 {
			require.NoError(t, s.TrackPresence(mesh.Exact(fmt.Sprint("other", i)), mesh.PresenceOptions{Guard: asked.Guard}))
		}
		s.Track("^other", mesh.PresenceOptions{Guard: asked.Guard})
		check("rules about other rooms")

		require.NoError(t, s.TrackPresence(mesh.Exact("room3"), mesh.PresenceOptions{}))
		want["room3"]++
		check("a name")
		s.Track("^room[12]$", mesh.PresenceOptions{})
		want["room1"]++
		want["room2"]++
		check("a pattern")
		s.Track("^room[12]$", mesh.PresenceOptions{TTL: time.Minute})
		want["room1"]++
		want["room2"]++
		check("a pattern again")
		require.True(t, s.UntrackPresence(mesh.Exact("room3")))
		want["room3"]++
		check("without the name")
		require.True(t, s.UntrackPresence(mesh.Regexp(regexp.MustCompile("^room[12]$"))))
		want["room1"]++
		want["room2"]++
		check("without the pattern")
		for i := range 1000 {
			require.True(t, s.UntrackPresence(mesh.Exact(fmt.Sprint("other", i))))
		}
		check("without rules about other rooms")
	})
}

func TestUntrackPresence(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		all := mesh.Regexp(regexp.MustCompile("^room"))
		require.False(t, s.UntrackPresence(all))
		require.False(t, s.UntrackPresence(mesh.Pattern{}))
		require.NoError(t, s.TrackPresence(all, mesh.PresenceOptions{TTL: time.Minute}))
		require.NoError(t, s.TrackPresence(mesh.Exact("room2"), mesh.PresenceOptions{}))
		p, watcher := s.Dial(), s.Dial()
		for _, room := range []string{"room1", "room2"} {
			p.Join(room)
			watcher.Subscribe(room)
		}
		require.Equal(t, "true", p.State("room1", map[string]any{"x": 1}))
		w.Eventually(time.Second, func() bool { return watcher.Count("state", p.ID) == 1 }, "the state arrives")
		ended := make(chan error, 1)
		first := make(chan struct{})
		go func() { // ends with the subscription
			var last error
			for e, err := range s.Presence().Subscribe(t.Context(), "room1", mesh.SubscribeOptions{}) {
				if e.Type == mesh.EventSnapshot {
					close(first)
				}
				last = err
			}
			ended <- last
		}()
		<-first

		key := w.Keys().Conn("room1", p.ID)
		require.Positive(t, w.Client().PTTL(t.Context(), key).Val())
		require.True(t, s.Presence().UntrackPresence(mesh.Regexp(regexp.MustCompile("^room"))), "another Pattern value with the same expression")
		require.False(t, s.UntrackPresence(all))
		require.ErrorIs(t, <-ended, mesh.ErrNotTracked)
		w.Eventually(time.Second, func() bool { return watcher.EndedRoom("room1") }, "the client gets the push")
		assert.False(t, watcher.EndedRoom("room2"), "the rule of the exact name remains")
		w.Eventually(2*time.Second, func() bool { return w.Client().Exists(t.Context(), key).Val() == 0 }, "the key is removed with the TTL")

		ids, err := s.Rooms().ConnectionIDs(t.Context(), "room1")
		require.NoError(t, err)
		assert.Equal(t, []string{p.ID}, ids, "members stay")
		assert.Equal(t, "false", p.State("room1", map[string]any{"x": 2}))
		assert.False(t, watcher.Room("mesh/subscribe-presence", "room1").Success)
		assert.False(t, watcher.Room("mesh/get-presence-state", "room1").Success)
		members, err := s.Presence().Members(t.Context(), "room1")
		require.NoError(t, err)
		assert.JSONEq(t, `{"x":1}`, string(members[0].State), "the state stays")
		assert.Equal(t, "true", p.State("room2", map[string]any{"x": 1}))
		w.Eventually(time.Second, func() bool { return watcher.Count("state", p.ID) == 2 }, "updates of room2 continue")

		require.NoError(t, s.TrackPresence(all, mesh.PresenceOptions{TTL: time.Minute}))
		w.Eventually(2*time.Second, func() bool { return w.Client().Exists(t.Context(), key).Val() == 1 }, "the key exists again")
		assert.Equal(t, []string{p.ID}, watcher.Subscribe("room1").IDs(t))
		require.True(t, s.UntrackPresence(mesh.Exact("room2")))
		assert.Equal(t, "true", p.State("room2", map[string]any{"x": 3}), "room2 matches the pattern")
		assert.False(t, watcher.EndedRoom("room2"))
	})
}

// Rules are added and removed while clients join, subscribe and leave. In the end, the
// subscriptions and entries of each room must follow its rules.
func TestRulesChangeUnderLoad(t *testing.T) {
	t.Parallel()
	harness.Calm(t, "thousands of rules")
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.NoCommandLimit)
		pattern, name := mesh.Regexp(regexp.MustCompile("^r")), mesh.Exact("r1")
		var work sync.WaitGroup
		var peers []*harness.Peer
		for range 4 {
			p := s.Dial()
			peers = append(peers, p)
			work.Go(func() {
				for i := range 100 {
					room := fmt.Sprint("r", i%3)
					for _, command := range []string{"join-room", "subscribe-presence", "leave-room", "join-room"} {
						p.Call("mesh/"+command, harness.InRoomPayload(room))
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		work.Go(func() {
			for range 50 {
				assert.NoError(t, errors.Join(s.TrackPresence(pattern, mesh.PresenceOptions{TTL: 20 * time.Second}), s.TrackPresence(name, mesh.PresenceOptions{})))
				time.Sleep(time.Millisecond)
				s.UntrackPresence(pattern)
				time.Sleep(time.Millisecond)
				s.UntrackPresence(name)
			}
		})
		work.Wait()
		require.NoError(t, s.TrackPresence(name, mesh.PresenceOptions{TTL: 10 * time.Second}))
		w.Sleep(time.Second)
		require.Zero(t, s.Stats().Subscriptions-testhook.Subscriptions(s.Server, "r1"), "only r1 is tracked")
		for _, p := range peers {
			assert.Equal(t, 10*time.Second, testhook.TTL(s.Server, "r1"))
			assert.Equal(t, int64(1), w.Client().Exists(t.Context(), w.Keys().Conn("r1", p.ID)).Val())
			assert.Zero(t, w.Client().Exists(t.Context(), w.Keys().Conn("r0", p.ID)).Val())
			assert.Equal(t, []string{"r0", "r1", "r2"}, mustOf(t, s, p.ID))
		}
	})
}

func mustOf(t *testing.T, s *harness.Server, conn string) []string {
	t.Helper()
	rooms, err := s.Rooms().Of(t.Context(), conn)
	require.NoError(t, err)
	return rooms
}
