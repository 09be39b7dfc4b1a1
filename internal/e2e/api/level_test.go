package api

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/e2e/testlog"
	"github.com/meshpresence/mesh/internal/testhook"
)

// failing are requests of a connection that is in the rooms secret and free, and not in
// lobby, with the code of their failure.
var failing = []struct{ command, payload, code string }{
	{"publish-presence-state", `{"roomName":"lobby","state":{}}`, "ENOTFOUND"}, // not in the room
	{"clear-presence-state", `{"roomName":"lobby"}`, "ENOTFOUND"},
	{"unsubscribe-presence", `{"roomName":"lobby"}`, "ENOTFOUND"},             // not subscribed
	{"publish-presence-state", `{"roomName":"free","state":{}}`, "ENOTFOUND"}, // not tracked
	{"clear-presence-state", `{"roomName":"free"}`, "ENOTFOUND"},
	{"publish-presence-state", `{"roomName":"secret","state":{}}`, "EREFUSED"},
	{"clear-presence-state", `{"roomName":"secret"}`, "EREFUSED"},
	{"publish-presence-state", `{"roomName":"mine"}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":null}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":5}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":[]}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":{},"expireAfter":"1"}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":{},"expireAfter":1e300}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":{},"silent":1}`, "EINVALID"},
	{"publish-presence-state", `{"roomName":"mine","state":{"x":"` + strings.Repeat("x", 9000) + `"}}`, "ETOOLARGE"},
	{"publish-presence-state", `{}`, "EINVALID"},
	{"publish-presence-state", `[]`, "EINVALID"},
	{"clear-presence-state", `{"roomName":""}`, "EINVALID"},
	{"clear-presence-state", `"mine"`, "EINVALID"},
	{"clear-presence-state", `null`, "EINVALID"},
	{"unsubscribe-presence", `{"roomName":5}`, "EINVALID"},
	{"unsubscribe-presence", `{"roomName":"a\u0000"}`, "EINVALID"},
}

// Failures of commands whose answer is true or false are false at level 1, and have a
// code at level 2. Both are counted by it, and logged at Debug with the reason.
func TestFailedCommandsByLevel(t *testing.T) {
	t.Parallel()
	harness.Everywhere(t, func(t *testing.T, w *harness.World) {
		log := new(testlog.TextLog)
		s := w.Server(harness.NoCommandLimit, func(o *mesh.Options) {
			o.Logger = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		})
		for room, guard := range map[string]mesh.Guard{"lobby": nil, "mine": nil, "secret": harness.AdminsOnly} {
			require.NoError(t, s.TrackPresence(mesh.Exact(room), mesh.PresenceOptions{Guard: guard}))
		}
		counted := make(map[string]uint64)
		for level := 1; level <= 2; level++ {
			s.Query = fmt.Sprint("?mesh-level=", level)
			p := s.Dial()
			for _, room := range []string{"mine", "free", "secret"} {
				p.Join(room)
			}
			for _, c := range failing {
				answer := p.Call("mesh/"+c.command, json.RawMessage(c.payload))
				if counted[c.code]++; level == 1 {
					assert.Equal(t, "false", string(answer), "%.80s", c.payload)
				} else {
					assert.Equal(t, c.code, harness.Code(t, answer), "%.80s: %s", c.payload, answer)
				}
			}
			// The levels do not differ in successful commands, nor in other commands.
			for _, c := range []struct{ command, payload, want string }{
				{"publish-presence-state", `{"roomName":"mine","state":{"a":1}}`, "true"},
				{"clear-presence-state", `{"roomName":"mine"}`, "true"},
				{"clear-presence-state", `{"roomName":"mine"}`, "true"},
				{"subscribe-presence", `{"roomName":"secret"}`, `{"success":false,"present":[]}`},
				{"join-room", `{"roomName":""}`, `{"error":"invalid room name: it is empty","code":"EINVALID","name":"CommandError"}`},
			} {
				assert.JSONEq(t, c.want, string(p.Call("mesh/"+c.command, json.RawMessage(c.payload))), "%s", c.payload)
			}
			p.Subscribe("mine")
			assert.Equal(t, "true", string(p.Call("mesh/unsubscribe-presence", harness.InRoomPayload("mine"))))
			// Without an id there is no answer, but the failure counts.
			require.NoError(t, p.Send(map[string]any{"command": "mesh/unsubscribe-presence", "payload": harness.InRoomPayload("mine")}))
			counted["ENOTFOUND"]++
			p.Room("mesh/get-presence-state", "mine") // is answered after the commands before it about that room
			assert.Contains(t, log.String(), " conn="+p.ID+" command=mesh/unsubscribe-presence code=ENOTFOUND reason=\"Not subscribed\"")
		}
		for code, n := range s.Stats().CommandsFailed {
			assert.Equal(t, counted[code], n, code)
		}
		assert.NotContains(t, log.String(), "xxxx", "no payloads")
	})
}

// A client at level 1 gets the types of updates that the stock client knows. Clients at
// level 2 and the app get all of them.
func TestUpdatesByLevel(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		stock, second, ann := s.Dial(), s.Level2().Dial(), s.Dial()
		stock.Subscribe("lobby")
		second.Subscribe("lobby")
		tap := w.Tap(s.Presence(), "lobby", mesh.SubscribeOptions{})
		tap.Wait(w, 1)
		ann.Join("lobby")
		ann.State("lobby", map[string]any{"n": 1})
		require.NoError(t, s.Connections().SetMetadata(t.Context(), ann.ID, "Ann", mesh.MetadataOptions{}))
		entry := tap.Wait(w, 4)[1].EntryID

		// Another server keeps the place of the connection, and gives it back.
		mirror := testhook.PartsOf(s.Server).Hub
		status, _ := mirror.RoomStatus("lobby")
		at, now := status.Position, time.Now().UnixMilli()
		send := func(kind, cause, owner, more string) {
			prev := at.Tag
			at.Seq++
			at.Tag = fmt.Sprint("t", at.Seq)
			mirror.HandleEvent("lobby", fmt.Sprintf("%s %s %s %s %d %s %s %s %s 0 0 9 . 9 5 0 %d %d%s\n\"Ann\"", kind, at.Epoch, at.Tag, prev, now, cause,
				ann.ID, entry, owner, now, at.Seq, more))
		}
		send("D", "b", "~", fmt.Sprintf(" 0 5000 0 %d b", now+5000))
		send("R", "."+ann.ID, "other", "")
		send("L", "r", "other", "")

		kinds := func(updates []harness.Update) (list []string) {
			for _, u := range updates {
				list = append(list, u.Type+" "+string(u.Metadata)+string(u.State))
			}
			return list
		}
		for _, p := range []*harness.Peer{stock, second} {
			p.Expect(time.Second, "leave", ann.ID)
		}
		assert.Equal(t, []string{"join ", `state {"n":1}`, "state null", "leave "}, kinds(stock.Got()))
		assert.Equal(t, []string{"join ", `state {"n":1}`, `metadata "Ann"`, "state null", "disconnect ", "reconnect ", "leave "}, kinds(second.Got()))
		var events []string
		for _, e := range tap.Wait(w, 8)[1:] {
			events = append(events, fmt.Sprintf("%s %s %s", e.Type, e.Metadata, e.Reason))
		}
		assert.Equal(t, []string{
			"join  ", "state  ", `metadata "Ann" `, "state  ", "disconnect  lost", "reconnect  ", `leave "Ann" removed`,
		}, events)
	})
}

// The same while Redis is away.
func TestUnavailableByLevel(t *testing.T) {
	t.Parallel()
	harness.Embedded(t, func(t *testing.T, w *harness.World) {
		s := w.Tracked()
		stock, second := s.Stock(""), s.Stock("?mesh-level=2")
		for _, c := range []*harness.StockClient{stock, second} {
			require.True(t, c.Wait(c.JoinRoom("lobby")).Ok())
		}
		w.Away()
		defer w.Back()
		first, other := stock.Publish("lobby", map[string]any{"n": 1}), second.Publish("lobby", map[string]any{"n": 1})
		assert.Equal(t, "false", string(stock.Wait(first).Payload))
		assert.Equal(t, "EUNAVAILABLE", second.Wait(other).Code())
		assert.EqualValues(t, 2, s.Stats().CommandsFailed["EUNAVAILABLE"])
	})
}

// The command with which a flood ends is answered and counted like any other that fails.
func TestFloodByLevel(t *testing.T) {
	t.Parallel()
	for level, want := range map[string]string{
		"1": "false", "2": `{"error":"too many frames","code":"ELIMIT","name":"CommandError"}`,
	} {
		for _, command := range []string{"publish-presence-state", "clear-presence-state", "unsubscribe-presence"} {
			t.Run(level+" "+command, func(t *testing.T) {
				t.Parallel()
				harness.Embedded(t, func(t *testing.T, w *harness.World) {
					s := w.Server(harness.Limits(func(l *mesh.Limits) { l.CommandsPerSecond = 5 }))
					s.Query = "?mesh-level=" + level
					p := s.Dial()
					for range 100 { // as many frames as are tolerated
						require.NoError(t, p.Send(map[string]any{"command": "pong"}))
					}
					require.NoError(t, p.Send(map[string]any{"id": 7, "command": "mesh/" + command, "payload": harness.InRoomPayload("lobby")}))
					assert.Equal(t, websocket.ClosePolicyViolation, p.Closed(time.Second))
					var answers []string
					p.Mu.Lock()
					for _, f := range p.Frames {
						if f.ID != nil {
							answers = append(answers, string(f.Payload))
						}
					}
					p.Mu.Unlock()
					require.Len(t, answers, 1)
					assert.JSONEq(t, want, answers[0])
					failed := s.Stats().CommandsFailed
					assert.EqualValues(t, 1, failed["ELIMIT"])
					assert.EqualValues(t, 0, failed["EBUSY"])
				})
			})
		}
	}
}
