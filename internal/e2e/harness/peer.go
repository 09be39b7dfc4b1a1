package harness

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/meshtest"
)

// Peer is a client of meshtest that keeps everything that it receives, with the time. Its
// requests return the exact payload of their answers, error objects included.
type Peer struct {
	T      *testing.T
	W      *World
	ID     string
	Client *meshtest.Client
	Ended  <-chan struct{} // closed when the connection has ended

	Mu      sync.Mutex // guards the fields below
	next    int64
	waiting map[int64]chan json.RawMessage
	first   string      // command of the first frame
	Updates []Update    // presence updates, in order
	Frames  []Frame     // all frames after the first one, in order
	Times   []time.Time // arrival of each update
	Pushes  []Frame     // all other frames without an id
	deaf    bool        // answers no ping
}

// Frame is a frame of the server.
type Frame = meshtest.Frame

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

// updateOf returns the update in a frame.
func updateOf(f Frame) (Update, bool) {
	u, ok := f.Update()
	if u.Type == "state" && u.State == nil {
		u.State = json.RawMessage("null")
	}
	return Update{
		Type: u.Type, ConnectionID: u.ConnectionID, RoomName: u.Room, Timestamp: u.Time.UnixMilli(), Metadata: u.Metadata,
		State: u.State, Seq: u.Seq, Epoch: u.Epoch, Repair: u.Repair,
	}, ok
}

// Dial connects a peer, with headers for the upgrade.
func (s *Server) Dial(headers ...http.Header) *Peer {
	s.W.T.Helper()
	p, _, err := s.TryDial(headers...)
	require.NoError(s.W.T, err)
	return p
}

// TryDial is Dial, but returns an error and the answer to the upgrade, if there is one.
func (s *Server) TryDial(headers ...http.Header) (*Peer, *http.Response, error) {
	s.W.T.Helper()
	opts := []meshtest.ConnectOption{meshtest.WithNetDial(s.Listener.Dial)}
	for _, h := range headers {
		for name, values := range h {
			for _, value := range values {
				opts = append(opts, meshtest.WithHeader(name, value))
			}
		}
	}
	p, err := s.W.dial("ws://127.0.0.1/ws"+s.Query, opts...)
	if err == nil {
		return p, &http.Response{StatusCode: http.StatusSwitchingProtocols, Header: p.Client.Header()}, nil
	}
	refused, ok := errors.AsType[*meshtest.HandshakeError](err)
	if !ok {
		return nil, nil, err
	}
	return nil, &http.Response{
		StatusCode: refused.Status, Status: fmt.Sprint(refused.Status, " ", http.StatusText(refused.Status)),
		Header: refused.Header, Body: io.NopCloser(strings.NewReader(refused.Body)),
	}, err
}

// dial connects a peer to a URL.
func (w *World) dial(url string, opts ...meshtest.ConnectOption) (*Peer, error) {
	w.T.Helper()
	p := &Peer{T: w.T, W: w, waiting: make(map[int64]chan json.RawMessage)}
	// The hour is no limit: tests limit their waits by themselves.
	opts = append(opts, meshtest.WithEarlyReturn(), meshtest.WithFrames(p.take), meshtest.WithTimeout(time.Hour))
	c, err := meshtest.Dial(url, opts...)
	if err != nil {
		return nil, err
	}
	p.Client, p.ID, p.Ended = c, c.ID(), c.Done()
	w.T.Cleanup(p.Close)
	p.Mu.Lock()
	defer p.Mu.Unlock()
	require.Equal(w.T, "mesh/assign-id", p.first, "the first frame")
	return p, nil
}

// take keeps a frame. The client acts only on pings.
func (p *Peer) take(f Frame) (ignore bool) {
	p.Mu.Lock()
	defer p.Mu.Unlock()
	if p.first == "" {
		p.first = f.Command
		return true
	}
	p.Frames = append(p.Frames, f)
	if f.ID != nil {
		if ch := p.waiting[*f.ID]; ch != nil {
			delete(p.waiting, *f.ID)
			ch <- f.Payload
		}
		return true
	}
	if f.Command == "ping" && !p.deaf {
		return false
	}
	if f.Command != "mesh/presence-update" {
		p.Pushes = append(p.Pushes, f)
	} else if u, ok := updateOf(f); ok {
		p.Updates = append(p.Updates, u)
		p.Times = append(p.Times, time.Now())
	}
	return true
}

// Send writes one frame.
func (p *Peer) Send(v any) error {
	var text bytes.Buffer
	if err := json.NewEncoder(&text).Encode(v); err != nil {
		return err
	}
	return p.Client.Write(websocket.TextMessage, text.Bytes())
}

// Call sends a request and returns the payload of its answer.
func (p *Peer) Call(command string, payload any) json.RawMessage {
	p.T.Helper()
	answer, err := p.TryCall(command, payload)
	require.NoError(p.T, err, command)
	return answer
}

func (p *Peer) TryCall(command string, payload any) (json.RawMessage, error) {
	return p.request(func(id int64) error {
		return p.Send(map[string]any{"id": id, "command": command, "payload": payload})
	})
}

var errEnded = errors.New("connection ended")

// request sends a request with a new id and waits for its answer.
func (p *Peer) request(send func(id int64) error) (json.RawMessage, error) {
	ch := make(chan json.RawMessage, 1)
	p.Mu.Lock()
	p.next++
	id := p.next
	p.waiting[id] = ch
	p.Mu.Unlock()
	err := send(id)
	if _, ended := errors.AsType[*meshtest.CloseError](err); ended {
		return nil, errEnded
	}
	if err != nil {
		return nil, err
	}
	select {
	case answer := <-ch:
		return answer, nil
	case <-p.Ended:
		return nil, errEnded
	case <-time.After(p.W.Unhurried(20 * time.Second)):
		return nil, errors.New("no answer")
	}
}

// View is the answer to a join, a subscribe or a get-state.
type View struct {
	Success bool            `json:"success"`
	Present json.RawMessage `json:"present"`
	States  map[string]json.RawMessage
	Total   int `json:"total"`
	// Connections and Users are the numbers of the room. Of and Max are the cap that
	// refused a join.
	Connections, Users int
	Of                 string
	Max                int
	Stale              bool `json:"stale"`
	Epoch              string
	Seq                uint64
	Error              string `json:"error"`
	Code               string `json:"code"`
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

// Close breaks the connection.
func (p *Peer) Close() { p.Client.Kill() }

// Err waits for the end of the connection and says how it ended.
func (p *Peer) Err() error {
	<-p.Ended
	// The error of a write says it. AwaitClose would also wait for the server.
	return p.Client.Write(websocket.TextMessage, nil)
}

// CloseCodeOf returns the close code in an error of a client or of a read, or 0.
func CloseCodeOf(err error) int {
	if closed, ok := errors.AsType[*meshtest.CloseError](err); ok {
		return closed.Code
	}
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
	return CloseCodeOf(p.Err())
}
