package mesh_test

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
	"github.com/meshpresence/mesh/internal/wire"
)

// FuzzPayloads sends each command with whatever payload it is given. What is
// JSON gets exactly one answer, and if that is an error it has a code and none
// of the server's own troubles in it; a change that was accepted is carried to
// the byte.
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
	z := fuzzed(f)
	p := &payloads{z: z, ws: z.dial(f)} // one for all: a new one costs more than what is tried
	f.Cleanup(func() { _ = p.ws.Close() })
	f.Fuzz(func(t *testing.T, n byte, payload string) {
		if len(payload) > 15<<10 {
			return // FuzzFrames sends what is too large
		}
		defer func() {
			if t.Failed() { // what is on its way must not count for the next
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

// send writes a request under a new id, with the payload as it is.
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
		return // the payload broke out of its place
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
		require.True(t, waiting[*a.ID], "nobody waits for %s: after %s %q", data, command, payload)
		delete(waiting, *a.ID)
		judged(t, payload, a.Payload)
	}
	require.Zero(t, testhook.SocketPanics(p.z.srv))
	require.Zero(t, p.z.srv.Stats().CallbackPanics)
}

// judged looks at an answer.
func judged(t *testing.T, text string, answer json.RawMessage) {
	var e struct{ Error, Code, Name *string }
	if json.Unmarshal(answer, &e) != nil || e.Error == nil {
		return
	}
	require.NotNil(t, e.Code, "%s: %s", text, answer)
	require.NotNil(t, e.Name)
	require.NotContains(t, []string{"", "ESERVER", "ECLOSED"}, *e.Code, "%s: %s", text, answer)
}

// FuzzControl has a server hear whatever it is given on its channel and on
// those of rooms and expired keys: other servers', of another version, or
// somebody's who found the Redis. Nothing panics, and it goes on.
func FuzzControl(f *testing.F) {
	for _, s := range []string{
		"", " ", "beat:1", "beat:18446744073709551615", "beat:-1", "meta c 1 {}", "meta c 18446744073709551615 {", "meta c x {}", "meta",
		`call {"id":"1","from":"x","op":"add","room":"a","conn":"c"}`, `call {"id":"1","from":"x","op":"clear","room":"a"}`,
		`call {"id":"","from":"","op":"rooms","conn":"c"}`, `call {"id":"2","from":"*","op":"close","conn":"c"}`, `call {`, `call null`,
		`call {"id":"3","from":"x","op":"recheck","conn":"c"}`, `call {"id":"4","op":"add","room":"\u0000","conn":":"}`,
		`done {"id":"1","ok":true,"error":"limit"}`, `done {}`, `send {"conn":"c","command":"x","payload":{"a":1}}`, `send {"room":"a","command":"mesh/assign-id"}`,
		"J e t - 1 . c id inc 0 0 0 . 0 0 0 1 1\n", "S e t p 1 d c id inc 0 2 0 . 0 0 0 1 2\n{}", "\xff\x00",
	} {
		f.Add(s)
	}
	z := fuzzed(f)
	require.NoError(f, z.neighbour.WriteMessage(websocket.TextMessage, []byte(`{"id":1,"command":"mesh/subscribe-presence","payload":{"roomName":"a"}}`)))
	require.NoError(f, alive(z.neighbour))
	f.Fuzz(func(t *testing.T, payload string) {
		n := testhook.PartsOf(z.srv)
		if _, ok := n.Local.Conn("c"); !ok { // a call closed it
			require.NoError(t, z.srv.Presence().Connect(t.Context(), "c", json.RawMessage(`{"x":1}`)))
			require.NoError(t, z.srv.Presence().Join(t.Context(), "a", "c"))
		}
		z.srv.HandleMessage(n.Keys.ServerChannel(n.Lease.Incarnation()), payload)
		z.srv.HandleMessage(n.Keys.EventsPrefix()+"a", payload)
		z.srv.HandleMessage(n.Keys.EventsPrefix()+payload, payload)
		z.srv.HandleMessage(payload, payload)
		z.srv.WaitForPeers()
		require.NoError(t, alive(z.neighbour), "the neighbour")
	})
}
