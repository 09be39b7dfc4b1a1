package mesh

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// plain returns an answer without the fields that this server adds to the
// protocol's, where a room stands; together they must be there or not.
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
	out, err := json.Marshal(fields)
	require.NoError(t, err)
	return string(out)
}

func inRoomPayload(room string) map[string]any { return map[string]any{"roomName": room} }

// allowMetadata lets clients set whatever they like.
func allowMetadata(o *Options) {
	o.ClientMetadata = func(_ context.Context, _ Member, proposed json.RawMessage) (any, error) { return proposed, nil }
}

func TestEveryCommandsAnswer(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.server(allowMetadata)
		require.NoError(t, s.TrackPresence(Exact("lobby"), PresenceOptions{}))
		no := func(context.Context, Member, string) (bool, error) { return false, nil }
		require.NoError(t, s.TrackPresence(Exact("secret"), PresenceOptions{Guard: no}))
		require.NoError(t, s.TrackPresence(Exact("closed"), PresenceOptions{JoinGuard: no}))
		require.NoError(t, s.Rooms().SetMetadata(t.Context(), "lobby", map[string]any{"topic": "x"}, MetadataOptions{}))
		require.NoError(t, s.Rooms().SetMetadata(t.Context(), "secret", "hidden", MetadataOptions{}))
		p := s.dial()
		me := func(text string) string { return strings.ReplaceAll(text, "ME", p.id) }

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
			{"mesh/subscribe-presence", `{"roomName":"lobby"}`, `{"success":true,"present":[],"states":{}}`},
			{"mesh/unsubscribe-presence", `{"roomName":"lobby"}`, `true`},
			{"mesh/unsubscribe-presence", `{"roomName":"lobby"}`, `false`},
			// In a tracked room.
			{"mesh/join-room", `{"roomName":"lobby"}`, `{"success":true,"present":[{"id":"ME","metadata":null}]}`},
			{"mesh/join-room", `{"roomName":"lobby"}`, `{"success":true,"present":[{"id":"ME","metadata":null}]}`},
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
				`{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}],"states":{"ME":{"a":1}}}`},
			{"mesh/join-room", `{"roomName":"lobby"}`, `{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}]}`},
			{"mesh/get-room-metadata", `{"roomName":"lobby"}`, `{"metadata":{"topic":"x"}}`},
			{"mesh/get-room-metadata", `{"roomName":"other"}`, `{"metadata":null}`},
			{"mesh/leave-room", `{"roomName":"lobby"}`, `{"success":true}`},
			{"mesh/get-presence-state", `{"roomName":"lobby"}`, `{"success":true,"present":[],"states":{}}`},
			// In one that is not tracked.
			{"mesh/join-room", `{"roomName":"free"}`, `{"success":true,"present":[{"id":"ME","metadata":{"name":"ann"}}]}`},
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
			{"mesh/join-room", `{"roomName":"closed"}`, `{"success":false,"present":[]}`},
			{"mesh/get-presence-state", `{"roomName":"closed"}`, `{"success":true,"present":[],"states":{}}`},
			// What makes no sense.
			{"mesh/join-room", `{}`, `{"error":"invalid room name: it is empty","code":"EINVALID","name":"CommandError"}`},
			{"nope", `{}`, `{"error":"Command \"nope\" not found","code":"ENOTFOUND","name":"CommandError"}`},
			{"mesh/nope", `{}`, `{"error":"Command \"mesh/nope\" not found","code":"ENOTFOUND","name":"CommandError"}`},
		} {
			got := plain(t, p.call(step.command, json.RawMessage(me(step.payload))))
			assert.JSONEq(t, me(step.want), got, "step %d: %s %s", i, step.command, step.payload)
			if strings.Contains(step.want, "12345678901234567890") {
				assert.Contains(t, got, "12345678901234567890", "digits are kept")
			}
		}
	})
}

func TestErrorAnswersHaveTheProtocolsShape(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		p := w.tracked().dial()
		p.join("lobby")
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
			require.NoError(t, json.Unmarshal(p.call(c.command, json.RawMessage(c.payload)), &e))
			assert.Equal(t, c.code, e["code"], "%s %s: %v", c.command, c.payload, e)
			assert.Equal(t, "CommandError", e["name"])
			assert.NotEmpty(t, e["error"])
			assert.Len(t, e, 3, "%v", e)
		}
		// Nothing of it has taken effect, and the connection lives.
		assert.JSONEq(t, `{"success":true,"present":["`+p.id+`"],"states":{}}`,
			plain(t, p.call("mesh/get-presence-state", inRoomPayload("lobby"))))
		assert.JSONEq(t, `{"metadata":null}`, string(p.call("mesh/get-my-connection-metadata", nil)))
	})
}

func TestFramesAsTheyAreOnTheWire(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked()
		r := s.raw() // the first frame has been read there
		assert.NotEmpty(t, r.id)
		assert.NotContains(t, r.id, ":")

		r.send(`{"id":17,"command":"mesh/noop","payload":{}}`)
		assert.JSONEq(t, `{"id":17,"command":"mesh/noop","payload":true}`, r.next())
		r.send(` { "payload" : {} , "command" : "mesh\/noop" , "id" : 99999999 } `)
		assert.JSONEq(t, `{"id":99999999,"command":"mesh/noop","payload":true}`, r.next())
		r.send(`{"id":0,"command":"x"}`)
		assert.JSONEq(t, `{"id":0,"command":"x","payload":{"error":"Command \"x\" not found","code":"ENOTFOUND","name":"CommandError"}}`, r.next())
		r.send(`{"id":-1.5,"command":""}`)
		assert.JSONEq(t, `{"id":-1.5,"command":"","payload":{"error":"Command \"\" not found","code":"ENOTFOUND","name":"CommandError"}}`, r.next())

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
			require.NoError(t, r.ws.WriteMessage(1, []byte(text)))
		}
		require.NoError(t, r.ws.WriteMessage(2, []byte(`{"id":1,"command":"mesh/noop"}`)), "binary")
		r.send(`{"id":18,"command":"mesh/noop","payload":{}}`)
		assert.JSONEq(t, `{"id":18,"command":"mesh/noop","payload":true}`, r.next())
		in, err := s.Rooms().Contains(t.Context(), "lobby", r.id)
		require.NoError(t, err)
		assert.True(t, in)

		// Pushes: no id; the answer to a subscription comes before them.
		r.send(`{"id":19,"command":"mesh/subscribe-presence","payload":{"roomName":"push"}}`)
		var answer struct {
			Payload struct {
				Seq   uint64
				Epoch string
			}
		}
		text := r.next()
		require.NoError(t, json.Unmarshal([]byte(text), &answer))
		assert.Contains(t, text, `"id":19`)
		other := s.dial()
		require.NoError(t, s.Connections().SetMetadata(t.Context(), other.id, map[string]any{"name": "bob"}, MetadataOptions{}))
		other.join("push")
		first := other.expectPushed(t, r.next(), `{"type":"join","roomName":"push","metadata":{"name":"bob"}}`)
		other.state("push", map[string]any{"typing": true})
		second := other.expectPushed(t, r.next(), `{"type":"state","roomName":"push","state":{"typing":true}}`)
		other.call("mesh/clear-presence-state", inRoomPayload("push"))
		third := other.expectPushed(t, r.next(), `{"type":"state","roomName":"push","state":null}`)
		other.state("push", map[string]any{"typing": false})
		other.expectPushed(t, r.next(), `{"type":"state","roomName":"push","state":{"typing":false}}`)
		other.leave("push")
		last := other.expectPushed(t, r.next(), `{"type":"leave","roomName":"push"}`)
		assert.Less(t, first.Seq, second.Seq)
		assert.Less(t, second.Seq, third.Seq)
		assert.Less(t, third.Seq, last.Seq)
		assert.Equal(t, first.Epoch, last.Epoch)
		assert.NotEmpty(t, first.Epoch)
	})
}

// expectPushed checks that text is exactly the presence update about p with
// the given fields and those that every update has.
func (p *peer) expectPushed(t *testing.T, text, want string) update {
	t.Helper()
	var f struct {
		Command string
		Payload map[string]any
	}
	var raw map[string]json.RawMessage
	require.NoError(t, json.Unmarshal([]byte(text), &f))
	require.NoError(t, json.Unmarshal([]byte(text), &raw))
	assert.Len(t, raw, 2, "command and payload: %s", text)
	assert.Equal(t, "mesh/presence-update", f.Command)
	var u update
	require.NoError(t, json.Unmarshal(raw["payload"], &u))
	assert.Equal(t, p.id, u.ConnectionID)
	assert.Positive(t, u.Timestamp)
	for _, extra := range []string{"connectionId", "timestamp", "seq", "epoch"} {
		assert.Contains(t, f.Payload, extra)
		delete(f.Payload, extra)
	}
	got, err := json.Marshal(f.Payload)
	require.NoError(t, err)
	assert.JSONEq(t, want, string(got))
	return u
}

func TestPingsAndLatency(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(func(o *Options) { o.LatencyInterval = 5 * time.Second })
		r := s.raw()
		begun := time.Now()
		for i := range 5 {
			assert.JSONEq(t, `{"command":"latency:request","payload":{}}`, r.next())
			assert.InDelta(t, float64(i+1)*5, time.Since(begun).Seconds(), 0.11)
			w.sleep(20 * time.Millisecond)
			r.send(`{"id":3,"command":"latency:response","payload":{}}`)
			var f frame
			require.NoError(t, json.Unmarshal([]byte(r.next()), &f))
			assert.Equal(t, "latency", f.Command)
			assert.Nil(t, f.ID)
			assert.Equal(t, "20", string(f.Payload))
		}
		ping, request := r.next(), r.next()
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
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(func(o *Options) { o.PingInterval = time.Second })
		watcher, deaf, talker := s.dial(), s.dial(), s.dial()
		watcher.subscribe("lobby")
		deaf.join("lobby")
		talker.join("lobby")
		begun := time.Now()
		deaf.mute()
		talker.mute()
		stop := make(chan struct{})
		done := make(chan struct{})
		go func() { // it answers no ping, and sends something else
			defer close(done)
			for tick := time.NewTicker(700 * time.Millisecond); ; {
				select {
				case <-tick.C:
					_ = talker.send(map[string]any{"command": "mesh/noop"})
				case <-stop:
					tick.Stop()
					return
				}
			}
		}()
		assert.Equal(t, 1011, deaf.closed(5*time.Second))
		assert.InDelta(t, 3, time.Since(begun).Seconds(), 0.2, "pinged after 1 s, one more interval missed, then judged")
		watcher.expect(time.Second, "leave", deaf.id)
		w.sleep(10 * time.Second)
		assert.Zero(t, watcher.count("leave", talker.id), "any frame is a sign of life")
		close(stop)
		<-done
		assert.EqualValues(t, 1, s.Stats().Closed["silent"])
	})
}

func TestPipelinedRequestsTakeEffectInOrder(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		const rounds = 20
		s1, s2 := w.tracked(noCommandLimit), w.tracked(noCommandLimit)
		watcher, p := s2.dial(), s1.dial()
		watcher.subscribe("lobby")
		for i := range rounds {
			require.NoError(t, p.send(map[string]any{"command": "mesh/join-room", "payload": inRoomPayload("lobby")}))
			require.NoError(t, p.send(map[string]any{"command": "mesh/publish-presence-state",
				"payload": map[string]any{"roomName": "lobby", "state": map[string]any{"i": i}}}))
			require.NoError(t, p.send(map[string]any{"command": "mesh/clear-presence-state", "payload": inRoomPayload("lobby")}))
			require.NoError(t, p.send(map[string]any{"command": "mesh/leave-room", "payload": inRoomPayload("lobby")}))
			if i%5 == 4 { // not more than may wait
				p.call("mesh/noop", nil)
			}
		}
		w.eventually(5*time.Second, func() bool { return len(watcher.got()) >= 4*rounds }, "%d updates", 4*rounds)
		var want, got []string
		for i := range rounds {
			want = append(want, "join ", fmt.Sprintf(`state {"i":%d}`, i), "state null", "leave ")
		}
		for _, u := range watcher.got() {
			got = append(got, u.Type+" "+string(u.State))
		}
		assert.Equal(t, want, got)
		last := uint64(0)
		for _, u := range watcher.got() {
			assert.Greater(t, u.Seq, last)
			last = u.Seq
		}
		in, err := s2.Rooms().Contains(t.Context(), "lobby", p.id)
		require.NoError(t, err)
		assert.False(t, in)
	})
}

func noCommandLimit(o *Options) { o.Limits.CommandsPerSecond = -1 }

func TestSlowHandlersDoNotHoldUpPresence(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.tracked(func(o *Options) { o.HandlerConcurrency = 2 })
		release := make(chan struct{})
		require.NoError(t, s.HandleCommand("slow", func(ctx context.Context, _ *Connection, _ json.RawMessage) (any, error) {
			select {
			case <-release:
			case <-ctx.Done():
			}
			return "late", nil
		}))
		r := s.raw()
		r.send(`{"id":1,"command":"slow"}`)
		r.send(`{"id":2,"command":"slow"}`)
		r.send(`{"id":3,"command":"slow"}`)
		assert.JSONEq(t, `{"id":3,"command":"slow","payload":{"error":"too many commands are running","code":"EBUSY","name":"CommandError"}}`, r.next())
		r.send(`{"id":4,"command":"mesh/join-room","payload":{"roomName":"lobby"}}`)
		assert.Contains(t, r.next(), `"id":4`, "answers may overtake each other")
		close(release)
		a, b := r.next(), r.next()
		if strings.Contains(a, `"id":2`) {
			a, b = b, a
		}
		assert.JSONEq(t, `{"id":1,"command":"slow","payload":"late"}`, a)
		assert.JSONEq(t, `{"id":2,"command":"slow","payload":"late"}`, b)
	})
}

func TestAFullCommandQueueAnswersBusy(t *testing.T) {
	t.Parallel()
	embedded(t, func(t *testing.T, w *world) {
		s := w.server(noCommandLimit)
		release := make(chan struct{})
		s.track("^guarded$", PresenceOptions{Guard: func(context.Context, Member, string) (bool, error) {
			<-release
			return true, nil
		}})
		r := s.raw()
		other := s.dial()
		r.send(`{"id":0,"command":"mesh/subscribe-presence","payload":{"roomName":"guarded"}}`)
		w.sleep(time.Millisecond) // the worker is at it
		for i := 1; i <= 70; i++ {
			r.send(fmt.Sprintf(`{"id":%d,"command":"mesh/noop"}`, i))
		}
		for i := 65; i <= 70; i++ { // 64 wait
			assert.JSONEq(t, fmt.Sprintf(
				`{"id":%d,"command":"mesh/noop","payload":{"error":"too many commands are waiting","code":"EBUSY","name":"CommandError"}}`, i), r.next())
		}
		assert.JSONEq(t, `true`, string(other.call("mesh/noop", nil)), "nobody else is held up")
		close(release)
		assert.Contains(t, r.next(), `"id":0`)
		for i := 1; i <= 64; i++ {
			assert.JSONEq(t, fmt.Sprintf(`{"id":%d,"command":"mesh/noop","payload":true}`, i), r.next())
		}
		assert.EqualValues(t, 6, s.Stats().Busy)
	})
}

func TestJoinAnswerCostsNoCommandPerMember(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
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
			p := s1.dial()
			want[p.id] = ""
			before := s1.Stats().RedisCalls
			var present []Member
			require.NoError(t, json.Unmarshal(p.join("lobby").Present, &present))
			assert.LessOrEqual(t, s1.Stats().RedisCalls-before, uint64(6), "joining, reading, perhaps a heartbeat")
			got := make(map[string]string)
			for _, m := range present {
				got[m.ID] = strings.TrimSuffix(string(m.Metadata), "null")
			}
			assert.Equal(t, want, got)
			s1.dial().subscribe("lobby")
		}
	})
}

func TestSubscribersInTheRoomAreToldAboutThemselves(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		p := w.tracked().dial()
		p.subscribe("lobby")
		p.join("lobby")
		p.expect(time.Second, "join", p.id)
		require.Equal(t, "true", p.state("lobby", map[string]any{"a": 1}))
		p.expect(time.Second, "state", p.id)
		p.leave("lobby")
		p.expect(time.Second, "leave", p.id)
		w.sleep(100 * time.Millisecond)
		assert.Len(t, p.got(), 3, "%v: no state null after a leave", p.got())
	})
}

func TestSubscribingAgain(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s := w.tracked()
		watcher, a, b := s.dial(), s.dial(), s.dial()
		watcher.subscribe("lobby")
		a.join("lobby")
		watcher.expect(time.Second, "join", a.id)
		assert.Equal(t, []string{a.id}, watcher.subscribe("lobby").ids(t), "a new snapshot")
		b.join("lobby")
		watcher.expect(time.Second, "join", b.id)
		b.leave("lobby")
		watcher.expect(time.Second, "leave", b.id)
		w.sleep(100 * time.Millisecond)
		assert.Len(t, watcher.got(), 3, "each once: %v", watcher.got())
		assert.Equal(t, 1, s.Stats().Subscriptions)

		assert.Equal(t, "true", string(watcher.call("mesh/unsubscribe-presence", inRoomPayload("lobby"))))
		assert.Equal(t, "false", string(watcher.call("mesh/unsubscribe-presence", inRoomPayload("lobby"))))
		b.join("lobby")
		w.sleep(100 * time.Millisecond)
		assert.Len(t, watcher.got(), 3, "nothing after the end")
		assert.ElementsMatch(t, []string{a.id, b.id}, watcher.subscribe("lobby").ids(t))
	})
}

func TestStatesInSnapshots(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		s1, s2 := w.tracked(), w.tracked()
		early, a, b := s1.dial(), s1.dial(), s2.dial()
		early.subscribe("lobby")
		a.join("lobby")
		b.join("lobby")
		require.Equal(t, "true", a.state("lobby", map[string]any{"x": 1}))
		require.Equal(t, "true", b.state("lobby", map[string]any{"y": 2}, map[string]any{"silent": true}))
		early.expect(time.Second, "state", a.id)
		// The silent one comes to the mirror as an event, too, of which nobody is told.
		w.eventually(2*time.Second, func() bool {
			return len(early.room("mesh/get-presence-state", "lobby").States) == 2
		}, "both states where the room is watched")
		for name, s := range map[string]*testServer{"where it is watched": s1, "where it is not": s2} {
			var states map[string]json.RawMessage
			w.eventually(time.Second, func() bool { // nobody is told when the silent one is there
				states = s.dial().subscribe("lobby").States
				return len(states) == 2
			}, "%s: %v", name, states)
			assert.JSONEq(t, `{"x":1}`, string(states[a.id]), name)
			assert.JSONEq(t, `{"y":2}`, string(states[b.id]), "%s: silent ones too", name)
		}
		assert.Zero(t, early.count("state", b.id), "and nobody was told")

		require.Equal(t, "true", b.state("lobby", map[string]any{"z": 3}, map[string]any{"expireAfter": 300}))
		begun := time.Now()
		w.eventually(2*time.Second, func() bool { return early.count("state", b.id) == 2 }, "the state and its end")
		assert.GreaterOrEqual(t, time.Since(begun), 250*time.Millisecond)
		got := early.got()
		assert.Equal(t, "null", string(got[len(got)-1].State))
	})
}

func TestClientMetadata(t *testing.T) {
	t.Parallel()
	everywhere(t, func(t *testing.T, w *world) {
		var seen atomic.Value
		s := w.tracked(func(o *Options) {
			o.ClientMetadata = func(_ context.Context, m Member, proposed json.RawMessage) (any, error) {
				seen.Store([2]string{string(m.Metadata), string(proposed)})
				switch {
				case strings.Contains(string(proposed), "isAdmin"):
					return nil, errors.New("not you")
				case strings.Contains(string(proposed), "forbidden"):
					return nil, &CommandError{Code: "ENOTYOU", Message: "no"}
				case strings.Contains(string(proposed), "panic"):
					panic("secret text")
				case strings.Contains(string(proposed), "shorten"):
					return map[string]any{"short": true}, nil
				}
				return proposed, nil
			}
		})
		p := s.dial()
		set := func(metadata, strategy string) string {
			options := ""
			if strategy != "" {
				options = `,"options":{"strategy":"` + strategy + `"}`
			}
			return string(p.call("mesh/set-my-connection-metadata", json.RawMessage(`{"metadata":`+metadata+options+`}`)))
		}
		mine := func() string { return string(p.call("mesh/get-my-connection-metadata", nil)) }
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
