package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

func TestLimitOfFrames(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.FrameBytes = 1000 }))
		watcher, p, r := s.Dial(), s.Dial(), s.Raw()
		watcher.Subscribe("lobby")
		p.Join("lobby")
		fits := `{"id":1,"command":"mesh/noop","payload":"` + strings.Repeat("x", 957) + `"}`
		require.Len(t, fits, 1000)
		r.Send(fits)
		assert.JSONEq(t, `{"id":1,"command":"mesh/noop","payload":true}`, r.Next())
		require.NoError(t, p.Send(json.RawMessage(`"`+strings.Repeat("x", 1000)+`"`)))
		assert.Equal(t, websocket.CloseMessageTooBig, p.Closed(3*time.Second))
		watcher.Expect(2*time.Second, "leave", p.ID)
		r.Send(fits)
		r.Next()
		assert.EqualValues(t, 1, s.Stats().Closed["too_large"])
	})
}

func TestLimitsOfSizes(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.AllowMetadata, harness.Limits(func(l *mesh.Limits) { l.RoomNameBytes, l.StateBytes, l.MetadataBytes = 10, 20, 30 }))
		p := s.Level2().Dial()
		room := strings.Repeat("r", 10)
		p.Join(room)
		for _, bad := range []string{room + "r", "", "a\nb", "a\x00", "\u0085"} {
			for _, command := range []string{"mesh/join-room", "mesh/leave-room", "mesh/subscribe-presence", "mesh/unsubscribe-presence",
				"mesh/publish-presence-state", "mesh/clear-presence-state", "mesh/get-presence-state", "mesh/get-room-metadata"} {
				payload := map[string]any{"roomName": bad, "state": map[string]any{}}
				assert.Equal(t, "EINVALID", harness.Code(t, p.Call(command, payload)), "%s %q", command, bad)
			}
		}
		padded := func(n int) string { return `{"s" : "` + strings.Repeat("x", n-len(`{"s":""}`)) + `"}` } // whitespace does not count
		state := func(text string) json.RawMessage {
			return p.Call("mesh/publish-presence-state", json.RawMessage(`{"roomName":"`+room+`","state":`+text+`}`))
		}
		assert.Equal(t, "true", string(state(padded(20))))
		assert.Equal(t, "ETOOLARGE", harness.Code(t, state(padded(21))))
		var v harness.View
		require.NoError(t, json.Unmarshal(p.Call("mesh/get-presence-state", harness.InRoomPayload(room)), &v))
		assert.JSONEq(t, padded(20), string(v.States[p.ID]), "the old state remains")

		set := func(text, strategy string) json.RawMessage {
			return p.Call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":`+text+`,"options":{"strategy":"`+strategy+`"}}`))
		}
		assert.JSONEq(t, `{"success":true}`, string(set(padded(30), "replace")))
		assert.Equal(t, "ETOOLARGE", harness.Code(t, set(padded(31), "replace")))
		assert.Equal(t, "ETOOLARGE", harness.Code(t, set(`{"t":1}`, "merge")), "the merged metadata count")
		assert.JSONEq(t, `{"metadata":`+padded(30)+`}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
	})
}

func TestLimitsOfRoomsAndSubscriptions(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.RoomsPerConnection, l.SubscriptionsPerConnection = 2, 2 }))
		p, q := s.Dial(), s.Dial()
		for _, room := range []string{"a", "b"} {
			p.Join(room)
			p.Subscribe(room)
		}
		for range 2 {
			assert.Equal(t, "ELIMIT", harness.Code(t, p.Call("mesh/join-room", harness.InRoomPayload("c"))))
			assert.Equal(t, "ELIMIT", harness.Code(t, p.Call("mesh/subscribe-presence", harness.InRoomPayload("c"))))
		}
		p.Join("a")
		p.Subscribe("a")
		q.Join("c")
		w.Sleep(100 * time.Millisecond)
		assert.Zero(t, p.Count("join", q.ID), "the refused subscription has effects")
		ids, err := s.Rooms().ConnectionIDs(t.Context(), "c")
		require.NoError(t, err)
		assert.Equal(t, []string{q.ID}, ids)
		p.Leave("b")
		p.Call("mesh/unsubscribe-presence", harness.InRoomPayload("b"))
		p.Join("c")
		p.Subscribe("c")
		// A refused subscription does not count.
		require.NoError(t, s.TrackPresence(mesh.Exact("secret"), mesh.PresenceOptions{Guard: harness.AdminsOnly}))
		p.Call("mesh/unsubscribe-presence", harness.InRoomPayload("c"))
		for range 3 {
			assert.False(t, p.Room("mesh/subscribe-presence", "secret").Success)
		}
		p.Subscribe("c")
	})
}

func TestLimitOfCommands(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.CommandsPerSecond = 10 }))
		p, other := s.Dial(), s.Dial()
		burst := func(n int) time.Duration {
			begun := time.Now()
			var calls sync.WaitGroup
			for range n {
				calls.Go(func() { assert.Equal(t, "true", string(p.Call("mesh/noop", nil))) })
			}
			calls.Wait()
			return time.Since(begun)
		}
		assert.Zero(t, burst(20), "twice the rate at once")
		assert.InDelta(t, 0.5, burst(5).Seconds(), 0.06, "further commands wait")
		assert.Equal(t, "true", string(other.Call("mesh/noop", nil)))
		w.Sleep(time.Second)
		assert.InDelta(t, 0.2, burst(12).Seconds(), 0.06, "the rate applies")
		for range 50 {
			require.NoError(t, p.Send(map[string]any{"id": 1, "command": "pong"}))
		}
		w.Sleep(time.Second)
		assert.Zero(t, burst(10), "pongs do not count")
		assert.Zero(t, s.Stats().Limited)
		assert.EqualValues(t, 7, s.Stats().Delayed)
		for range 1000 {
			if p.Send(map[string]any{"command": "mesh/noop"}) != nil {
				break
			}
		}
		assert.Equal(t, websocket.ClosePolicyViolation, p.Closed(3*time.Second), "the flood closes the connection")
		assert.Zero(t, s.Stats().Limited, "a command without an id has no answer")
		assert.Equal(t, "true", string(other.Call("mesh/noop", nil)))
	})
}

func TestLimitsOfConnections(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.Connections = 2 }))
		a, _ := s.Dial(), s.Dial()
		_, resp, err := s.TryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		a.Close()
		w.Sleep(100 * time.Millisecond)
		s.Dial()

		s = w.Tracked(harness.Limits(func(l *mesh.Limits) { l.UpgradesPerSecond = 3 }))
		for range 3 {
			s.Dial()
		}
		for range 2 {
			_, resp, err = s.TryDial()
			require.Error(t, err)
			assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
			assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		}
		w.Sleep(time.Second)
		for range 3 {
			s.Dial()
		}
		_, _, err = s.TryDial()
		require.Error(t, err)
	})
}

func TestLimitOfSnapshots(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.SnapshotMembers = 5 }))
		ctx := t.Context()
		for i := range 20 {
			id := fmt.Sprintf("c%d", i)
			require.NoError(t, s.Presence().Connect(ctx, id, nil))
			require.NoError(t, s.Presence().Join(ctx, "lobby", id))
			require.NoError(t, s.Presence().PublishState(ctx, "lobby", id, map[string]any{"i": i}, mesh.StateOptions{}))
		}
		for round, name := range []string{"from Redis", "from the mirror"} {
			total := 20 + 2*round + 1
			p := s.Dial()
			v := p.Join("lobby")
			assert.Len(t, v.IDs(t), 5, name)
			assert.Contains(t, v.IDs(t), p.ID, "%s: the joiner is listed", name)
			assert.Equal(t, total, v.Total, name)
			var states harness.View
			require.NoError(t, json.Unmarshal(p.Call("mesh/get-presence-state", harness.InRoomPayload("lobby")), &states))
			var ids []string
			require.NoError(t, json.Unmarshal(states.Present, &ids))
			assert.Len(t, ids, 5, name)
			assert.Equal(t, total, states.Total, name)
			assert.LessOrEqual(t, len(states.States), 5)
			v = p.Subscribe("lobby")
			assert.Len(t, v.IDs(t), 5, name)
			assert.Equal(t, total, v.Total, name)
			assert.LessOrEqual(t, len(v.States), 5)
			q := s.Dial()
			q.Join("lobby")
			p.Expect(time.Second, "join", q.ID) // updates are not limited
		}
		members, err := s.Presence().Members(ctx, "lobby")
		require.NoError(t, err)
		assert.Len(t, members, 24, "the app gets all members")
		small := s.Dial()
		v := small.Join("attic")
		assert.Equal(t, []string{small.ID}, v.IDs(t))
		assert.Zero(t, v.Total, "total is only set if members are left out")

		all := w.Tracked(harness.Limits(func(l *mesh.Limits) { l.SnapshotMembers = -1 }))
		p := all.Dial()
		assert.Len(t, p.Join("lobby").IDs(t), 25)
		assert.Len(t, p.Subscribe("lobby").IDs(t), 25)
		assert.Len(t, p.Join("lobby").IDs(t), 25)
	})
}

func TestLimitsCanBeOff(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.AllowMetadata, harness.Limits(func(l *mesh.Limits) {
			*l = mesh.Limits{
				FrameBytes: -1, RoomNameBytes: -1, StateBytes: -1, MetadataBytes: -1, RoomsPerConnection: -1, SubscriptionsPerConnection: -1,
				NewRoomsPerMinute: -1, CommandsPerSecond: -1, QueueBytes: -1, Connections: -1, UpgradesPerSecond: -1, SnapshotMembers: -1,
			}
		}))
		p := s.Dial()
		room := strings.Repeat("r", 5000)
		p.Join(room)
		p.Subscribe(room)
		assert.Equal(t, "true", p.State(room, map[string]any{"s": strings.Repeat("x", 10_000)}))
		assert.JSONEq(t, `{"success":true}`, string(p.Call("mesh/set-my-connection-metadata", map[string]any{"metadata": strings.Repeat("x", 20_000)})))
		for i := range 120 {
			p.Join(fmt.Sprint(i))
			p.Subscribe(fmt.Sprint(i))
		}
	})
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		own := w.Server()
		listed := w.Server(func(o *mesh.Options) { o.AllowedOrigins = []string{"https://*.example.com", "localhost:*"} })
		for _, c := range []struct {
			s      *harness.Server
			origin string
			ok     bool
		}{
			{own, "", true}, {own, "http://127.0.0.1", true}, {own, "https://evil.example", false},
			{listed, "", true}, {listed, "https://app.example.com", true}, {listed, "http://localhost:5173", true},
			{listed, "https://example.com", false}, {listed, "http://app.example.com", false},
			{listed, "https://app.example.com.evil.example", false}, {listed, "http://127.0.0.1", false}, {listed, "null", false},
		} {
			h := http.Header{}
			if c.origin != "" {
				h.Set("Origin", c.origin)
			}
			_, resp, err := c.s.TryDial(h)
			if c.ok {
				assert.NoError(t, err, c.origin)
				continue
			}
			require.Error(t, err, c.origin)
			assert.Equal(t, http.StatusForbidden, resp.StatusCode, c.origin)
		}
	})
}

func TestASocketThatDoesNotReadIsDropped(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const queue = 64 << 10
		s := w.Tracked(harness.NoCommandLimit, harness.Limits(func(l *mesh.Limits) { l.QueueBytes = queue }))
		slow, reader, busy := s.Raw(), s.Dial(), s.Dial()
		slow.Send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
		slow.Next()
		reader.Subscribe("lobby")
		w.Sleep(2 * subscribePause) // the following updates take no virtual time, and would wait for the pause
		c, ok := s.Connection(slow.ID)
		require.True(t, ok)
		// From now on, slow is not read. Joins and leaves do not coalesce.
		rounds := 0
		for ; rounds < 5000; rounds++ {
			busy.Join("lobby")
			busy.Leave("lobby")
			require.LessOrEqual(t, testhook.QueueBytes(c), queue, "the queue exceeds its limit")
			if s.Stats().Closed["slow"] > 0 {
				rounds++
				break
			}
		}
		assert.EqualValues(t, 1, s.Stats().Closed["slow"], "the connection was dropped")
		w.Eventually(5*time.Second, func() bool { _, open := s.Connection(slow.ID); return !open }, "the connection has ended")
		w.Eventually(5*time.Second, func() bool { return len(reader.Got()) == 2*rounds }, "other subscribers have all updates")
		assert.Equal(t, 1, s.Stats().Subscriptions)
	})
}

func TestStatesForASlowSocketCoalesce(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(harness.NoCommandLimit, harness.Limits(func(l *mesh.Limits) { l.QueueBytes = 16 << 10 }), func(o *mesh.Options) { o.WriteTimeout = time.Hour })
		slow, busy := s.Raw(), s.Dial()
		slow.Send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
		slow.Next()
		busy.Join("lobby")
		for i := range 500 {
			require.Equal(t, "true", busy.State("lobby", map[string]any{"i": i}))
		}
		w.Sleep(10 * time.Millisecond)
		assert.Positive(t, s.Stats().Coalesced)
		seen := 0
		for {
			f := slow.Next()
			if seen++; strings.Contains(f, `"i":499`) {
				break
			}
		}
		assert.Less(t, seen, 400, "states were not coalesced")
	})
}
