package meshtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// closeTime limits the wait of Close for the server's close frame.
const closeTime = time.Second

// Client is one connection to a server. [Server.Connect] makes it, or [Connect] for a
// server elsewhere. It speaks the Mesh wire protocol like the stock JavaScript client: it
// answers pings and latency requests by itself. It does not reconnect.
//
// Received messages are kept until the test asks for them. [Client.NextUpdate] and
// similar methods return updates, [Client.NextPush] returns other pushes.
//
// [Server.Dial], [Dial], [Client.Call] and [Client.Write] return errors, because a test may
// expect them to fail. On an error all other methods fail the test that the client was
// connected in, with a message that shows the frames that came instead. Like t.Fatalf,
// they must be called from the test's own goroutine. A refusal by the server is an answer and not an
// error: Success is false. A client without a test panics instead of failing it.
type Client struct {
	tb        TB
	server    *Server // nil: the server is elsewhere
	ws        *websocket.Conn
	header    http.Header // of the answer to the upgrade
	replaces  string      // see WithReplaces; "": none
	timeout   time.Duration
	frames    func(Frame) bool // see WithFrames; nil: none
	answers   sync.WaitGroup   // answers to pings that are being written
	readEnded chan struct{}    // closed when reading has ended
	// writing holds a value while a frame is written. It is not a mutex, because a
	// synctest bubble counts a goroutine that waits for a mutex as busy.
	writing chan struct{}

	mu         sync.Mutex // guards the fields below
	id         string
	lastID     int64
	calls      map[int64]chan json.RawMessage
	updates    []Update
	pushes     []push
	raw        []message
	rooms      map[string]bool // answers to Subscribe, for messages
	silent     bool
	unanswered []string      // answers that were not sent because the client is silent
	changed    chan struct{} // closed, and replaced, if any of this changes
	end        *CloseError   // why reading ended; nil if it has not
}

type push struct {
	command string
	payload json.RawMessage
}

// CloseError says how a connection ended.
type CloseError struct {
	// Code is the code of the close frame, or 1006 if the connection broke without one.
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

// byServer reports whether the connection broke, or was closed with a code that the
// server itself uses while OnConnection functions run.
func (e *CloseError) byServer() bool {
	switch e.Code {
	case websocket.CloseAbnormalClosure, websocket.CloseInternalServerErr, websocket.CloseServiceRestart:
		return true
	}
	return false
}

func newClient(t TB, s *Server, d *dialing) *Client {
	return &Client{
		tb: t, server: s, replaces: d.replaces, timeout: d.timeout, frames: d.frames,
		readEnded: make(chan struct{}), writing: make(chan struct{}, 1),
		calls: make(map[int64]chan json.RawMessage), rooms: make(map[string]bool),
		changed: make(chan struct{}),
	}
}

// ID returns the connection id that the server assigned.
func (c *Client) ID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.id
}

// Subprotocol returns the subprotocol that the server has chosen, or "" for none.
func (c *Client) Subprotocol() string { return c.ws.Subprotocol() }

// Header returns the header of the server's answer to the upgrade request, such as the
// cookies that a middleware has set.
func (c *Client) Header() http.Header { return c.header }

// Silence stops the client from answering pings and latency requests, like a client whose
// machine sleeps. The connection stays open, and the client sends only what the test
// sends. [Client.Resume] ends it.
func (c *Client) Silence() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.silent = true
}

// Resume ends the effect of [Client.Silence]. The pings and latency requests that came
// since are answered now.
func (c *Client) Resume() {
	c.mu.Lock()
	unanswered := c.unanswered
	c.silent, c.unanswered = false, nil
	c.mu.Unlock()
	for _, command := range unanswered {
		c.answer(command)
	}
}

// Kill breaks the connection without a close frame, as a crashed browser does, and
// returns when the client's end is closed. The server notices the break by itself. See
// [Client.Close] for its next steps.
func (c *Client) Kill() {
	if conn, ok := c.ws.NetConn().(*memConn); ok {
		conn.abort()
	} else {
		_ = c.ws.Close() // the network connection, without a close frame
	}
	<-c.readEnded
	yield()
}

// Close closes the connection with code 1000, like a page that the user leaves. It
// returns when the server has closed its end, or after a second. Closing again does
// nothing. A client of [Server.Connect] or [Connect] is closed when the test is over.
//
// The connection then leaves its rooms, and the functions given to Server.OnDisconnection
// are called. In a synctest bubble all of that has happened when Close returns, except
// for parts that take time. Outside a bubble, or if such a function waits or Redis does
// not answer, wait for the effect that the test is about: for a leave with
// [Client.ExpectUpdate] of another client, for a function with a channel that it closes,
// for everything with [Server.Close].
func (c *Client) Close() {
	bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	if err := c.ws.WriteControl(websocket.CloseMessage, bye, time.Now().Add(closeTime)); err == nil {
		t := time.NewTimer(closeTime)
		defer t.Stop()
		select {
		case <-c.readEnded:
		case <-t.C:
		}
	}
	c.Kill()
	if c.server == nil {
		return
	}
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	delete(c.server.clients, c)
}

// AwaitClose waits until the connection has ended and returns how. It fails the test if
// the connection does not end. See [Client.Close] for the steps of the server.
func (c *Client) AwaitClose() CloseError {
	c.tb.Helper()
	if !c.await(c.timeout, func() bool { return c.end != nil }) {
		c.fail("the connection has not ended within %v", c.timeout)
		return CloseError{}
	}
	yield()
	return *c.ended()
}

// Done returns a channel that is closed when the connection has ended. After that,
// [Client.AwaitClose] returns at once. Use it to wait for several clients, or in another
// goroutine than the test's.
func (c *Client) Done() <-chan struct{} { return c.readEnded }

// ended returns how the connection ended, or nil if it has not.
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
			// If it fails, reading fails too.
			_ = c.ws.WriteControl(websocket.PongMessage, []byte(data), time.Now().Add(closeTime))
		}
		return nil
	})
	go func() { // Kill waits for it.
		defer close(c.readEnded)
		err := c.read()
		_ = c.ws.Close() // has ended already
		c.answers.Wait()
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

// read receives messages until the connection ends.
func (c *Client) read() error {
	for {
		kind, data, err := c.ws.ReadMessage()
		if err != nil {
			return err
		}
		var f Frame
		if kind != websocket.TextMessage || json.Unmarshal(data, &f) != nil || f.Command == "" {
			c.change(func() { c.raw = append(c.raw, message{kind, data}) })
			continue
		}
		taken := c.frames != nil && c.frames(f)
		switch {
		case f.ID != nil:
			c.handleAnswer(*f.ID, f.Payload)
		case !taken || f.Command == wire.PushAssignID:
			c.handlePush(f)
		}
	}
}

// handlePush handles a push.
func (c *Client) handlePush(f Frame) {
	switch f.Command {
	case wire.PushPing:
		// The client reads on while the server is slow to read.
		c.answers.Go(func() { c.answer(wire.CommandPong) })
	case wire.PushLatencyRequest:
		c.answers.Go(func() { c.answer(wire.CommandLatencyResponse) })
	case wire.PushLatency: // ignored
	case wire.PushAssignID:
		c.change(func() { _ = json.Unmarshal(f.Payload, &c.id) }) // if it fails, the wait for the id fails
	case wire.PushPresenceUpdate:
		u, _ := f.Update() // empty if it is unreadable
		c.change(func() { c.updates = append(c.updates, u) })
	default:
		c.change(func() { c.pushes = append(c.pushes, push{f.Command, f.Payload}) })
	}
}

// answer sends a sign of life, unless the client is silent.
func (c *Client) answer(command string) {
	c.mu.Lock()
	if c.silent {
		if !slices.Contains(c.unanswered, command) {
			c.unanswered = append(c.unanswered, command)
		}
		c.mu.Unlock()
		return
	}
	id := c.newID()
	c.mu.Unlock()
	// If it fails, reading fails too.
	_ = c.write(request{ID: id, Command: command, Payload: json.RawMessage("{}")})
}

// change runs f with mu held and wakes all waiting calls.
func (c *Client) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	close(c.changed)
	c.changed = make(chan struct{})
}

// await waits until ok returns true. ok is called with mu held. await gives up after d,
// or when the connection has ended.
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
