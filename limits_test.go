package mesh

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func limits(change func(*Limits)) func(*Options) {
	return func(o *Options) { change(&o.Limits) }
}

// code returns the code of an error answer, "" where it is none.
func code(t *testing.T, answer json.RawMessage) string {
	t.Helper()
	var e struct{ Code string }
	_ = json.Unmarshal(answer, &e)
	return e.Code
}

func TestLimitOfFrames(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.FrameBytes = 1000 }))
		watcher, p, r := s.dial(), s.dial(), s.raw()
		watcher.subscribe("lobby")
		p.join("lobby")
		fits := `{"id":1,"command":"mesh/noop","payload":"` + strings.Repeat("x", 957) + `"}`
		require.Len(t, fits, 1000)
		r.send(fits)
		assert.JSONEq(t, `{"id":1,"command":"mesh/noop","payload":true}`, r.next())
		require.NoError(t, p.send(json.RawMessage(`"`+strings.Repeat("x", 1000)+`"`)))
		assert.Equal(t, websocket.CloseMessageTooBig, p.closed(3*time.Second))
		watcher.expect(2*time.Second, "leave", p.id)
		r.send(fits)
		r.next()
		assert.EqualValues(t, 1, s.Stats().Closed["too_large"])
	})
}

func TestLimitsOfSizes(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(allowMetadata, limits(func(l *Limits) { l.RoomNameBytes, l.StateBytes, l.MetadataBytes = 10, 20, 30 }))
		p := s.dial()
		room := strings.Repeat("r", 10)
		p.join(room)
		for _, bad := range []string{room + "r", "", "a\nb", "a\x00", "\u0085"} {
			for _, command := range []string{"mesh/join-room", "mesh/leave-room", "mesh/subscribe-presence", "mesh/unsubscribe-presence",
				"mesh/publish-presence-state", "mesh/clear-presence-state", "mesh/get-presence-state", "mesh/get-room-metadata"} {
				payload := map[string]any{"roomName": bad, "state": map[string]any{}}
				assert.Equal(t, "EINVALID", code(t, p.call(command, payload)), "%s %q", command, bad)
			}
		}
		padded := func(n int) string { return `{"s" : "` + strings.Repeat("x", n-len(`{"s":""}`)) + `"}` } // space does not count
		state := func(text string) json.RawMessage {
			return p.call("mesh/publish-presence-state", json.RawMessage(`{"roomName":"`+room+`","state":`+text+`}`))
		}
		assert.Equal(t, "true", string(state(padded(20))))
		assert.Equal(t, "ETOOLARGE", code(t, state(padded(21))))
		var v view
		require.NoError(t, json.Unmarshal(p.call("mesh/get-presence-state", inRoomPayload(room)), &v))
		assert.JSONEq(t, padded(20), string(v.States[p.id]), "the old one stands")

		set := func(text, strategy string) json.RawMessage {
			return p.call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":`+text+`,"options":{"strategy":"`+strategy+`"}}`))
		}
		assert.JSONEq(t, `{"success":true}`, string(set(padded(30), "replace")))
		assert.Equal(t, "ETOOLARGE", code(t, set(padded(31), "replace")))
		assert.Equal(t, "ETOOLARGE", code(t, set(`{"t":1}`, "merge")), "what comes of it counts")
		assert.JSONEq(t, `{"metadata":`+padded(30)+`}`, string(p.call("mesh/get-my-connection-metadata", nil)))
	})
}

func TestLimitsOfRoomsAndSubscriptions(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.RoomsPerConnection, l.SubscriptionsPerConnection = 2, 2 }))
		p, q := s.dial(), s.dial()
		for _, room := range []string{"a", "b"} {
			p.join(room)
			p.subscribe(room)
		}
		for range 2 {
			assert.Equal(t, "ELIMIT", code(t, p.call("mesh/join-room", inRoomPayload("c"))))
			assert.Equal(t, "ELIMIT", code(t, p.call("mesh/subscribe-presence", inRoomPayload("c"))))
		}
		p.join("a")
		p.subscribe("a")
		q.join("c")
		w.sleep(100 * time.Millisecond)
		assert.Zero(t, p.count("join", q.id), "nothing half done")
		ids, err := s.Rooms().Members(t.Context(), "c")
		require.NoError(t, err)
		assert.Equal(t, []string{q.id}, ids)
		p.leave("b")
		p.call("mesh/unsubscribe-presence", inRoomPayload("b"))
		p.join("c")
		p.subscribe("c")
		// A refused subscription takes no place.
		require.NoError(t, s.TrackPresence(Exact("secret"), PresenceOptions{Guard: adminsOnly}))
		p.call("mesh/unsubscribe-presence", inRoomPayload("c"))
		for range 3 {
			assert.False(t, p.room("mesh/subscribe-presence", "secret").Success)
		}
		p.subscribe("c")
	})
}

func TestLimitOfCommands(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.CommandsPerSecond = 10 }))
		p, other := s.dial(), s.dial()
		limited := func(n int) (count int) {
			for range n {
				if code(t, p.call("mesh/noop", nil)) == "ELIMIT" {
					count++
				}
			}
			return count
		}
		assert.Equal(t, 5, limited(25), "twice the rate at once")
		assert.Equal(t, "true", string(other.call("mesh/noop", nil)))
		w.sleep(time.Second)
		assert.Equal(t, 2, limited(12), "and the rate from then on")
		for range 50 {
			require.NoError(t, p.send(map[string]any{"id": 1, "command": "pong"}))
		}
		w.sleep(time.Second)
		assert.Zero(t, limited(10), "pongs do not count")
		assert.EqualValues(t, 7, s.Stats().Limited)
		for range 1000 {
			if p.send(map[string]any{"command": "mesh/noop"}) != nil {
				break
			}
		}
		assert.Equal(t, websocket.ClosePolicyViolation, p.closed(3*time.Second), "a flood")
		assert.Equal(t, "true", string(other.call("mesh/noop", nil)))
	})
}

func TestLimitsOfConnections(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.Connections = 2 }))
		a, _ := s.dial(), s.dial()
		_, resp, err := s.tryDial()
		require.Error(t, err)
		assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		a.close()
		w.sleep(100 * time.Millisecond)
		s.dial()

		s = w.tracked(limits(func(l *Limits) { l.UpgradesPerSecond = 3 }))
		for range 3 {
			s.dial()
		}
		for range 2 {
			_, resp, err = s.tryDial()
			require.Error(t, err)
			assert.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
			assert.NotEmpty(t, resp.Header.Get("Retry-After"))
		}
		w.sleep(time.Second)
		for range 3 {
			s.dial()
		}
		_, _, err = s.tryDial()
		require.Error(t, err)
	})
}

func TestLimitOfSnapshots(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked(limits(func(l *Limits) { l.SnapshotMembers = 5 }))
		ctx := t.Context()
		for i := range 20 {
			id := fmt.Sprintf("c%d", i)
			require.NoError(t, s.Presence().Connect(ctx, id, nil))
			require.NoError(t, s.Presence().Join(ctx, "lobby", id))
			require.NoError(t, s.Presence().PublishState(ctx, "lobby", id, map[string]any{"i": i}, StateOptions{}))
		}
		for round, name := range []string{"from Redis", "from the mirror"} {
			total := 20 + 2*round + 1
			p := s.dial()
			v := p.join("lobby")
			assert.Len(t, v.ids(t), 5, name)
			assert.Contains(t, v.ids(t), p.id, "%s: the joiner is among them", name)
			assert.Equal(t, total, v.Total, name)
			var states view
			require.NoError(t, json.Unmarshal(p.call("mesh/get-presence-state", inRoomPayload("lobby")), &states))
			var ids []string
			require.NoError(t, json.Unmarshal(states.Present, &ids))
			assert.Len(t, ids, 5, name)
			assert.Equal(t, total, states.Total, name)
			assert.LessOrEqual(t, len(states.States), 5)
			v = p.subscribe("lobby")
			assert.Len(t, v.ids(t), 5, name)
			assert.Equal(t, total, v.Total, name)
			assert.LessOrEqual(t, len(v.States), 5)
			q := s.dial()
			q.join("lobby")
			p.expect(time.Second, "join", q.id) // updates are of all
		}
		members, err := s.Presence().Members(ctx, "lobby")
		require.NoError(t, err)
		assert.Len(t, members, 24, "the app itself may have all")
		small := s.dial()
		v := small.join("attic")
		assert.Equal(t, []string{small.id}, v.ids(t))
		assert.Zero(t, v.Total, "only where something is left out")

		all := w.tracked(limits(func(l *Limits) { l.SnapshotMembers = -1 }))
		p := all.dial()
		assert.Len(t, p.join("lobby").ids(t), 25)
		assert.Len(t, p.subscribe("lobby").ids(t), 25)
		assert.Len(t, p.join("lobby").ids(t), 25)
	})
}

func TestLimitsCanBeOff(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(allowMetadata, limits(func(l *Limits) {
			*l = Limits{-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1}
		}))
		p := s.dial()
		room := strings.Repeat("r", 5000)
		p.join(room)
		p.subscribe(room)
		assert.Equal(t, "true", p.state(room, map[string]any{"s": strings.Repeat("x", 10_000)}))
		assert.JSONEq(t, `{"success":true}`, string(p.call("mesh/set-my-connection-metadata", map[string]any{"metadata": strings.Repeat("x", 20_000)})))
		for i := range 120 {
			p.join(fmt.Sprint(i))
			p.subscribe(fmt.Sprint(i))
		}
	})
}

func TestOrigins(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		own := w.server()
		listed := w.server(func(o *Options) { o.AllowedOrigins = []string{"https://*.example.com", "localhost:*"} })
		for _, c := range []struct {
			s      *testServer
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
			_, resp, err := c.s.tryDial(h)
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
	everywhere(t, func(t *testing.T, w *world) {
		const queue = 64 << 10
		s := w.tracked(noCommandLimit, limits(func(l *Limits) { l.QueueBytes = queue }))
		slow, reader, busy := s.raw(), s.dial(), s.dial()
		slow.send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
		slow.next()
		reader.subscribe("lobby")
		c, ok := s.Connection(slow.id)
		require.True(t, ok)
		// From now on nobody reads slow. Joins and leaves do not coalesce.
		rounds := 0
		for ; rounds < 5000; rounds++ {
			busy.join("lobby")
			busy.leave("lobby")
			require.LessOrEqual(t, c.sock.QueueBytes(), queue, "memory is bounded")
			if s.Stats().Closed["slow"] > 0 {
				rounds++
				break
			}
		}
		assert.EqualValues(t, 1, s.Stats().Closed["slow"], "it was dropped")
		w.eventually(5*time.Second, func() bool { _, open := s.Connection(slow.id); return !open }, "it has ended")
		w.eventually(5*time.Second, func() bool { return len(reader.got()) == 2*rounds }, "nobody else lost anything")
		assert.Equal(t, 1, s.Stats().Subscriptions)
	})
}

func TestStatesForASlowSocketCoalesce(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(noCommandLimit, limits(func(l *Limits) { l.QueueBytes = 16 << 10 }), func(o *Options) { o.WriteTimeout = time.Hour })
		slow, busy := s.raw(), s.dial()
		slow.send(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"lobby"}}`)
		slow.next()
		busy.join("lobby")
		for i := range 500 {
			require.Equal(t, "true", busy.state("lobby", map[string]any{"i": i}))
		}
		w.sleep(10 * time.Millisecond)
		assert.Positive(t, s.Stats().Coalesced)
		seen := 0
		for {
			f := slow.next()
			if seen++; strings.Contains(f, `"i":499`) {
				break
			}
		}
		assert.Less(t, seen, 400, "not all of them")
	})
}
