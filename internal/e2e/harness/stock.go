package harness

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/meshtest"
)

// StockClient is a client of meshtest with the habits of the stock JavaScript client, as
// the wire protocol describes them:
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

	url string // with the query

	sending sync.Mutex // held while a request gets its id and is written
	Mu      sync.Mutex // guards the fields below
	Client  *meshtest.Client
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

// pieceConn reads whole pieces from a connection, and counts them.
type pieceConn struct {
	net.Conn
	buf, rest []byte // rest is the unread part of the last piece
	count     int64
}

func (c *pieceConn) Read(b []byte) (int, error) {
	if len(c.rest) == 0 {
		n, err := c.Conn.Read(c.buf)
		if n == 0 || err != nil {
			return copy(b, c.buf[:n]), err
		}
		c.count++
		c.rest = c.buf[:n]
	}
	n := copy(b, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Stock connects a stock client. query is appended to the URL.
func (s *Server) Stock(query string) *StockClient {
	s.W.T.Helper()
	c := &StockClient{t: s.W.T, s: s, url: "ws://127.0.0.1/ws" + query, waiting: make(map[int64]*StockCall),
		updates: make(map[string][]Update), dropped: make(map[string][]Update), answers: make(map[string][]stockAnswer)}
	c.connect()
	s.W.T.Cleanup(c.Close)
	return c
}

func (c *StockClient) connect() {
	c.t.Helper()
	c.Mu.Lock()
	c.piece = make(map[string]int64)
	c.Mu.Unlock()
	reads := &pieceConn{buf: make([]byte, 1<<20)}
	client, err := meshtest.Dial(c.url, meshtest.WithEarlyReturn(), meshtest.WithTimeout(time.Hour),
		meshtest.WithNetDial(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := c.s.Listener.Dial(ctx, network, address)
			reads.Conn = conn
			return reads, err
		}),
		meshtest.WithFrames(func(f Frame) bool { return c.take(f, reads.count) }))
	require.NoError(c.t, err)
	c.Mu.Lock()
	defer c.Mu.Unlock()
	c.Client, c.ID = client, client.ID()
}

// Close breaks the connection.
func (c *StockClient) Close() { c.Client.Kill() }

// Reconnect cuts the connection and reconnects as a stock client does. It returns the
// calls of the joins and subscriptions in the order of the requests.
func (c *StockClient) Reconnect() (joins, subscribes []*StockCall) {
	c.t.Helper()
	c.Close()
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

// take handles a frame. piece is the number of the piece in which it arrived. The client
// answers pings.
func (c *StockClient) take(f Frame, piece int64) (ignore bool) {
	c.Mu.Lock()
	defer c.Mu.Unlock()
	u, isUpdate := updateOf(f)
	switch {
	case f.ID != nil:
		call := c.waiting[*f.ID]
		if call == nil {
			return true
		}
		delete(c.waiting, *f.ID)
		now := time.Now()
		a := stockAnswer{Room: call.room, Payload: f.Payload, At: now, Took: now.Sub(call.sent)}
		c.answers[call.command] = append(c.answers[call.command], a)
		if call.command == "mesh/subscribe-presence" && a.Ok() {
			c.piece[call.room] = piece
		}
		call.Done <- a
	case isUpdate:
		if at, subscribed := c.piece[u.RoomName]; !subscribed || at == piece {
			c.dropped[u.RoomName] = append(c.dropped[u.RoomName], u)
			return true
		}
		c.updates[u.RoomName] = append(c.updates[u.RoomName], u)
	case f.Command == "ping" || f.Command == "latency:request" || f.Command == "mesh/assign-id":
		return false
	default:
		c.Pushes = append(c.Pushes, f)
	}
	return true
}

// Send sends a request and does not wait for the answer.
func (c *StockClient) Send(command, room string, payload any) *StockCall {
	c.sending.Lock()
	defer c.sending.Unlock()
	call := &StockCall{command: command, room: room, sent: time.Now(), Done: make(chan stockAnswer, 1)}
	c.Mu.Lock()
	c.next++
	id, client := c.next, c.Client
	c.waiting[id] = call
	c.Mu.Unlock()
	text, err := json.Marshal(map[string]any{"id": id, "command": command, "payload": payload})
	if err != nil {
		panic(err) // of a test's payload
	}
	_ = client.Write(websocket.TextMessage, text) // fails if the connection ends
	return call
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
