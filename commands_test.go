package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
)

// joinedAt is the time of a join in a list of members.
var joinedAt = regexp.MustCompile(`,"joinedAt":[1-9]\d{11,12}`)

// plain returns an answer without the position of the room, whose fields must be there
// together or not at all, and without the times of joins.
func plain(t *testing.T, answer json.RawMessage) string {
	t.Helper()
	var fields map[string]json.RawMessage
	if json.Unmarshal(answer, &fields) != nil {
		return string(answer) // true, false
	}
	_, seq := fields["seq"]
	_, epoch := fields["epoch"]
	require.Equal(t, seq, epoch, "%s", answer)
	delete(fields, "seq")
	delete(fields, "epoch")
	delete(fields, "level")
	if present, ok := fields["present"]; ok {
		fields["present"] = joinedAt.ReplaceAll(present, nil)
	}
	out, err := json.Marshal(fields)
	require.NoError(t, err)
	return string(out)
}

func TestEveryCommandsAnswer(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Server(harness.AllowMetadata)
		require.NoError(t, s.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{}))
		no := func(context.Context, mesh.Member, string) (bool, error) { return false, nil }
		require.NoError(t, s.TrackPresence(mesh.Exact("secret"), mesh.PresenceOptions{Guard: no}))
		require.NoError(t, s.TrackPresence(mesh.Exact("closed"), mesh.PresenceOptions{JoinGuard: no}))
		require.NoError(t, s.Rooms().SetMetadata(t.Context(), "lobby", map[string]any{"topic": "x"}, mesh.MetadataOptions{}))
		require.NoError(t, s.Rooms().SetMetadata(t.Context(), "secret", "hidden", mesh.MetadataOptions{}))
		p := s.Dial()
		me := func(text string) string { return strings.ReplaceAll(text, "ME", p.ID) }

		for i, step := range []struct{ command, payload, want string }{
			{"mesh/noop", `{}`, `true`},
			// Before it is anywhere.
			{"mesh/get-my-connection-metadata", `{}`, `{"metadata":null}`},
			{"mesh/get-connection-metadata", `{"connectionId":"ME"}`, `{"metadata":null}`},
			{"mesh/get-connection-metadata", `{"connectionId":"nobody"}`, `{"metadata":null}`},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":{"a":1}}`, `false`},
			{"mesh/clear-presence-state", `{"roomName":"lobby"}`, `false`},
			{"mesh/unsubscribe-presence", `{"roomName":"lobby"}`, `false`},
			{"mesh/leave-room", `{"roomName":"lobby"}`, `{"success":true}`},
			{"mesh/get-presence-state", `{"roomName":"lobby"}`, `{"success":true,"present":[],"states":{}}`},
			{"mesh/subscribe-presence", `{"roomName":"lobby"}`, `{"success":true,"present":[],"states":{},"total":0}`},
			{"mesh/unsubscribe-presence", `{"roomName":"lobby"}`, `true`},
			{"mesh/unsubscribe-presence", `{"roomName":"lobby"}`, `false`},
			// In a tracked room.
			{"mesh/join-room", `{"roomName":"lobby"}`, `{"success":true,"present":[{"id":"ME","metadata":null}],"connections":1}`},
			{"mesh/join-room", `{"roomName":"lobby"}`, `{"success":true,"present":[{"id":"ME","metadata":null}],"connections":1}`},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":{"n":12345678901234567890}}`, `true`},
			{"mesh/get-presence-state", `{"roomName":"lobby"}`,
				`{"success":true,"present":["ME"],"states":{"ME":{"n":12345678901234567890}}}`},
			{"mesh/publish-presence-state", `{"roomName":"lobby"}`, `false`},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":null}`, `false`},
			{"mesh/get-presence-state", `{"roomName":"lobby"}`,
				`{"success":true,"present":["ME"],"states":{"ME":{"n":12345678901234567890}}}`},
			{"mesh/clear-presence-state", `{"roomName":"lobby"}`, `true`},
			{"mesh/clear-presence-state", `{"roomName":"lobby"}`, `true`},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":{"a":1},"expireAfter":60000,"silent":true}`, `true`},
			{"mesh/set-my-connection-metadata", `{"metadata":{"name":"ann"}}`, `{"success":true}`},
			{"mesh/get-my-connection-metadata", `{}`, `{"metadata":{"name":"ann"}}`},
			{"mesh/get-connection-metadata", `{"connectionId":"ME"}`, `{"metadata":{"name":"ann"}}`},
			{"mesh/subscribe-presence", `{"roomName":"lobby"}`,
				`{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}],"states":{"ME":{"a":1}},"total":1}`},
			{"mesh/join-room", `{"roomName":"lobby"}`, `{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}],"connections":1}`},
			{"mesh/get-room-metadata", `{"roomName":"lobby"}`, `{"metadata":{"topic":"x"}}`},
			{"mesh/get-room-metadata", `{"roomName":"other"}`, `{"metadata":null}`},
			{"mesh/leave-room", `{"roomName":"lobby"}`, `{"success":true}`},
			{"mesh/get-presence-state", `{"roomName":"lobby"}`, `{"success":true,"present":[],"states":{}}`},
			// In one that is not tracked.
			{"mesh/join-room", `{"roomName":"free"}`, `{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}],"connections":1}`},
			{"mesh/subscribe-presence", `{"roomName":"free"}`, `{"success":false,"present":[]}`},
			{"mesh/get-presence-state", `{"roomName":"free"}`, `{"success":false,"present":[]}`},
			{"mesh/publish-presence-state", `{"roomName":"free","state":{"a":1}}`, `false`},
			{"mesh/clear-presence-state", `{"roomName":"free"}`, `false`},
			// Where the guard says no: present, and blind.
			{"mesh/join-room", `{"roomName":"secret"}`, `{"success":true,"present":[]}`},
			{"mesh/subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`},
			{"mesh/get-presence-state", `{"roomName":"secret"}`, `{"success":false,"present":[]}`},
			{"mesh/publish-presence-state", `{"roomName":"secret","state":{"a":1}}`, `false`},
			{"mesh/clear-presence-state", `{"roomName":"secret"}`, `false`},
			{"mesh/get-room-metadata", `{"roomName":"secret"}`, `{"metadata":null}`},
			{"mesh/leave-room", `{"roomName":"secret"}`, `{"success":true}`},
			// Where it may not even join.
			{"mesh/join-room", `{"roomName":"closed"}`, `{"success":false,"present":[],"code":"EREFUSED"}`},
			{"mesh/get-presence-state", `{"roomName":"closed"}`, `{"success":true,"present":[],"states":{}}`},
			// What makes no sense.
			{"mesh/join-room", `{}`, `{"error":"invalid room name: it is empty","code":"EINVALID","name":"CommandError"}`},
			{"nope", `{}`, `{"error":"Command \"nope\" not found","code":"ENOTFOUND","name":"CommandError"}`},
			{"mesh/nope", `{}`, `{"error":"Command \"mesh/nope\" not found","code":"ENOTFOUND","name":"CommandError"}`},
		} {
			got := plain(t, p.Call(step.command, json.RawMessage(me(step.payload))))
			assert.JSONEq(t, me(step.want), got, "step %d: %s %s", i, step.command, step.payload)
			if strings.Contains(step.want, "12345678901234567890") {
				assert.Contains(t, got, "12345678901234567890", "digits are kept")
			}
		}
	})
}

func TestErrorAnswersHaveTheProtocolsShape(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		p := w.Tracked().Level2().Dial()
		p.Join("lobby")
		for _, c := range []struct{ command, payload, code string }{
			{"mesh/join-room", `{"roomName":""}`, "EINVALID"},
			{"mesh/join-room", `{"roomName":5}`, "EINVALID"},
			{"mesh/join-room", `[]`, "EINVALID"},
			{"mesh/join-room", `"lobby"`, "EINVALID"},
			{"mesh/leave-room", `{"roomName":"a\u0000b"}`, "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":5}`, "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":[1]}`, "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":{},"expireAfter":"1"}`, "EINVALID"},
			{"mesh/publish-presence-state", `{"roomName":"lobby","state":{},"expireAfter":1e300}`, "EINVALID"},
			{"mesh/get-connection-metadata", `{}`, "EINVALID"},
			{"mesh/get-connection-metadata", `{"connectionId":"a:b"}`, "EINVALID"},
			{"mesh/set-my-connection-metadata", `{"metadata":{"isAdmin":true}}`, "EREFUSED"},
		} {
			var e map[string]any
			require.NoError(t, json.Unmarshal(p.Call(c.command, json.RawMessage(c.payload)), &e))
			assert.Equal(t, c.code, e["code"], "%s %s: %v", c.command, c.payload, e)
			assert.Equal(t, "CommandError", e["name"])
			assert.NotEmpty(t, e["error"])
			assert.Len(t, e, 3, "%v", e)
		}
		// Nothing of it has taken effect, and the connection lives.
		assert.JSONEq(t, `{"success":true,"present":["`+p.ID+`"],"states":{}}`,
			plain(t, p.Call("mesh/get-presence-state", harness.InRoomPayload("lobby"))))
		assert.JSONEq(t, `{"metadata":null}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
	})
}

func TestFramesAsTheyAreOnTheWire(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		r := s.Raw() // the first frame has been read there
		assert.NotEmpty(t, r.ID)
		assert.NotContains(t, r.ID, ":")

		r.Send(`{"id":17,"command":"mesh/noop","payload":{}}`)
		assert.JSONEq(t, `{"id":17,"command":"mesh/noop","payload":true}`, r.Next())
		r.Send(` { "payload" : {} , "command" : "mesh\/noop" , "id" : 99999999 } `)
		assert.JSONEq(t, `{"id":99999999,"command":"mesh/noop","payload":true}`, r.Next())
		r.Send(`{"id":0,"command":"x"}`)
		assert.JSONEq(t, `{"id":0,"command":"x","payload":{"error":"Command \"x\" not found","code":"ENOTFOUND","name":"CommandError"}}`, r.Next())
		r.Send(`{"id":-1.5,"command":""}`)
		assert.JSONEq(t, `{"id":-1.5,"command":"","payload":{"error":"Command \"\" not found","code":"ENOTFOUND","name":"CommandError"}}`, r.Next())

		// None of these is answered, and those without an id are carried out.
		for _, text := range []string{
			``, `x`, `{`, `null`, `true`, `5`, `"mesh/noop"`, `[]`, `[{"id":1,"command":"mesh/noop"}]`, `{}`, `{"id":1}`,
			`{"id":1,"command":null}`, `{"id":1,"command":5}`, `{"id":1,"command":{}}`,
			"{\"id\":1,\"command\":\"mesh/noop\xff\"}",
			`{"command":"mesh/noop"}`, `{"id":null,"command":"mesh/noop"}`, `{"command":"nope"}`,
			`{"id":1,"command":"pong","payload":{}}`, `{"id":2,"command":"latency:response","payload":{}}`,
			`{"command":"mesh/join-room","payload":{"roomName":"lobby"}}`,
			`{"command":"mesh/join-room","payload":{"roomName":""}}`,
		} {
			require.NoError(t, r.WS.WriteMessage(1, []byte(text)))
		}
		require.NoError(t, r.WS.WriteMessage(2, []byte(`{"id":1,"command":"mesh/noop"}`)), "binary")
		r.Send(`{"id":18,"command":"mesh/noop","payload":{}}`)
		assert.JSONEq(t, `{"id":18,"command":"mesh/noop","payload":true}`, r.Next())
		w.Eventually(time.Second, func() bool { // no answer says when the join is done
			in, err := s.Rooms().Contains(t.Context(), "lobby", r.ID)
			require.NoError(t, err)
			return in
		}, "joined")

		// Pushes: no id; the answer to a subscription comes before them.
		r.Send(`{"id":19,"command":"mesh/subscribe-presence","payload":{"roomName":"push"}}`)
		var answer struct {
			Payload struct {
				Seq   uint64
				Epoch string
			}
		}
		text := r.Next()
		require.NoError(t, json.Unmarshal([]byte(text), &answer))
		assert.Contains(t, text, `"id":19`)
		other := s.Dial()
		require.NoError(t, s.Connections().SetMetadata(t.Context(), other.ID, map[string]any{"name": "bob"}, mesh.MetadataOptions{}))
		other.Join("push")
		first := other.ExpectPushed(t, r.Next(), `{"type":"join","roomName":"push","metadata":{"name":"bob"},"connections":1}`)
		other.State("push", map[string]any{"typing": true})
		second := other.ExpectPushed(t, r.Next(), `{"type":"state","roomName":"push","state":{"typing":true}}`)
		other.Call("mesh/clear-presence-state", harness.InRoomPayload("push"))
		third := other.ExpectPushed(t, r.Next(), `{"type":"state","roomName":"push","state":null}`)
		other.State("push", map[string]any{"typing": false})
		other.ExpectPushed(t, r.Next(), `{"type":"state","roomName":"push","state":{"typing":false}}`)
		other.Leave("push")
		last := other.ExpectPushed(t, r.Next(), `{"type":"leave","roomName":"push","reason":"left","connections":0}`)
		assert.Less(t, first.Seq, second.Seq)
		assert.Less(t, second.Seq, third.Seq)
		assert.Less(t, third.Seq, last.Seq)
		assert.Equal(t, first.Epoch, last.Epoch)
		assert.NotEmpty(t, first.Epoch)
	})
}

func TestPingsAndLatency(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server(func(o *mesh.Options) { o.LatencyInterval = 5 * time.Second })
		r := s.Raw()
		begun := time.Now()
		for i := range 5 {
			assert.JSONEq(t, `{"command":"latency:request","payload":{}}`, r.Next())
			assert.InDelta(t, float64(i+1)*5, time.Since(begun).Seconds(), 0.11)
			w.Sleep(20 * time.Millisecond)
			r.Send(`{"id":3,"command":"latency:response","payload":{}}`)
			var f harness.Frame
			require.NoError(t, json.Unmarshal([]byte(r.Next()), &f))
			assert.Equal(t, "latency", f.Command)
			assert.Nil(t, f.ID)
			assert.Equal(t, "20", string(f.Payload))
		}
		ping, request := r.Next(), r.Next()
		if strings.Contains(ping, "latency") {
			ping, request = request, ping
		}
		assert.JSONEq(t, `{"command":"ping","payload":{}}`, ping)
		assert.JSONEq(t, `{"command":"latency:request","payload":{}}`, request)
		assert.InDelta(t, 30, time.Since(begun).Seconds(), 0.11)
	})
}

func TestSilentConnectionsAreClosed(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.PingInterval = time.Second })
		watcher, deaf, talker := s.Dial(), s.Dial(), s.Dial()
		watcher.Subscribe("lobby")
		deaf.Join("lobby")
		talker.Join("lobby")
		begun := time.Now()
		deaf.Mute()
		talker.Mute()
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() { // it answers no ping, and sends something else
			defer close(done)
			for tick := time.NewTicker(700 * time.Millisecond); ; {
				select {
				case <-tick.C:
					_ = talker.Send(map[string]any{"command": "mesh/noop"})
				case <-stop:
					tick.Stop()
					return
				}
			}
		}()
		assert.Equal(t, 1011, deaf.Closed(5*time.Second))
		assert.InDelta(t, 3, time.Since(begun).Seconds(), 0.2, "pinged after 1 s, one more interval missed, then judged")
		watcher.Expect(time.Second, "leave", deaf.ID)
		w.Sleep(10 * time.Second)
		assert.Zero(t, watcher.Count("leave", talker.ID), "any frame is a sign of life")
		close(stop)
		<-done
		assert.EqualValues(t, 1, s.Stats().Closed["silent"])
	})
}

func TestPipelinedRequestsTakeEffectInOrder(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		const rounds = 20
		s1, s2 := w.Tracked(harness.NoCommandLimit), w.Tracked(harness.NoCommandLimit)
		watcher, p := s2.Dial(), s1.Dial()
		watcher.Subscribe("lobby")
		for i := range rounds {
			require.NoError(t, p.Send(map[string]any{"command": "mesh/join-room", "payload": harness.InRoomPayload("lobby")}))
			require.NoError(t, p.Send(map[string]any{"command": "mesh/publish-presence-state",
				"payload": map[string]any{"roomName": "lobby", "state": map[string]any{"i": i}}}))
			require.NoError(t, p.Send(map[string]any{"command": "mesh/clear-presence-state", "payload": harness.InRoomPayload("lobby")}))
			require.NoError(t, p.Send(map[string]any{"command": "mesh/leave-room", "payload": harness.InRoomPayload("lobby")}))
		}
		w.Eventually(5*time.Second, func() bool { return len(watcher.Got()) >= 4*rounds }, "%d updates", 4*rounds)
		var want, got []string
		for i := range rounds {
			want = append(want, "join ", fmt.Sprintf(`state {"i":%d}`, i), "state null", "leave ")
		}
		for _, u := range watcher.Got() {
			got = append(got, u.Type+" "+string(u.State))
		}
		assert.Equal(t, want, got)
		last := uint64(0)
		for _, u := range watcher.Got() {
			assert.Greater(t, u.Seq, last)
			last = u.Seq
		}
		in, err := s2.Rooms().Contains(t.Context(), "lobby", p.ID)
		require.NoError(t, err)
		assert.False(t, in)
	})
}

func TestSlowHandlersDoNotHoldUpPresence(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked(func(o *mesh.Options) { o.HandlerConcurrency = 2 })
		release := make(chan struct{})
		require.NoError(t, s.HandleCommand("slow", func(ctx context.Context, _ *mesh.Connection, _ json.RawMessage) (any, error) {
			select {
			case <-release:
			case <-ctx.Done():
			}
			return "late", nil
		}))
		r := s.Raw()
		r.Send(`{"id":1,"command":"slow"}`)
		r.Send(`{"id":2,"command":"slow"}`)
		r.Send(`{"id":3,"command":"slow"}`) // waits for one of them
		r.Send(`{"id":4,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
		assert.Contains(t, r.Next(), `"id":4`, "answers may overtake each other")
		close(release)
		all := []string{r.Next(), r.Next(), r.Next()}
		slices.Sort(all)
		for i, answer := range all {
			assert.JSONEq(t, fmt.Sprintf(`{"id":%d,"command":"slow","payload":"late"}`, i+1), answer)
		}
	})
}

func TestJoinAnswerCostsNoCommandPerMember(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		const members = 60
		want := make(map[string]string)
		for i := range members {
			id := fmt.Sprintf("member%d", i)
			meta := map[string]any{"user": i}
			require.NoError(t, s2.Presence().Connect(t.Context(), id, meta))
			require.NoError(t, s2.Presence().Join(t.Context(), "lobby", id))
			want[id] = fmt.Sprintf(`{"user":%d}`, i)
		}
		for range 2 { // from Redis; and, when the room is watched here, from the mirror
			p := s1.Dial()
			want[p.ID] = ""
			before := s1.Stats().RedisCalls
			var present []mesh.Member
			require.NoError(t, json.Unmarshal(p.Join("lobby").Present, &present))
			calls := s1.Stats().RedisCalls - before
			assert.Less(t, calls, uint64(members))
			if w.Virtual { // else heartbeats come in between
				assert.LessOrEqual(t, calls, uint64(6), "joining, reading, perhaps a heartbeat")
			}
			got := make(map[string]string)
			for _, m := range present {
				got[m.ID] = strings.TrimSuffix(string(m.Metadata), "null")
			}
			assert.Equal(t, want, got)
			s1.Dial().Subscribe("lobby")
		}
	})
}

func TestSubscribersInTheRoomAreToldAboutThemselves(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		p := w.Tracked().Dial()
		p.Subscribe("lobby")
		p.Join("lobby")
		p.Expect(time.Second, "join", p.ID)
		require.Equal(t, "true", p.State("lobby", map[string]any{"a": 1}))
		p.Expect(time.Second, "state", p.ID)
		p.Leave("lobby")
		p.Expect(time.Second, "leave", p.ID)
		w.Sleep(100 * time.Millisecond)
		assert.Len(t, p.Got(), 3, "%v: no state null after a leave", p.Got())
	})
}

func TestSubscribingAgain(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		watcher, a, b := s.Dial(), s.Dial(), s.Dial()
		watcher.Subscribe("lobby")
		a.Join("lobby")
		watcher.Expect(time.Second, "join", a.ID)
		assert.Equal(t, []string{a.ID}, watcher.Subscribe("lobby").IDs(t), "a new snapshot")
		b.Join("lobby")
		watcher.Expect(time.Second, "join", b.ID)
		b.Leave("lobby")
		watcher.Expect(time.Second, "leave", b.ID)
		w.Sleep(100 * time.Millisecond)
		assert.Len(t, watcher.Got(), 3, "each once: %v", watcher.Got())
		assert.Equal(t, 1, s.Stats().Subscriptions)

		assert.Equal(t, "true", string(watcher.Call("mesh/unsubscribe-presence", harness.InRoomPayload("lobby"))))
		assert.Equal(t, "false", string(watcher.Call("mesh/unsubscribe-presence", harness.InRoomPayload("lobby"))))
		b.Join("lobby")
		w.Sleep(100 * time.Millisecond)
		assert.Len(t, watcher.Got(), 3, "nothing after the end")
		assert.ElementsMatch(t, []string{a.ID, b.ID}, watcher.Subscribe("lobby").IDs(t))
	})
}

func TestStatesInSnapshots(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s1, s2 := w.Tracked(), w.Tracked()
		early, a, b := s1.Dial(), s1.Dial(), s2.Dial()
		early.Subscribe("lobby")
		a.Join("lobby")
		b.Join("lobby")
		require.Equal(t, "true", a.State("lobby", map[string]any{"x": 1}))
		require.Equal(t, "true", b.State("lobby", map[string]any{"y": 2}, map[string]any{"silent": true}))
		early.Expect(time.Second, "state", a.ID)
		// The silent one comes to the mirror as an event, too, of which nobody is told.
		w.Eventually(2*time.Second, func() bool {
			return len(early.Room("mesh/get-presence-state", "lobby").States) == 2
		}, "both states where the room is watched")
		for name, s := range map[string]*harness.Server{"where it is watched": s1, "where it is not": s2} {
			var states map[string]json.RawMessage
			w.Eventually(time.Second, func() bool { // nobody is told when the silent one is there
				states = s.Dial().Subscribe("lobby").States
				return len(states) == 2
			}, "%s: %v", name, states)
			assert.JSONEq(t, `{"x":1}`, string(states[a.ID]), name)
			assert.JSONEq(t, `{"y":2}`, string(states[b.ID]), "%s: silent ones too", name)
		}
		assert.Zero(t, early.Count("state", b.ID), "and nobody was told")

		require.Equal(t, "true", b.State("lobby", map[string]any{"z": 3}, map[string]any{"expireAfter": 300}))
		begun := time.Now()
		w.Eventually(2*time.Second, func() bool { return early.Count("state", b.ID) == 2 }, "the state and its end")
		assert.GreaterOrEqual(t, time.Since(begun), 250*time.Millisecond)
		got := early.Got()
		assert.Equal(t, "null", string(got[len(got)-1].State))
	})
}

func TestClientMetadata(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		var seen atomic.Value
		s := w.Tracked(func(o *mesh.Options) {
			o.ClientMetadata = func(_ context.Context, m mesh.Member, proposed json.RawMessage) (any, error) {
				seen.Store([2]string{string(m.Metadata), string(proposed)})
				switch {
				case strings.Contains(string(proposed), "isAdmin"):
					return nil, errors.New("not you")
				case strings.Contains(string(proposed), "forbidden"):
					return nil, &mesh.CommandError{Code: "ENOTYOU", Message: "no"}
				case strings.Contains(string(proposed), "panic"):
					panic("secret text")
				case strings.Contains(string(proposed), "shorten"):
					return map[string]any{"short": true}, nil
				}
				return proposed, nil
			}
		})
		p := s.Dial()
		set := func(metadata, strategy string) string {
			options := ""
			if strategy != "" {
				options = `,"options":{"strategy":"` + strategy + `"}`
			}
			return string(p.Call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":`+metadata+options+`}`)))
		}
		mine := func() string { return string(p.Call("mesh/get-my-connection-metadata", nil)) }
		for i, step := range []struct{ metadata, strategy, answer, after string }{
			{`{"a":1,"in":{"x":1,"list":[1,2]}}`, "", `{"success":true}`, `{"a":1,"in":{"x":1,"list":[1,2]}}`},
			{`{"b":2}`, "merge", `{"success":true}`, `{"a":1,"b":2,"in":{"x":1,"list":[1,2]}}`},
			{`{"in":{"y":2,"list":[3]}}`, "deepMerge", `{"success":true}`, `{"a":1,"b":2,"in":{"x":1,"y":2,"list":[3]}}`},
			{`{"in":{"z":3}}`, "merge", `{"success":true}`, `{"a":1,"b":2,"in":{"z":3}}`},
			{`{"c":3}`, "replace", `{"success":true}`, `{"c":3}`},
			{`[1]`, "merge", `{"success":true}`, `[1]`},
			{`{"d":4}`, "deepMerge", `{"success":true}`, `{"d":4}`},
			{`{"e":5}`, "sideways", `{"error":"invalid metadata: unknown metadata strategy \"sideways\"","code":"EINVALID","name":"CommandError"}`, `{"d":4}`},
			{`{"isAdmin":true}`, "merge", `{"error":"not you","code":"ESERVER","name":"Error"}`, `{"d":4}`},
			{`{"forbidden":true}`, "", `{"error":"no","code":"ENOTYOU","name":"CommandError"}`, `{"d":4}`},
			{`"panic"`, "", `{"error":"Internal error","code":"ESERVER","name":"Error"}`, `{"d":4}`},
			{`{"shorten":"me"}`, "merge", `{"success":true}`, `{"short":true}`},
			{`null`, "", `{"success":true}`, `null`},
		} {
			got := set(step.metadata, step.strategy)
			if step.strategy == "sideways" {
				assert.Contains(t, got, `"EINVALID"`)
			} else {
				assert.JSONEq(t, step.answer, got, "step %d", i)
			}
			assert.JSONEq(t, `{"metadata":`+step.after+`}`, mine(), "step %d", i)
			if i == 1 {
				assert.Equal(t, [2]string{`{"a":1,"in":{"x":1,"list":[1,2]}}`, `{"a":1,"in":{"x":1,"list":[1,2]},"b":2}`}, seen.Load(),
					"what is there, and what would be")
			}
		}
	})
}
