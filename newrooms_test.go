package mesh_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// A client may use as many new rooms in a minute as it may, by joining or
// subscribing, and those that it knows as often as it likes.
func TestLimitOfNewRooms(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = 4 }))
		p := s.Dial()
		refused := func(room string) {
			t.Helper()
			for _, command := range []string{"mesh/join-room", "mesh/subscribe-presence"} {
				v := p.Room(command, room)
				assert.Equal(t, "ELIMIT", v.Code, "%s %s", command, room)
				assert.Contains(t, v.Error, "4 new rooms per minute")
			}
		}
		visit := func(room string) {
			t.Helper()
			p.Join(room)
			p.Leave(room)
		}
		p.Join("a")
		p.Subscribe("b")
		visit("c")
		p.Subscribe("a")
		p.Join("b")
		visit("d")
		refused("e")
		for _, room := range []string{"a", "b", "c", "d"} {
			visit(room)
			p.Subscribe(room)
			require.Equal(t, "true", string(p.Call("mesh/unsubscribe-presence", harness.InRoomPayload(room))))
		}
		refused("e")
		ids, err := s.Rooms().ConnectionIDs(t.Context(), "e")
		require.NoError(t, err)
		assert.Empty(t, ids, "nothing is half done")
		assert.False(t, testhook.PartsOf(s.Server).Hub.Watches("e"))
		assert.Equal(t, "true", string(p.Call("mesh/noop", nil)), "the connection goes on")
		require.True(t, s.Dial().Join("e").Success, "each connection has its own")

		w.Sleep(time.Minute)
		visit("a") // of the last minute
		for _, room := range []string{"e", "f", "g", "h"} {
			visit(room)
			visit(room)
		}
		refused("i")
		visit("a")
		w.Sleep(2 * time.Minute)
		for _, room := range []string{"a", "e", "f", "g"} {
			visit(room)
		}
		refused("h") // no longer remembered
	})
}

// Rooms that the connection is in, or subscribed to, are never new.
func TestRoomsInUseAreNotNew(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = 2 }))
		p := s.Dial()
		p.Join("in")
		p.Subscribe("watched")
		w.Sleep(10 * time.Minute)
		p.Join("x")
		p.Join("y")
		p.Subscribe("in")
		p.Join("watched")
		assert.Equal(t, "ELIMIT", p.Room("mesh/join-room", "z").Code)
		// Commands that only read do not count, nor do calls of the app.
		for i := range 5 {
			assert.Empty(t, harness.Code(t, p.Call("mesh/get-presence-state", harness.InRoomPayload(fmt.Sprint(i)))))
			assert.Empty(t, harness.Code(t, p.Call("mesh/get-room-metadata", harness.InRoomPayload(fmt.Sprint(i)))))
			require.NoError(t, s.Rooms().Add(t.Context(), fmt.Sprint("app", i), p.ID))
		}
	})
}

// What a guard refuses has cost a question, and counts.
func TestRefusedRoomsAreNew(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = 3 }))
		s.Track("^secret", mesh.PresenceOptions{Guard: harness.AdminsOnly, JoinGuard: harness.AdminsOnly})
		p := s.Dial()
		for _, room := range []string{"secret1", "untracked", "secret2"} {
			for range 2 {
				assert.Empty(t, p.Room("mesh/subscribe-presence", room).Code)
			}
		}
		assert.Equal(t, "ELIMIT", p.Room("mesh/subscribe-presence", "secret3").Code)
		assert.Equal(t, "ELIMIT", p.Room("mesh/join-room", "other").Code)
	})
}

// Whatever an unprivileged client does with made-up names, within all limits:
// seconds later nothing of it is left, in Redis or in the server's memory.
func TestMadeUpNamesLeaveNothing(t *testing.T) {
	t.Parallel()
	harness.EverywhereOn(t, nil, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.NoCommandLimit, harness.AllowMetadata, harness.Limits(func(l *mesh.Limits) { l.NewRoomsPerMinute = -1 }))
		s.Track("^room", mesh.PresenceOptions{})
		s.Track("^short", mesh.PresenceOptions{TTL: 5 * time.Second})
		s.Track("^secret", mesh.PresenceOptions{Guard: harness.AdminsOnly})
		s.Track("^closed", mesh.PresenceOptions{JoinGuard: harness.AdminsOnly})
		before := w.KeysBut(s, "")
		p, gone := s.Dial(), s.Dial()
		for i := range 20 {
			for _, kind := range []string{"room", "short", "secret", "closed", "untracked"} {
				room := fmt.Sprint(kind, strings.Repeat("x", 100), i)
				for _, command := range []string{
					"mesh/join-room", "mesh/subscribe-presence", "mesh/publish-presence-state", "mesh/get-presence-state",
					"mesh/get-room-metadata", "mesh/clear-presence-state", "mesh/unsubscribe-presence", "mesh/leave-room",
				} {
					p.Call(command, map[string]any{"roomName": room, "state": map[string]any{"x": 1}, "expireAfter": 100_000})
				}
				p.Call("mesh/get-connection-metadata", map[string]any{"connectionId": fmt.Sprint("unknown", i)})
			}
			p.Call("mesh/set-my-connection-metadata", map[string]any{"metadata": i})
			gone.Join(fmt.Sprint("room-of-the-other", i))
			gone.State(fmt.Sprint("room-of-the-other", i), map[string]any{"x": 1})
			gone.Subscribe(fmt.Sprint("room-of-the-other", i))
		}
		gone.Close()
		w.Eventually(time.Second, func() bool { return s.Stats().Connections == 1 && s.Stats().Entries == 0 }, "all have left")
		for key, ttl := range w.KeysBut(s, p.ID) {
			if _, ok := before[key]; !ok {
				assert.LessOrEqual(t, ttl, 15*time.Second, key)
				assert.Positive(t, ttl, key)
			}
		}
		if w.Virtual {
			w.Sleep(16 * time.Second)
			assert.Equal(t, before, w.KeysBut(s, p.ID))
		}
		w.Eventually(10*time.Second, func() bool { return s.Stats().Watched == 0 }, "mirrors")
		kept, most := s.AnswersKept(p.ID)
		assert.LessOrEqual(t, kept, most)
	})
}
