package harness

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"
)

// StockClient has the habits of the stock JavaScript client, as the wire protocol
// describes them:
//   - It sends every request at once and never waits for an answer before the next.
//   - It ignores error objects: an answer without success is a failure, and there is
//     one attempt.
//   - It drops updates of a room until the answer to its subscribe request has been
//     processed. Under Node, frames that arrive in one piece with the answer are
//     dispatched before that.
//   - After a lost connection it waits two seconds, takes the new id, and then joins
//     its rooms and subscribes to them again in one burst.
type StockClient struct {
	t *testing.T
	s *Server

	path string // of the URL, with the query

	Mu      sync.Mutex // guards the fields below, and writing
	WS      *websocket.Conn
	reads   *countingConn
	ID      string
	next    int64
	waiting map[int64]*StockCall
	Rooms   []string                 // joined, in order
	watched []string                 // subscribed, in order
	piece   map[string]int64         // subscribed room → the read that brought the answer
	updates map[string][]Update      // updates that the app's callback received, by room
	dropped map[string][]Update      // updates that arrived before the subscription was set up
	answers map[string][]stockAnswer // by command
	Pushes  []Frame
	Ended   chan struct{}
}

// stockReconnect is the fixed time after which a stock client reconnects.
const stockReconnect = 2 * time.Second

// StockCall is one request that has not been answered.
type StockCall struct {
	command string
	room    string
	sent    time.Time
	Done    chan stockAnswer
}

// stockAnswer is the answer to one request.
type stockAnswer struct {
	Room    string
	Payload json.RawMessage
	At      time.Time
	Took    time.Duration
}

// Ok reports whether the client counts the answer as a success: the value true, or an
// object whose success is true.
func (a stockAnswer) Ok() bool {
	var object struct {
		Success bool `json:"success"`
	}
	return string(a.Payload) == "true" || json.Unmarshal(a.Payload, &object) == nil && object.Success
}

// Code returns the code of an error object, or "".
func (a stockAnswer) Code() string {
	var object struct {
		Code string `json:"code"`
	}
	_ = json.Unmarshal(a.Payload, &object)
	return object.Code
}

// countingConn counts the reads that returned bytes.
type countingConn struct {
	net.Conn
	count atomic.Int64
}

func (c *countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.count.Add(1)
	}
	return n, err
}

// Stock connects a stock client. query is appended to the URL.
func (s *Server) Stock(query string) *StockClient {
	s.W.T.Helper()
	c := &StockClient{t: s.W.T, s: s, path: "/ws" + query, waiting: make(map[int64]*StockCall),
		updates: make(map[string][]Update), dropped: make(map[string][]Update), answers: make(map[string][]stockAnswer)}
	c.connect()
	s.W.T.Cleanup(func() {
		_ = c.WS.Close()
		<-c.Ended
	})
	return c
}

func (c *StockClient) connect() {
	c.t.Helper()
	reads := &countingConn{}
	d := websocket.Dialer{NetDialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := c.s.Listener.Dial(ctx, network, address)
		reads.Conn = conn
		return reads, err
	}, ReadBufferSize: 1 << 20}
	ws, _, err := d.DialContext(c.t.Context(), "ws://127.0.0.1"+c.path, nil)
	require.NoError(c.t, err)
	var first Frame
	require.NoError(c.t, ws.ReadJSON(&first))
	require.Equal(c.t, "mesh/assign-id", first.Command)
	c.Mu.Lock()
	c.WS, c.reads, c.Ended, c.piece = ws, reads, make(chan struct{}), make(map[string]int64)
	require.NoError(c.t, json.Unmarshal(first.Payload, &c.ID))
	ended := c.Ended
	c.Mu.Unlock()
	go c.read(ws, reads, ended) // ends with the connection; Cleanup waits for it
}

// Reconnect cuts the connection and reconnects as a stock client does. It returns the
// calls of the joins and subscriptions in the order of the requests.
func (c *StockClient) Reconnect() (joins, subscribes []*StockCall) {
	c.t.Helper()
	_ = c.WS.Close()
	<-c.Ended
	c.s.W.Sleep(stockReconnect)
	c.connect()
	c.Mu.Lock()
	rooms, watched := slices.Clone(c.Rooms), slices.Clone(c.watched)
	c.Mu.Unlock()
	for _, room := range rooms {
		joins = append(joins, c.Room("mesh/join-room", room))
	}
	for _, room := range watched {
		subscribes = append(subscribes, c.Room("mesh/subscribe-presence", room))
	}
	return joins, subscribes
}

func (c *StockClient) read(ws *websocket.Conn, reads *countingConn, ended chan struct{}) {
	defer close(ended)
	for {
		_, data, err := ws.ReadMessage()
		var f Frame
		if err != nil || json.Unmarshal(data, &f) != nil {
			return
		}
		c.take(f, reads.count.Load())
	}
}

func (c *StockClient) take(f Frame, piece int64) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	switch {
	case f.ID != nil:
		call := c.waiting[*f.ID]
		if call == nil {
			return
		}
		delete(c.waiting, *f.ID)
		now := time.Now()
		a := stockAnswer{Room: call.room, Payload: f.Payload, At: now, Took: now.Sub(call.sent)}
		c.answers[call.command] = append(c.answers[call.command], a)
		if call.command == "mesh/subscribe-presence" && a.Ok() {
			c.piece[call.room] = piece
		}
		call.Done <- a
	case f.Command == "mesh/presence-update":
		var u Update
		if json.Unmarshal(f.Payload, &u) != nil {
			return
		}
		if at, subscribed := c.piece[u.RoomName]; !subscribed || at == piece {
			c.dropped[u.RoomName] = append(c.dropped[u.RoomName], u)
			return
		}
		c.updates[u.RoomName] = append(c.updates[u.RoomName], u)
	case f.Command == "ping":
		c.write("pong", map[string]any{}, nil)
	case f.Command == "latency:request":
		c.write("latency:response", map[string]any{}, nil)
	default:
		c.Pushes = append(c.Pushes, f)
	}
}

// Send sends a request and does not wait for the answer.
func (c *StockClient) Send(command, room string, payload any) *StockCall {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	call := &StockCall{command: command, room: room, sent: time.Now(), Done: make(chan stockAnswer, 1)}
	c.write(command, payload, call)
	return call
}

// write writes one request. mu is held.
func (c *StockClient) write(command string, payload any, call *StockCall) {
	c.next++
	if call != nil {
		c.waiting[c.next] = call
	}
	_ = c.WS.WriteJSON(map[string]any{"id": c.next, "command": command, "payload": payload}) // fails if the connection ends
}

// Room sends a request whose payload is the name of a room.
func (c *StockClient) Room(command, room string) *StockCall {
	return c.Send(command, room, map[string]any{"roomName": room})
}

// JoinRoom and SubscribePresence send the request, and remember the room for
// reconnects.
func (c *StockClient) JoinRoom(room string) *StockCall {
	c.Mu.Lock()
	c.Rooms = append(c.Rooms, room)
	c.Mu.Unlock()
	return c.Room("mesh/join-room", room)
}

func (c *StockClient) SubscribePresence(room string) *StockCall {
	c.Mu.Lock()
	c.watched = append(c.watched, room)
	c.Mu.Unlock()
	return c.Room("mesh/subscribe-presence", room)
}

// Publish sends a state.
func (c *StockClient) Publish(room string, state any) *StockCall {
	return c.Send("mesh/publish-presence-state", room, map[string]any{"roomName": room, "state": state})
}

// Wait waits for an answer.
func (c *StockClient) Wait(call *StockCall) stockAnswer {
	c.t.Helper()
	select {
	case a := <-call.Done:
		call.Done <- a // for the next Wait
		return a
	case <-time.After(30 * time.Second):
		require.FailNow(c.t, "no answer", "%s %s", call.command, call.room)
		return stockAnswer{}
	}
}

// WaitAll waits for answers and returns them in the order of the calls.
func (c *StockClient) WaitAll(calls ...*StockCall) []stockAnswer {
	c.t.Helper()
	answers := make([]stockAnswer, len(calls))
	for i, call := range calls {
		answers[i] = c.Wait(call)
	}
	return answers
}

// Got returns the updates of a room that the app's callback received.
func (c *StockClient) Got(room string) []Update {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.updates[room])
}

// Lost returns the updates of a room that arrived before the client could use them.
func (c *StockClient) Lost(room string) []Update {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	return slices.Clone(c.dropped[room])
}
