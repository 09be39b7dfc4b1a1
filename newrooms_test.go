package mesh

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A client may use as many new rooms in a minute as it may, by joining or
// subscribing, and those that it knows as often as it likes.
func TestLimitOfNewRooms(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.NewRoomsPerMinute = 4 }))
		p := s.dial()
		refused := func(room string) {
			t.Helper()
			for _, command := range []string{"mesh/join-room", "mesh/subscribe-presence"} {
				v := p.room(command, room)
				assert.Equal(t, "ELIMIT", v.Code, "%s %s", command, room)
				assert.Contains(t, v.Error, "4 new rooms per minute")
			}
		}
		visit := func(room string) {
			t.Helper()
			p.join(room)
			p.leave(room)
		}
		p.join("a")
		p.subscribe("b")
		visit("c")
		p.subscribe("a")
		p.join("b")
		visit("d")
		refused("e")
		for _, room := range []string{"a", "b", "c", "d"} {
			visit(room)
			p.subscribe(room)
			require.Equal(t, "true", string(p.call("mesh/unsubscribe-presence", inRoomPayload(room))))
		}
		refused("e")
		ids, err := s.Rooms().Members(t.Context(), "e")
		require.NoError(t, err)
		assert.Empty(t, ids, "nothing is half done")
		assert.False(t, s.n.hub.Watches("e"))
		assert.Equal(t, "true", string(p.call("mesh/noop", nil)), "the connection goes on")
		require.True(t, s.dial().join("e").Success, "each connection has its own")

		w.sleep(time.Minute)
		visit("a") // of the last minute
		for _, room := range []string{"e", "f", "g", "h"} {
			visit(room)
			visit(room)
		}
		refused("i")
		visit("a")
		w.sleep(2 * time.Minute)
		for _, room := range []string{"a", "e", "f", "g"} {
			visit(room)
		}
		refused("h") // no longer remembered
	})
}

// Rooms that the connection is in, or subscribed to, are never new.
func TestRoomsInUseAreNotNew(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.NewRoomsPerMinute = 2 }))
		p := s.dial()
		p.join("in")
		p.subscribe("watched")
		w.sleep(10 * time.Minute)
		p.join("x")
		p.join("y")
		p.subscribe("in")
		p.join("watched")
		assert.Equal(t, "ELIMIT", p.room("mesh/join-room", "z").Code)
		// Commands that only read do not count, nor do calls of the app.
		for i := range 5 {
			assert.Empty(t, code(t, p.call("mesh/get-presence-state", inRoomPayload(fmt.Sprint(i)))))
			assert.Empty(t, code(t, p.call("mesh/get-room-metadata", inRoomPayload(fmt.Sprint(i)))))
			require.NoError(t, s.Rooms().Add(t.Context(), fmt.Sprint("app", i), p.id))
		}
	})
}

// What a guard refuses has cost a question, and counts.
func TestRefusedRoomsAreNew(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(limits(func(l *Limits) { l.NewRoomsPerMinute = 3 }))
		s.track("^secret", PresenceOptions{Guard: adminsOnly, JoinGuard: adminsOnly})
		p := s.dial()
		for _, room := range []string{"secret1", "untracked", "secret2"} {
			for range 2 {
				assert.Empty(t, p.room("mesh/subscribe-presence", room).Code)
			}
		}
		assert.Equal(t, "ELIMIT", p.room("mesh/subscribe-presence", "secret3").Code)
		assert.Equal(t, "ELIMIT", p.room("mesh/join-room", "other").Code)
	})
}

// What a connection remembers is bounded, whatever it does.
func TestNewRoomsAreBounded(t *testing.T) {
	t.Parallel()
	var n newRooms
	at := time.Unix(1_800_000_000, 0)
	for minute := range 3 {
		for i := range 5 * roomsRemembered {
			require.True(t, n.use(fmt.Sprint(i), 1<<30, at), "minute %d", minute)
		}
		assert.LessOrEqual(t, len(n.now)+len(n.old), 4*roomsRemembered)
		at = at.Add(newRoomsEvery)
	}
	var off newRooms
	require.True(t, off.use("a", -1, at))
	assert.Nil(t, off.now)
}

// Whatever an unprivileged client does with made-up names, within all limits:
// seconds later nothing of it is left, in Redis or in the server's memory.
func TestMadeUpNamesLeaveNothing(t *testing.T) {
	t.Parallel()
	everywhereOn(t, nil, func(t *testing.T, w *world) {
		s := w.server(noCommandLimit, allowMetadata, limits(func(l *Limits) { l.NewRoomsPerMinute = -1 }))
		s.track("^room", PresenceOptions{})
		s.track("^short", PresenceOptions{TTL: 5 * time.Second})
		s.track("^secret", PresenceOptions{Guard: adminsOnly})
		s.track("^closed", PresenceOptions{JoinGuard: adminsOnly})
		before := w.keysBut(s, "")
		p, gone := s.dial(), s.dial()
		for i := range 20 {
			for _, kind := range []string{"room", "short", "secret", "closed", "untracked"} {
				room := fmt.Sprint(kind, strings.Repeat("x", 100), i)
				for _, command := range []string{
					"mesh/join-room", "mesh/subscribe-presence", "mesh/publish-presence-state", "mesh/get-presence-state",
					"mesh/get-room-metadata", "mesh/clear-presence-state", "mesh/unsubscribe-presence", "mesh/leave-room",
				} {
					p.call(command, map[string]any{"roomName": room, "state": map[string]any{"x": 1}, "expireAfter": 100_000})
				}
				p.call("mesh/get-connection-metadata", map[string]any{"connectionId": fmt.Sprint("unknown", i)})
			}
			p.call("mesh/set-my-connection-metadata", map[string]any{"metadata": i})
			gone.join(fmt.Sprint("room-of-the-other", i))
			gone.state(fmt.Sprint("room-of-the-other", i), map[string]any{"x": 1})
			gone.subscribe(fmt.Sprint("room-of-the-other", i))
		}
		gone.close()
		w.eventually(w.unhurried(time.Second), func() bool { return s.Stats().Connections == 1 && s.Stats().Entries == 0 }, "all have left")
		for key, ttl := range w.keysBut(s, p.id) {
			if _, ok := before[key]; !ok {
				assert.LessOrEqual(t, ttl, 15*time.Second, key)
				assert.Positive(t, ttl, key)
			}
		}
		if w.virtual {
			w.sleep(16 * time.Second)
			assert.Equal(t, before, w.keysBut(s, p.id))
		}
		w.eventually(w.unhurried(10*time.Second), func() bool { return s.Stats().Watched == 0 }, "mirrors")
		v := s.n.verdicts.of(p.id)
		require.NotNil(t, v)
		v.mu.Lock()
		defer v.mu.Unlock()
		assert.LessOrEqual(t, len(v.kept), s.n.verdicts.keep)
	})
}

// keysBut returns the keys in Redis with their TTLs (-1 ns: none), but those of
// one connection's registration and of what servers are doing.
func (w *world) keysBut(s *testServer, conn string) map[string]time.Duration {
	w.t.Helper()
	all := make(map[string]time.Duration)
	names, err := w.client().Keys(w.t.Context(), "*").Result()
	require.NoError(w.t, err)
	client := w.client()
	for _, key := range names {
		if conn != "" && key == s.n.keys.ConnMeta(conn) ||
			strings.Contains(key, "fence:") || strings.Contains(key, "owned:") || strings.Contains(key, "canary") {
			continue
		}
		ttl, err := client.PTTL(w.t.Context(), key).Result()
		require.NoError(w.t, err)
		if ttl != -2 { // it has just expired
			all[key] = ttl
		}
	}
	return all
}
