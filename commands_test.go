package mesh_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/internal/wire"
	"github.com/meshpresence/mesh/meshtest"
)

// joinedAt is the time of a join in a list of members.
var joinedAt = regexp.MustCompile(`,"joinedAt":[1-9]\d{11,12}`)

// withoutAdditions returns an answer without the fields that this server adds to the
// protocol: seq, epoch and level, and the times of joins. An answer must have both seq
// and epoch or neither.
func withoutAdditions(t *testing.T, answer json.RawMessage) string {
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
			// Before the first join.
			{"mesh/get-my-connection-metadata", `{}`, `{"metadata":null}`},
			{"mesh/get-connection-metadata", `{"connectionId":"ME"}`, `{"metadata":null}`},
			{"mesh/get-connection-metadata", `{"connectionId":"unknown"}`, `{"metadata":null}`},
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
			// In a room that is not tracked.
			{"mesh/join-room", `{"roomName":"free"}`, `{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}],"connections":1}`},
			{"mesh/subscribe-presence", `{"roomName":"free"}`, `{"success":false,"present":[]}`},
			{"mesh/get-presence-state", `{"roomName":"free"}`, `{"success":false,"present":[]}`},
			{"mesh/publish-presence-state", `{"roomName":"free","state":{"a":1}}`, `false`},
			{"mesh/clear-presence-state", `{"roomName":"free"}`, `false`},
			// In a room whose guard refuses. The connection may join, but sees nothing.
			{"mesh/join-room", `{"roomName":"secret"}`, `{"success":true,"present":[]}`},
			{"mesh/subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`},
			{"mesh/get-presence-state", `{"roomName":"secret"}`, `{"success":false,"present":[]}`},
			{"mesh/publish-presence-state", `{"roomName":"secret","state":{"a":1}}`, `false`},
			{"mesh/clear-presence-state", `{"roomName":"secret"}`, `false`},
			{"mesh/get-room-metadata", `{"roomName":"secret"}`, `{"metadata":null}`},
			{"mesh/leave-room", `{"roomName":"secret"}`, `{"success":true}`},
			// In a room whose join guard refuses.
			{"mesh/join-room", `{"roomName":"closed"}`, `{"success":false,"present":[],"code":"EREFUSED"}`},
			{"mesh/get-presence-state", `{"roomName":"closed"}`, `{"success":true,"present":[],"states":{}}`},
			// Invalid requests.
			{"mesh/join-room", `{}`, `{"error":"invalid room name: it is empty","code":"EINVALID","name":"CommandError"}`},
			{"nope", `{}`, `{"error":"Command \"nope\" not found","code":"ENOTFOUND","name":"CommandError"}`},
			{"mesh/nope", `{}`, `{"error":"Command \"mesh/nope\" not found","code":"ENOTFOUND","name":"CommandError"}`},
		} {
			got := withoutAdditions(t, p.Call(step.command, json.RawMessage(me(step.payload))))
			assert.JSONEq(t, me(step.want), got, "step %d: %s %s", i, step.command, step.payload)
			if strings.Contains(step.want, "12345678901234567890") {
				assert.Contains(t, got, "12345678901234567890", "all digits are kept")
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
		// None of the requests had an effect, and the connection is still open.
		assert.JSONEq(t, `{"success":true,"present":["`+p.ID+`"],"states":{}}`,
			withoutAdditions(t, p.Call("mesh/get-presence-state", harness.InRoomPayload("lobby"))))
		assert.JSONEq(t, `{"metadata":null}`, string(p.Call("mesh/get-my-connection-metadata", nil)))
	})
}

func TestFramesOnTheWire(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		r := s.Raw() // has read the first frame
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

		// None of these is answered. Valid commands without an id are carried out.
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
		w.Eventually(time.Second, func() bool { // the join has no answer to wait for
			in, err := s.Rooms().Contains(t.Context(), "lobby", r.ID)
			require.NoError(t, err)
			return in
		}, "joined")

		// Pushes have no id. The answer to a subscribe request comes before them.
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
		watcher, silent, talker := s.Dial(), s.Dial(), s.Dial()
		watcher.Subscribe("lobby")
		silent.Join("lobby")
		talker.Join("lobby")
		begun := time.Now()
		silent.Mute()
		talker.Mute()
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() { // talker answers no ping, but sends other frames
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
		assert.Equal(t, 1011, silent.Closed(5*time.Second))
		assert.InDelta(t, 3, time.Since(begun).Seconds(), 0.2, "one interval until the ping, one to answer it, and one of MaxMissedPongs")
		watcher.Expect(time.Second, "leave", silent.ID)
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

func TestSlowHandlersDoNotDelayPresence(t *testing.T) {
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
		r.Send(`{"id":3,"command":"slow"}`) // waits until one of the others has returned
		r.Send(`{"id":4,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
		assert.Contains(t, r.Next(), `"id":4`, "the join is answered first")
		close(release)
		all := []string{r.Next(), r.Next(), r.Next()}
		slices.Sort(all)
		for i, answer := range all {
			assert.JSONEq(t, fmt.Sprintf(`{"id":%d,"command":"slow","payload":"late"}`, i+1), answer)
		}
	})
}

func TestJoinAnswerNeedsNoCommandPerMember(t *testing.T) {
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
		for range 2 { // the second answer comes from the mirror, because the room is watched by then
			p := s1.Dial()
			want[p.ID] = ""
			before := s1.Stats().RedisCalls
			var present []mesh.Member
			require.NoError(t, json.Unmarshal(p.Join("lobby").Present, &present))
			calls := s1.Stats().RedisCalls - before
			assert.Less(t, calls, uint64(members))
			if w.Virtual { // in real time there may be several heartbeats
				assert.LessOrEqual(t, calls, uint64(6), "a join, a read and perhaps a heartbeat")
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

func TestSubscribersInTheRoomSeeTheirOwnUpdates(t *testing.T) {
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
		assert.Len(t, watcher.Got(), 3, "each update once: %v", watcher.Got())
		assert.Equal(t, 1, s.Stats().Subscriptions)

		assert.Equal(t, "true", string(watcher.Call("mesh/unsubscribe-presence", harness.InRoomPayload("lobby"))))
		assert.Equal(t, "false", string(watcher.Call("mesh/unsubscribe-presence", harness.InRoomPayload("lobby"))))
		b.Join("lobby")
		w.Sleep(100 * time.Millisecond)
		assert.Len(t, watcher.Got(), 3, "no update after the subscription has ended")
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
		// A silent state reaches the mirror as an event that is not delivered.
		w.Eventually(2*time.Second, func() bool {
			return len(early.Room("mesh/get-presence-state", "lobby").States) == 2
		}, "both states in the mirror")
		for name, s := range map[string]*harness.Server{"watched": s1, "not watched": s2} {
			var states map[string]json.RawMessage
			w.Eventually(time.Second, func() bool { // no update shows when the silent state has arrived
				states = s.Dial().Subscribe("lobby").States
				return len(states) == 2
			}, "%s: %v", name, states)
			assert.JSONEq(t, `{"x":1}`, string(states[a.ID]), name)
			assert.JSONEq(t, `{"y":2}`, string(states[b.ID]), "%s: the silent state", name)
		}
		assert.Zero(t, early.Count("state", b.ID), "a silent state is not delivered")

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
					"the metadata before the change, and the proposed metadata")
			}
		}
	})
}

// TestCostOfJoinAnswers lets connections join a room one after the other, on two
// servers. Each answer must contain all earlier members. Once the room has a mirror,
// answers come from it, so that Redis has no work apart from the joins.
func TestCostOfJoinAnswers(t *testing.T) {
	t.Parallel()
	w := harness.RealWorld(t)
	c := harness.NewCosts(t, w)
	defer c.Print()
	s, other := w.Tracked(), w.Tracked()
	channel := testhook.PartsOf(s.Server).Keys.EventsPrefix() + "lobby"
	listeners := func() int64 {
		counts, err := c.Admin.PubSubNumSub(t.Context(), channel).Result()
		require.NoError(t, err)
		return counts[channel]
	}
	joined := map[string]bool{}
	join := func(s *harness.Server) *harness.Peer {
		p := s.Dial()
		joined[p.ID] = true
		ids := p.Join("lobby").IDs(t)
		assert.Len(t, ids, len(joined))
		for _, id := range ids {
			assert.True(t, joined[id], id)
		}
		return p
	}
	join(other)
	join(other)
	join(other)
	join(s)
	assert.Zero(t, listeners(), "a few joins start no mirror")
	mirrored := func() bool {
		_, ok := testhook.PartsOf(s.Server).Hub.View("lobby")
		return ok
	}
	for range 2 {
		join(s)
	}
	w.Eventually(5*time.Second, mirrored, "the room is mirrored")

	const more = 20
	c.Measure("join through the socket, room busy", 2*more, func() {
		for range more {
			join(s)
			join(other) // the answers are complete with or without a mirror
		}
	})
	w.Eventually(5*time.Second, func() bool { _, ok := testhook.PartsOf(other.Server).Hub.View("lobby"); return ok }, "the other server has a mirror too")
	got := c.Measure("join through the socket, room mirrored", more, func() {
		for range more {
			join(s)
		}
	})
	// If an event takes longer than a quarter of a second, the server reads from Redis.
	assert.LessOrEqual(t, got["hscan"], more, "%v", got)
	w.Eventually(20*time.Second, func() bool { return listeners() == 0 }, "the mirrors end after the last join")
}

// TestAnswersToSimultaneousJoins checks that the answer to a join contains all members
// whose joins were answered before this join was sent.
func TestAnswersToSimultaneousJoins(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		const many = 40
		peers := make([]*harness.Peer, many)
		for i := range peers {
			peers[i] = s.Dial()
		}
		var mu sync.Mutex // guards done
		done := map[string]bool{}
		var joining sync.WaitGroup
		for _, p := range peers {
			joining.Go(func() {
				mu.Lock()
				before := fmt.Sprint(done)
				want := make([]string, 0, len(done)+1)
				for id := range done {
					want = append(want, id)
				}
				mu.Unlock()
				ids := p.Join("lobby").IDs(t)
				assert.Subset(t, ids, append(want, p.ID), before)
				mu.Lock()
				done[p.ID] = true
				mu.Unlock()
			})
		}
		joining.Wait()
	})
}

// TestRefusalsOfTheSocketByLevel checks the answers of the socket itself, to a command
// beyond a limit or one that panicked. At level 1, a command that answers false if it
// fails gets false from the socket too.
func TestRefusalsOfTheSocketByLevel(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Server()
		p := s.Dial()
		c, ok := s.Connection(p.ID)
		require.True(t, ok)
		req := wire.Request{ID: "7", HasID: true, Command: "mesh/publish-presence-state"}
		assert.JSONEq(t, `{"id":7,"command":"mesh/publish-presence-state","payload":false}`, string(c.Refuse(req, "m", "EBUSY", "n").Bytes()))
		req.Command = "mesh/join-room"
		assert.JSONEq(t, `{"id":7,"command":"mesh/join-room","payload":{"error":"m","code":"EBUSY","name":"n"}}`, string(c.Refuse(req, "m", "EBUSY", "n").Bytes()))
		p = s.Level2().Dial()
		c, _ = s.Connection(p.ID)
		req.Command = "mesh/publish-presence-state"
		assert.JSONEq(t, `{"id":7,"command":"mesh/publish-presence-state","payload":{"error":"m","code":"EOWN","name":"n"}}`,
			string(c.Refuse(req, "m", "EOWN", "n").Bytes()))
		assert.EqualValues(t, 1, s.Stats().CommandsFailed["EBUSY"])
		assert.EqualValues(t, 1, s.Stats().CommandsFailed["other"])
	})
}

// FuzzFrames sends each input to a running server as one text frame. The connection
// must stay open or be closed with a code, nothing may panic, and another connection
// must still be served.
func FuzzFrames(f *testing.F) {
	for _, command := range mesh.CommandNames() {
		for _, payload := range []string{
			`{"roomName":"a"}`, `{"roomName":"guarded"}`, `{"roomName":"a","state":{"x":1},"expireAfter":5,"silent":true}`,
			`{"connectionId":"x"}`, `{"metadata":{"a":{"b":1}},"options":{"strategy":"deepMerge"}}`, `null`, `[]`,
		} {
			f.Add(fmt.Sprintf(`{"id":1,"command":%q,"payload":%s}`, command, payload))
		}
	}
	for _, text := range []string{
		``, `null`, `{}`, `[]`, `{"command":"echo","id":1,"payload":"x"}`, `{"id":1e400,"command":"mesh/noop"}`,
		`{"id":-0,"command":"mesh\/join-room","payload":{"roomName":"\ud800"}}`, `{"command":"pong"}`, `{"command":"latency:response"}`,
		"\xff", `{"id":1,"id":2,"command":"a","command":"mesh/noop"}`, `{"id":1,"command":"mesh/join-room","payload":{"roomName":"a:conn:b{}*"}}`,
	} {
		f.Add(text)
	}
	f.Fuzz(newFuzzServer(f).tryFrame)
}

// fuzzServer is the server that receives all inputs of a fuzz test.
type fuzzServer struct {
	srv       *mesh.Server
	listener  *harness.PipeListener
	neighbour *websocket.Conn // a connection that no input is sent to
}

func newFuzzServer(f *testing.F) *fuzzServer {
	r := meshtest.StartRedis(f)
	opts := mesh.Options{
		Redis: r.Client(), LatencyInterval: -1,
		Limits: mesh.Limits{CommandsPerSecond: -1, UpgradesPerSecond: -1, FrameBytes: 16 << 10},
	}
	harness.AllowMetadata(&opts)
	srv, err := mesh.NewServer(opts)
	require.NoError(f, err)
	require.NoError(f, srv.TrackPresence(mesh.Regexp(regexp.MustCompile(`^[^x]`)), mesh.PresenceOptions{TTL: time.Second}))
	require.NoError(f, srv.TrackPresence(mesh.Exact("guarded"), mesh.PresenceOptions{Guard: harness.AdminsOnly, JoinGuard: harness.AdminsOnly}))
	require.NoError(f, srv.HandleCommand("echo", func(_ context.Context, _ *mesh.Connection, payload json.RawMessage) (any, error) {
		return payload, nil
	}))
	require.NoError(f, srv.Start(f.Context()))
	z := &fuzzServer{srv: srv, listener: harness.NewPipeListener()}
	h := &http.Server{Handler: srv}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = h.Serve(z.listener)
	}()
	f.Cleanup(func() {
		// f.Context() has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(f, srv.Shutdown(ctx))
		_ = h.Close()
		<-done
	})
	z.neighbour = z.dial(f)
	f.Cleanup(func() { _ = z.neighbour.Close() })
	return z
}

// dial opens a WebSocket. It is no client of meshtest, because these tests look at the text
// of every frame: whatever was sent, all of it must be JSON.
func (z *fuzzServer) dial(t testing.TB) *websocket.Conn {
	d := websocket.Dialer{NetDialContext: z.listener.Dial}
	ws, _, err := d.Dial("ws://127.0.0.1/ws", nil)
	require.NoError(t, err)
	_, first, err := ws.ReadMessage()
	require.NoError(t, err)
	require.Contains(t, string(first), "mesh/assign-id")
	return ws
}

// alive sends a request and reads frames until the answer. It returns an error if the
// connection ends.
func alive(ws *websocket.Conn) error {
	if err := ws.SetReadDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return err
	}
	// The write may fail, because a server that closes the connection may not read.
	_ = ws.WriteMessage(websocket.TextMessage, []byte(`{"id":98765432,"command":"mesh/noop"}`))
	for {
		_, data, err := ws.ReadMessage()
		if err != nil {
			return err
		}
		var f struct{ Command string }
		if err := json.Unmarshal(data, &f); err != nil {
			return fmt.Errorf("not JSON: %q: %w", data, err)
		}
		if strings.HasPrefix(string(data), `{"id":98765432,"command":"mesh/noop"`) {
			return nil
		}
	}
}

// tryFrame sends one input as a text frame.
func (z *fuzzServer) tryFrame(t *testing.T, text string) {
	ws := z.dial(t)
	defer func() { _ = ws.Close() }()
	_ = ws.SetWriteDeadline(time.Now().Add(5 * time.Second))
	_ = ws.WriteMessage(websocket.TextMessage, []byte(text)) // fails if the server closes the connection during the write
	if err := alive(ws); err != nil {
		require.NotZero(t, harness.CloseCodeOf(err), "ended without a code: %v", err)
		require.Greater(t, len(text), 16<<10, "closed without a reason: %v", err)
	}
	require.NoError(t, alive(z.neighbour), "the neighbour")
	require.Zero(t, testhook.SocketPanics(z.srv))
	require.Zero(t, z.srv.Stats().CallbackPanics)
}

// FuzzPayloads sends a command with each input as the payload. Valid JSON must get
// exactly one answer. An error must have a code, and not one of an internal error.
func FuzzPayloads(f *testing.F) {
	names := mesh.CommandNames()
	for i := range names {
		for _, payload := range []string{
			`{"roomName":"a"}`, `{"roomName":"guarded"}`, `{"roomName":"a","state":{"x":1.50,"x":"\ud800"},"expireAfter":5.5,"silent":true}`,
			`{"roomName":"\ud800"}`, `{"ROOMNAME":"a","roomname":"b"}`, `{"connectionId":"x:y"}`, `{"connectionId":"*"}`,
			`{"metadata":{"a":{"b":1},"a":[]},"options":{"strategy":"deepMerge"}}`, `{"metadata":null,"options":{"strategy":"x"}}`,
			`{"metadata":1,"options":null}`, `null`, `[]`, `{"roomName":"a","state":{},"expireAfter":9.2e12}`, `{"roomName":{"a":1}}`,
		} {
			f.Add(byte(i), payload)
		}
	}
	z := newFuzzServer(f)
	p := &payloads{z: z, ws: z.dial(f)} // one connection for all inputs, because dialing costs more than a command
	f.Cleanup(func() { _ = p.ws.Close() })
	f.Fuzz(func(t *testing.T, n byte, payload string) {
		if len(payload) > 15<<10 {
			return // FuzzFrames covers frames that are too large
		}
		defer func() {
			if t.Failed() { // the next input must not see answers to this one
				_ = p.ws.Close()
				p.ws = z.dial(t)
			}
		}()
		p.try(t, names[int(n)%len(names)], payload)
	})
}

// payloads sends requests over one connection.
type payloads struct {
	z  *fuzzServer
	ws *websocket.Conn
	id int64 // of the last request
}

// send writes a request with a new id and the payload as it is.
func (p *payloads) send(t *testing.T, command, payload string) int64 {
	p.id++
	text := fmt.Sprintf(`{"id":%d,"command":%q,"payload":%s}`, p.id, command, payload)
	require.NoError(t, p.ws.WriteMessage(websocket.TextMessage, []byte(text)))
	return p.id
}

// try sends one command. Answers may come in any order, each once.
func (p *payloads) try(t *testing.T, command, payload string) {
	req, err := wire.Decode([]byte(`{"id":0,"command":"` + command + `","payload":` + payload + `}`))
	if err == nil && (req.ID != "0" || req.Command != command) {
		return // the payload changed other fields of the frame
	}
	waiting := map[int64]bool{}
	if command == wire.CommandPublishPresenceState || command == wire.CommandClearPresenceState {
		waiting[p.send(t, wire.CommandJoinRoom, `{"roomName":"a"}`)] = true
	}
	if id := p.send(t, command, payload); err == nil {
		waiting[id] = true
	}
	waiting[p.send(t, wire.CommandNoop, `{}`)] = true
	for len(waiting) > 0 {
		require.NoError(t, p.ws.SetReadDeadline(time.Now().Add(20*time.Second)))
		_, data, err := p.ws.ReadMessage()
		require.NoError(t, err, "%s %q", command, payload)
		require.True(t, utf8.Valid(data) && json.Valid(data), "%q", data)
		var a harness.Frame
		require.NoError(t, json.Unmarshal(data, &a))
		if a.ID == nil {
			continue
		}
		require.True(t, waiting[*a.ID], "unexpected answer %s after %s %q", data, command, payload)
		delete(waiting, *a.ID)
		checkAnswer(t, payload, a.Payload)
	}
	require.Zero(t, testhook.SocketPanics(p.z.srv))
	require.Zero(t, p.z.srv.Stats().CallbackPanics)
}

// checkAnswer fails the test if an answer is an error without a code or an internal
// error.
func checkAnswer(t *testing.T, text string, answer json.RawMessage) {
	var e struct{ Error, Code, Name *string }
	if json.Unmarshal(answer, &e) != nil || e.Error == nil {
		return
	}
	require.NotNil(t, e.Code, "%s: %s", text, answer)
	require.NotNil(t, e.Name)
	require.NotContains(t, []string{"", "ESERVER", "ECLOSED"}, *e.Code, "%s: %s", text, answer)
}
