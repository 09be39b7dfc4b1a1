package mesh

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/owner"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/wire"
)

// Connection is one WebSocket on this server. All methods are safe for
// concurrent use, also after it has ended.
type Connection struct {
	s       *Server
	id      string
	ws      *websocket.Conn
	sock    *socket.Socket
	own     *owner.Conn
	foreign func(c *Connection, messageType int, data []byte)
	settled chan struct{} // closed when the OnConnection hooks are through: commands wait for it
	told    bool          // to close, by Drain or Shutdown; guarded by the server's mu

	mu   sync.Mutex               // guards subs
	subs map[string]*subscription // by room
}

// ID returns the connection's id: random, new for every connection, known to
// the client and to whoever sees it in a room.
func (c *Connection) ID() string { return c.id }

// Member returns the connection with its current metadata, as guards are given
// it: without a state. The metadata are shared and must not be changed.
func (c *Connection) Member() Member {
	data, _ := c.own.Metadata()
	return Member{ID: c.id, Metadata: data}
}

// Rooms returns the names of the rooms that the connection is in, tracked or
// not, sorted.
func (c *Connection) Rooms() []string { return c.own.Rooms() }

// RemoteAddr returns the peer's network address.
func (c *Connection) RemoteAddr() net.Addr { return c.ws.RemoteAddr() }

// Send queues a frame {command, payload} for the client and does not wait:
// nil does not say that the frame has arrived. It fails where the payload does
// not encode to JSON, the command is the protocol's own ([ErrInvalidCommand]),
// or the connection has ended ([ErrClosed]). A client that does not keep up is
// closed with code 1013 (see QueueBytes of [Limits]).
func (c *Connection) Send(command string, payload any) error {
	rf, err := appFrame(command, payload)
	if err != nil {
		return err
	}
	f, err := wire.Push(rf.Command, rf.Payload)
	if err != nil {
		return err
	}
	if c.sock.Send(f) != nil {
		return ErrClosed
	}
	return nil
}

// SendMessage queues a message of the app's own protocol, as it is, and does not
// wait: messageType is websocket.TextMessage or BinaryMessage, data is copied.
// It takes its place behind what was queued before, Mesh's frames included, and
// is how an app answers what [ConnOptions].Foreign hands it.
//
// It counts towards Limits.QueueBytes, with 64 bytes at least and half of the
// limit at most: a client that does not read is closed with 1013. A text that
// is a JSON object with a command looks to the client like a frame of Mesh's;
// nobody checks for that.
//
// ErrInvalidMessage where messageType is another, or a text is not valid UTF-8
// (the client would have to close the connection); ErrClosed where the
// connection has ended, or ends because too much waits.
func (c *Connection) SendMessage(messageType int, data []byte) error {
	switch {
	case messageType != websocket.TextMessage && messageType != websocket.BinaryMessage:
		return fmt.Errorf("%w: type %d is neither text nor binary", ErrInvalidMessage, messageType)
	case messageType == websocket.TextMessage && !utf8.Valid(data):
		return fmt.Errorf("%w: text is not valid UTF-8", ErrInvalidMessage)
	}
	if c.sock.SendMessage(messageType, bytes.Clone(data)) != nil {
		return ErrClosed
	}
	return nil
}

// Close closes the connection with a WebSocket close code (0: 1000) and reason
// (cut at 123 bytes). What is queued has a second to be written before, what is
// left then is dropped, and the peer has another second to answer. Close does
// not wait; closing again does nothing.
func (c *Connection) Close(code int, reason string) { c.sock.Close(code, reason) }

// accept makes a WebSocket a connection of this server, and owns it from then on.
// Where it cannot be one it is closed.
func (s *Server) accept(ctx context.Context, ws *websocket.Conn, metadata json.RawMessage,
	foreign func(*Connection, int, []byte),
) (*Connection, error) {
	c := &Connection{s: s, id: rand.Text(), ws: ws, foreign: foreign, settled: make(chan struct{})}
	c.sock = s.sockets.New(ws, (*wireHandler)(c))
	own, err := s.n.connect(ctx, c.id, metadata, c.sock)
	if err != nil {
		return nil, turnAway(ws, err)
	}
	c.own = own
	if !s.add(c) {
		s.n.disconnect(own)
		return nil, turnAway(ws, ErrClosed)
	}
	// Who knows the id may tell it to others, who may ask any server for it.
	// Where Redis is away the client is not kept waiting for long.
	if err := own.Registered(ctx); err != nil {
		s.n.opts.Logger.Debug("mesh: connection not registered yet", "conn", c.id, "error", err)
	}
	_ = c.sock.Send(wire.AssignID(c.id)) // before anything else
	return c, nil
}

// run serves a connection until it ends, and says how that was.
func (c *Connection) run(ctx context.Context) error {
	go func() { // ends with the hooks, which are limited in time; awaited below
		defer close(c.settled)
		c.s.hooks.connected(c.s.n, c)
	}()
	end := c.s.n.storeError(c.sock.Run(ctx))
	c.s.remove(c)
	c.s.n.disconnect(c.own)
	<-c.settled
	c.s.hooks.disconnected(c.s.n, c, end)
	return end
}

// wireHandler is what the socket calls.
type wireHandler Connection

// Seen implements socket.Handler.
func (h *wireHandler) Seen(time.Time) { h.own.Stamp() }

// TakesForeign implements socket.Handler.
func (h *wireHandler) TakesForeign() bool { return h.foreign != nil }

// Foreign implements socket.Handler. A call that goes on when the connection
// ends is left behind: the connection must not stay present until it returns.
func (h *wireHandler) Foreign(ctx context.Context, messageType int, data []byte) {
	// A failure is counted and logged there, and costs the frame.
	_ = h.s.n.calls.run(ctx, callbackForeign, 0, func(context.Context) error {
		h.foreign((*Connection)(h), messageType, data)
		return nil
	})
}

// IsConcurrent implements socket.Handler.
func (h *wireHandler) IsConcurrent(command string) bool { return h.s.handlers.get(command) != nil }

// Command implements socket.Handler: one of the protocol's own.
func (h *wireHandler) Command(ctx context.Context, req wire.Request) {
	if rest := h.Begin(ctx, req); rest != nil {
		rest(ctx)
	}
}

// Overlaps implements socket.Handler.
func (h *wireHandler) Overlaps(command string) bool { return overlaps(command) }

// Begin implements socket.Handler.
func (h *wireHandler) Begin(ctx context.Context, req wire.Request) (rest func(context.Context)) {
	c := (*Connection)(h)
	if !c.await(ctx) {
		return nil
	}
	if req.Command != wire.CommandLeaveRoom {
		c.own.Seen() // whoever was silent is back in its rooms first
	}
	run := commands[req.Command]
	if run == nil {
		c.answer(req, wire.NotFound(req.ID, req.Command))
		return nil
	}
	result, err := run(ctx, c, req)
	if err == nil && result == nil {
		return nil // it has answered by itself
	}
	return func(ctx context.Context) {
		if wait, ok := result.(begun); ok {
			result, err = wait(ctx)
		}
		c.reply(req, result, err)
	}
}

// Concurrent implements socket.Handler: one of the app's own.
func (h *wireHandler) Concurrent(ctx context.Context, req wire.Request) {
	c := (*Connection)(h)
	if !c.await(ctx) {
		return
	}
	run := h.s.handlers.get(req.Command)
	// A handler that ignores the end of its context is left behind: the
	// connection must not stay present until it returns. So its result comes
	// through a channel.
	answer := make(chan any, 1)
	err := h.s.n.calls.run(ctx, callbackCommand, 0, func(ctx context.Context) error {
		result, err := run(ctx, c, req.Payload)
		answer <- result
		return err
	})
	if err != nil {
		c.reply(req, nil, err)
		return
	}
	c.reply(req, <-answer, nil)
}

// await lets the OnConnection hooks finish first: what they set, commands see.
func (c *Connection) await(ctx context.Context) bool {
	select {
	case <-c.settled:
		return true
	case <-ctx.Done():
		return false
	}
}

// reply answers a request with a result or an error.
func (c *Connection) reply(req wire.Request, result any, err error) {
	if !req.HasID {
		return
	}
	var f *wire.Frame
	if err == nil {
		f, err = wire.Answer(req.ID, req.Command, result)
	}
	if err != nil {
		message, code, name := wireError(err)
		f = wire.ErrorAnswer(req.ID, req.Command, message, code, name)
	}
	c.answer(req, f)
}

func (c *Connection) answer(req wire.Request, f *wire.Frame) {
	if req.HasID {
		_ = c.sock.Send(f) // fails where the connection ends: nobody waits any more
	}
}
