package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// Peer is a client of the wire protocol.
type Peer struct {
	T  *testing.T
	W  *World
	WS *websocket.Conn
	ID string

	Writing sync.Mutex

	Mu      sync.Mutex // guards the fields below
	next    int
	waiting map[string]chan json.RawMessage
	Updates []Update    // presence updates, in order
	Frames  []Frame     // all frames, in order
	Times   []time.Time // arrival of each update
	Pushes  []Frame     // all other frames without an id
	deaf    bool        // answers no ping
	Err     error       // the error that ended reading
	Ended   chan struct{}
}

type Frame struct {
	ID      *int64          `json:"id"`
	Command string          `json:"command"`
	Payload json.RawMessage `json:"payload"`
}

type Update struct {
	Type         string          `json:"type"`
	ConnectionID string          `json:"connectionId"`
	RoomName     string          `json:"roomName"`
	Timestamp    int64           `json:"timestamp"`
	Metadata     json.RawMessage `json:"metadata"`
	State        json.RawMessage `json:"state"`
	Seq          uint64          `json:"seq"`
	Epoch        string          `json:"epoch"`
	Repair       bool            `json:"repair"`
}

func (u Update) String() string {
	return fmt.Sprintf("%s %s %s %s", u.Type, u.RoomName, u.ConnectionID, u.State)
}

// Dial connects a peer, with headers for the upgrade.
func (s *Server) Dial(headers ...http.Header) *Peer {
	s.W.T.Helper()
	p, _, err := s.TryDial(headers...)
	require.NoError(s.W.T, err)
	return p
}

func (s *Server) TryDial(headers ...http.Header) (*Peer, *http.Response, error) {
	var h http.Header
	if len(headers) > 0 {
		h = headers[0]
	}
	d := websocket.Dialer{NetDialContext: s.Listener.Dial}
	ws, resp, err := d.DialContext(s.W.T.Context(), "ws://127.0.0.1/ws"+s.Query, h)
	if err != nil {
		return nil, resp, err
	}
	p := &Peer{T: s.W.T, W: s.W, WS: ws, waiting: make(map[string]chan json.RawMessage), Ended: make(chan struct{})}
	var first Frame
	if err := ws.ReadJSON(&first); err != nil {
		return nil, resp, err
	}
	require.Equal(s.W.T, "mesh/assign-id", first.Command, "the first frame")
	require.NoError(s.W.T, json.Unmarshal(first.Payload, &p.ID))
	go p.read()
	s.W.T.Cleanup(p.Close)
	return p, resp, nil
}

func (p *Peer) read() {
	defer close(p.Ended)
	for {
		_, data, err := p.WS.ReadMessage()
		var f Frame
		if err == nil {
			err = json.Unmarshal(data, &f)
		}
		if err != nil {
			p.Mu.Lock()
			p.Err = err
			p.Mu.Unlock()
			return
		}
		p.take(f)
	}
}

func (p *Peer) take(f Frame) {
	p.Mu.Lock()
	defer p.Mu.Unlock()
	p.Frames = append(p.Frames, f)
	switch {
	case f.ID != nil:
		key := strconv.FormatInt(*f.ID, 10)
		if ch := p.waiting[key]; ch != nil {
			delete(p.waiting, key)
			ch <- f.Payload
		}
	case f.Command == "mesh/presence-update":
		var u Update
		if err := json.Unmarshal(f.Payload, &u); err == nil {
			p.Updates = append(p.Updates, u)
			p.Times = append(p.Times, time.Now())
		}
	case f.Command == "ping" && !p.deaf:
		go func() { _ = p.Send(map[string]any{"id": 1, "command": "pong", "payload": map[string]any{}}) }()
	default:
		p.Pushes = append(p.Pushes, f)
	}
}

// Send writes one frame.
func (p *Peer) Send(v any) error {
	p.Writing.Lock()
	defer p.Writing.Unlock()
	return p.WS.WriteJSON(v)
}

// Call sends a request and returns the payload of its answer.
func (p *Peer) Call(command string, payload any) json.RawMessage {
	p.T.Helper()
	answer, err := p.TryCall(command, payload)
	require.NoError(p.T, err, command)
	return answer
}

func (p *Peer) TryCall(command string, payload any) (json.RawMessage, error) {
	ch := make(chan json.RawMessage, 1)
	p.Mu.Lock()
	p.next++
	id := p.next
	p.waiting[strconv.Itoa(id)] = ch
	p.Mu.Unlock()
	if err := p.Send(map[string]any{"id": id, "command": command, "payload": payload}); err != nil {
		return nil, err
	}
	select {
	case answer := <-ch:
		return answer, nil
	case <-p.Ended:
		return nil, errors.New("connection ended")
	case <-time.After(p.W.Unhurried(20 * time.Second)):
		return nil, errors.New("no answer")
	}
}

// View is the answer to a join, a subscribe or a get-state.
type View struct {
	Success bool            `json:"success"`
	Present json.RawMessage `json:"present"`
	States  map[string]json.RawMessage
	Total   int  `json:"total"`
	Stale   bool `json:"stale"`
	Epoch   string
	Seq     uint64
	Error   string `json:"error"`
	Code    string `json:"code"`
}

func (v View) IDs(t *testing.T) []string {
	t.Helper()
	var members []mesh.Member
	require.NoError(t, json.Unmarshal(v.Present, &members))
	ids := make([]string, len(members))
	for i, m := range members {
		ids[i] = m.ID
	}
	return ids
}

func (p *Peer) Room(command, room string) View {
	p.T.Helper()
	var v View
	require.NoError(p.T, json.Unmarshal(p.Call(command, map[string]any{"roomName": room}), &v))
	return v
}

func (p *Peer) Join(room string) View {
	p.T.Helper()
	v := p.Room("mesh/join-room", room)
	require.True(p.T, v.Success, "join %q: %s %s", room, v.Code, v.Error)
	return v
}

func (p *Peer) Leave(room string) {
	p.T.Helper()
	require.JSONEq(p.T, `{"success":true}`, string(p.Call("mesh/leave-room", map[string]any{"roomName": room})))
}

func (p *Peer) Subscribe(room string) View {
	p.T.Helper()
	v := p.Room("mesh/subscribe-presence", room)
	require.True(p.T, v.Success, "subscribe %q: %s %s", room, v.Code, v.Error)
	return v
}

func (p *Peer) State(room string, state any, more ...map[string]any) string {
	p.T.Helper()
	payload := map[string]any{"roomName": room, "state": state}
	for _, m := range more {
		maps.Copy(payload, m)
	}
	return string(p.Call("mesh/publish-presence-state", payload))
}

// Got returns the updates so far.
func (p *Peer) Got() []Update {
	p.Mu.Lock()
	defer p.Mu.Unlock()
	return append([]Update(nil), p.Updates...)
}

// Count returns the number of updates of a type about a connection. An empty connection
// means all.
func (p *Peer) Count(kind, conn string) int {
	n := 0
	for _, u := range p.Got() {
		if u.Type == kind && (conn == "" || u.ConnectionID == conn) {
			n++
		}
	}
	return n
}

// Pushed returns the number of frames of a command.
func (p *Peer) Pushed(command string) int {
	p.Mu.Lock()
	defer p.Mu.Unlock()
	n := 0
	for _, f := range p.Pushes {
		if f.Command == command {
			n++
		}
	}
	return n
}

// PushesOf returns the frames of a command.
func (p *Peer) PushesOf(command string) []Frame {
	p.Mu.Lock()
	defer p.Mu.Unlock()
	var list []Frame
	for _, f := range p.Pushes {
		if f.Command == command {
			list = append(list, f)
		}
	}
	return list
}

// Expect waits for one update and returns it.
func (p *Peer) Expect(within time.Duration, kind, conn string) Update {
	p.T.Helper()
	var found Update
	p.W.Eventually(within, func() bool {
		for _, u := range p.Got() {
			if u.Type == kind && u.ConnectionID == conn {
				found = u
				return true
			}
		}
		return false
	}, "%s of %s, got %v", kind, conn, p.Got())
	return found
}

// Mute makes the peer stop answering pings.
func (p *Peer) Mute() {
	p.Mu.Lock()
	p.deaf = true
	p.Mu.Unlock()
}

func (p *Peer) Close() {
	_ = p.WS.Close()
	<-p.Ended
}

// CloseCodeOf returns the close code in an error of a read, or 0.
func CloseCodeOf(err error) int {
	if closed, ok := errors.AsType[*websocket.CloseError](err); ok {
		return closed.Code
	}
	return 0
}

// Closed waits until the connection has ended, and returns the close code. As with
// Eventually, within is exact in virtual time only.
func (p *Peer) Closed(within time.Duration) int {
	p.T.Helper()
	within = p.W.Unhurried(within)
	select {
	case <-p.Ended:
	case <-time.After(within):
		require.FailNow(p.T, "the connection has not ended within "+within.String())
	}
	p.Mu.Lock()
	defer p.Mu.Unlock()
	return CloseCodeOf(p.Err)
}
