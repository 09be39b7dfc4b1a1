package meshtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// closeTime is how long Close waits for the server's close frame.
const closeTime = time.Second

// Client is one connection to a [Server] that speaks the Mesh wire protocol as
// the stock JavaScript client does: it answers pings and latency requests by
// itself. It does not reconnect.
//
// What the server sends is kept until the test asks for it: updates by
// [Client.NextUpdate] and its like, other pushes by [Client.NextPush].
//
// [Server.Dial], [Client.Call] and [Client.Write] return errors, for what a
// test expects to fail. All other methods fail the test (the one that the client was connected
// in) where something goes wrong, with a message that says what came instead:
// like t.Fatalf, they are for the test's own goroutine. That a server says no
// is no failure but an answer: Success is false. A client without a test
// panics where it would fail one.
type Client struct {
	tb      TB
	server  *Server
	conn    *memConn
	ws      *websocket.Conn
	timeout time.Duration
	over    chan struct{} // closed when reading has ended
	// writing is held while a frame is written. It is no mutex, since a
	// synctest bubble takes a goroutine that waits for one to be busy.
	writing chan struct{}

	mu      sync.Mutex // guards the fields below
	id      string
	lastID  int64
	calls   map[int64]chan json.RawMessage
	updates []Update
	pushes  []push
	raw     []message
	rooms   map[string]bool // answers to Subscribe, for messages
	silent  bool
	owed    []string      // answers that were not given for silence
	changed chan struct{} // closed, and replaced, when any of this changes
	end     *CloseError   // why reading ended; nil: it has not
}

type push struct {
	command string
	payload json.RawMessage
}

// CloseError says how a connection ended.
type CloseError struct {
	// Code is that of the close frame; 1006 where there was none, because the
	// connection broke.
	Code   int
	Reason string
}

// Error returns the code and the reason.
func (e *CloseError) Error() string { return "meshtest: " + e.text() }

func (e *CloseError) text() string {
	if e.Code == websocket.CloseAbnormalClosure {
		return "connection broke"
	}
	return fmt.Sprintf("connection closed: %d %q", e.Code, e.Reason)
}

func newClient(t TB, s *Server, timeout time.Duration) *Client {
	return &Client{
		tb: t, server: s, timeout: timeout,
		over: make(chan struct{}), writing: make(chan struct{}, 1),
		calls: make(map[int64]chan json.RawMessage), rooms: make(map[string]bool),
		changed: make(chan struct{}),
	}
}

// ID returns the connection's id, as the server has assigned it.
func (c *Client) ID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.id
}

// Subprotocol returns the subprotocol that the server has taken, "": none.
func (c *Client) Subprotocol() string { return c.ws.Subprotocol() }

// Silence makes the client answer no ping and no latency request any more, as
// one whose machine sleeps: the connection stays open, and nothing comes from
// it unless the test sends something. [Client.Resume] ends it.
func (c *Client) Silence() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.silent = true
}

// Resume ends what [Client.Silence] began. What has not been answered
// meanwhile is answered now.
func (c *Client) Resume() {
	c.mu.Lock()
	owed := c.owed
	c.silent, c.owed = false, nil
	c.mu.Unlock()
	for _, command := range owed {
		c.answer(command)
	}
}

// Kill breaks the connection without a close frame, as a crashed browser does,
// and returns when the client's end is closed.
func (c *Client) Kill() {
	c.conn.abort()
	<-c.over
}

// Close closes the connection with code 1000, as a page that is left, and
// returns when the server has closed its end, or after a second. Closing again
// does nothing. [Server.Connect] has it called when the test is over.
func (c *Client) Close() {
	bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	if err := c.ws.WriteControl(websocket.CloseMessage, bye, time.Now().Add(closeTime)); err == nil {
		t := time.NewTimer(closeTime)
		defer t.Stop()
		select {
		case <-c.over:
		case <-t.C:
		}
	}
	c.Kill()
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	delete(c.server.clients, c)
}

// AwaitClose waits until the connection has ended and returns how. It fails
// the test if it does not end.
func (c *Client) AwaitClose() CloseError {
	c.tb.Helper()
	if !c.await(c.timeout, func() bool { return c.end != nil }) {
		c.fail("the connection has not ended within %v", c.timeout)
		return CloseError{}
	}
	return *c.ended()
}

// ended returns how the connection ended, nil: it has not.
func (c *Client) ended() *CloseError {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.end
}

// begin starts reading.
func (c *Client) begin() {
	c.ws.SetPingHandler(func(data string) error {
		c.mu.Lock()
		silent := c.silent
		c.mu.Unlock()
		if !silent {
			// Where it fails, reading does too.
			_ = c.ws.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(closeTime))
		}
		return nil
	})
	go func() { // ends with the connection, which Close closes; awaited there
		defer close(c.over)
		err := c.read()
		_ = c.ws.Close() // over already
		c.change(func() { c.end = closeErrorOf(err) })
	}()
}

func closeErrorOf(err error) *CloseError {
	var closed *websocket.CloseError
	if errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure {
		return &CloseError{Code: closed.Code, Reason: closed.Text}
	}
	return &CloseError{Code: websocket.CloseAbnormalClosure}
}

// read takes what comes, until the connection ends.
func (c *Client) read() error {
	for {
		kind, data, err := c.ws.ReadMessage()
		if err != nil {
			return err
		}
		var f struct {
			ID      *int64          `json:"id"`
			Command string          `json:"command"`
			Payload json.RawMessage `json:"payload"`
		}
		if kind != websocket.TextMessage || json.Unmarshal(data, &f) != nil || f.Command == "" {
			c.change(func() { c.raw = append(c.raw, message{kind, data}) })
			continue
		}
		if f.ID != nil {
			c.answered(*f.ID, f.Payload)
			continue
		}
		c.pushed(f.Command, f.Payload)
	}
}

// pushed takes a push.
func (c *Client) pushed(command string, payload json.RawMessage) {
	switch command {
	case wire.PushPing:
		c.answer(wire.CommandPong)
	case wire.PushLatencyRequest:
		c.answer(wire.CommandLatencyResponse)
	case wire.PushLatency: // nothing asks for it
	case wire.PushAssignID:
		c.change(func() { _ = json.Unmarshal(payload, &c.id) }) // else the wait for it fails
	case wire.PushPresenceUpdate:
		c.change(func() { c.updates = append(c.updates, decodeUpdate(payload)) })
	default:
		c.change(func() { c.pushes = append(c.pushes, push{command, payload}) })
	}
}

// answer sends a sign of life, unless the client is silent.
func (c *Client) answer(command string) {
	c.mu.Lock()
	if c.silent {
		if !slices.Contains(c.owed, command) {
			c.owed = append(c.owed, command)
		}
		c.mu.Unlock()
		return
	}
	id := c.newID()
	c.mu.Unlock()
	// Where it fails, reading does too.
	_ = c.write(request{ID: id, Command: command, Payload: json.RawMessage("{}")})
}

// change changes what mu guards, and wakes whoever waits for that.
func (c *Client) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	close(c.changed)
	c.changed = make(chan struct{})
}

// await waits until ok says so, which is asked with mu held. It gives up after
// d, and when the connection has ended.
func (c *Client) await(d time.Duration, ok func() bool) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	for late := false; ; {
		c.mu.Lock()
		is, end, changed := ok(), c.end != nil, c.changed
		c.mu.Unlock()
		if is || end || late {
			return is
		}
		select {
		case <-changed:
		case <-t.C:
			late = true
		}
	}
}

// fail ends the test.
func (c *Client) fail(format string, args ...any) {
	c.tb.Helper()
	c.tb.Fatalf("meshtest: client %s: %s", c.ID(), strings.TrimPrefix(fmt.Sprintf(format, args...), "meshtest: "))
}
