package browsertest

import (
	"encoding/json"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/gorilla/websocket"
)

// person is a client without a browser. It speaks the wire protocol and may send
// anything.
type person struct {
	t  testing.TB
	ws *websocket.Conn
	id int
}

// newPerson connects to a server. key is the user's secret. An empty key makes a new
// user.
func newPerson(t testing.TB, s *server, key string) *person {
	t.Helper()
	ws, _, err := websocket.DefaultDialer.DialContext(t.Context(), "ws://"+s.addr+"/ws?key="+key, http.Header{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ws.Close() })
	return &person{t: t, ws: ws}
}

// join sets the metadata and joins a room.
func (p *person) join(room string, metadata any) {
	p.t.Helper()
	if answer := p.ask("mesh/set-my-connection-metadata", map[string]any{"metadata": metadata}); string(answer) != `{"success":true}` {
		p.t.Fatalf("metadata %v: %s", metadata, answer)
	}
	p.ask("mesh/join-room", map[string]any{"roomName": room})
}

// publish publishes a state with a lifetime.
func (p *person) publish(room string, state any, life time.Duration) {
	p.t.Helper()
	payload := map[string]any{"roomName": room, "state": state, "expireAfter": life.Milliseconds()}
	if answer := p.ask("mesh/publish-presence-state", payload); string(answer) != "true" {
		p.t.Fatalf("state %v: %s", state, answer)
	}
}

// ask sends a command and returns the payload of its answer.
func (p *person) ask(command string, payload any) json.RawMessage {
	p.t.Helper()
	p.id++
	if err := p.ws.WriteJSON(map[string]any{"id": p.id, "command": command, "payload": payload}); err != nil {
		p.t.Fatal(err)
	}
	if err := p.ws.SetReadDeadline(time.Now().Add(timeLimit)); err != nil {
		p.t.Fatal(err)
	}
	for {
		var frame struct {
			ID      *json.Number
			Payload json.RawMessage
		}
		if err := p.ws.ReadJSON(&frame); err != nil {
			p.t.Fatalf("%s: %v", command, err)
		}
		if frame.ID != nil && frame.ID.String() == strconv.Itoa(p.id) {
			return frame.Payload
		}
	}
}
