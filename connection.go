package mesh

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
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
	settled chan struct{} // closed when the OnConnection functions are through: commands wait for it
	failed  bool          // one of them failed; read only after settled
	ended   sync.Once     // see end
	told    bool          // to close, by Drain or Shutdown; guarded by the server's mu

	newRooms newRooms

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
	// The end of the server ends the encoding as well, with ErrClosed.
	rf, err := c.s.n.appFrame(context.WithoutCancel(c.s.n.life), command, payload)
	if err != nil {
		return err
	}
	f, err := wire.Push(rf.Command, wire.Raw(rf.Payload))
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

// Close closes the connection with a WebSocket close code (0: 1000) and reason.
// What is queued has a second to be written before, what is left then is
// dropped, and the peer has another second to answer. Close does not wait;
// closing again does nothing.
//
// [ErrInvalidOptions] if a close frame cannot carry them; nothing is closed
// then. The code must be 1000 to 1003, 1007 to 1014 or 3000 to 4999, the reason
// valid UTF-8 of at most 123 bytes (RFC 6455, sections 5.5 and 7.4).
func (c *Connection) Close(code int, reason string) error {
	if code == 0 {
		code = websocket.CloseNormalClosure
	}
	if err := checkClose(code, reason); err != nil {
		return err
	}
	c.sock.Close(code, reason)
	return nil
}

// maxReason is the number of bytes of a reason that fit into a close frame.
const maxReason = 123

func checkClose(code int, reason string) error {
	switch {
	case (code < 1000 || code > 1003) && (code < 1007 || code > 1014) && (code < 3000 || code > 4999):
		return fmt.Errorf("%w: close code %d, must be 1000 to 1003, 1007 to 1014 or 3000 to 4999", ErrInvalidOptions, code)
	case !utf8.ValidString(reason):
		return fmt.Errorf("%w: the close reason is not valid UTF-8", ErrInvalidOptions)
	case len(reason) > maxReason:
		return fmt.Errorf("%w: the close reason has %d bytes, must have at most %d", ErrInvalidOptions, len(reason), maxReason)
	}
	return nil
}

// accept makes a WebSocket a connection of this server, and owns it from then on.
// Where it cannot be one it is closed.
func (s *Server) accept(ctx context.Context, ws *websocket.Conn, metadata json.RawMessage,
	foreign func(*Connection, int, []byte),
) (*Connection, error) {
	c := &Connection{s: s, id: rand.Text(), ws: ws, foreign: foreign, settled: make(chan struct{})}
	c.sock = s.sockets.New(ws, (*wireHandler)(c))
	own, err := s.n.connect(ctx, c.id, metadata, c.sock)
	if err != nil {
		return nil, s.turnAway(ws, err)
	}
	c.own = own
	if !s.add(c) {
		s.n.disconnect(own)
		return nil, s.turnAway(ws, ErrClosed)
	}
	// Who knows the id may tell it to others, who may ask any server for it.
	// Where Redis is away the client is not kept waiting for long.
	if err := own.Registered(ctx); err != nil {
		s.n.opts.Logger.Debug("mesh: connection not registered yet", "conn", c.id, "error", err)
	}
	_ = c.sock.Send(wire.AssignID(c.id)) // before anything else
	return c, nil
}

// errNetworkFailed is how a connection ended whose network connection's Read
// panicked or ended its goroutine. It is made once: fmt.Errorf would double the
// stack of the goroutine that waits for the connection.
var errNetworkFailed = fmt.Errorf("%w: the network connection failed", ErrClosed)

// run serves a connection until it ends, and says how that was.
func (c *Connection) run(ctx context.Context) (reason error) {
	go c.welcome() // ends with the functions, which are limited in time; end waits for it
	reason = errNetworkFailed
	defer func() { // also if the network connection's Read ends this goroutine
		if value := recover(); value != nil {
			c.s.n.calls.note("connection", value)
		}
		c.end(reason)
	}()
	reason = fmt.Errorf("%w: %w", ErrClosed, c.sock.Run(ctx))
	return reason
}

// welcome calls the OnConnection functions. If one of them fails nothing of the
// connection remains.
func (c *Connection) welcome() {
	defer close(c.settled)
	err := c.s.hooks.connected(c.s.n, c)
	if err == nil {
		return
	}
	c.failed = true
	if errors.Is(err, ErrClosed) {
		c.sock.Close(websocket.CloseServiceRestart, restarting)
	} else {
		c.sock.Close(websocket.CloseInternalServerErr, "the connection could not be set up")
	}
	c.forget()
}

// forget takes the connection out of its rooms and makes it unknown.
func (c *Connection) forget() {
	c.s.remove(c)
	c.s.n.disconnect(c.own)
}

// end cleans up after the connection has ended, once.
func (c *Connection) end(reason error) {
	c.ended.Do(func() {
		c.forget()
		<-c.settled
		c.s.hooks.disconnected(c.s.n, c, reason)
	})
}

// abandoned ends a connection whose socket has ended and hangs.
func (c *Connection) abandoned(e *socket.End) {
	c.s.n.work.Go(func() { c.end(fmt.Errorf("%w: %w", ErrClosed, e)) })
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
	// connection must not stay present until it returns. So its answer comes
	// through a channel, and its result is encoded there: that may call methods
	// of the app's.
	answer := make(chan *wire.Frame, 1)
	err := h.s.n.calls.run(ctx, callbackCommand, 0, func(ctx context.Context) error {
		result, err := run(ctx, c, req.Payload)
		if err != nil || !req.HasID {
			return err
		}
		data, err := marshal(result)
		if err != nil {
			return fmt.Errorf("%w: %w", errNotEncoded, err)
		}
		f, err := wire.Answer(req.ID, req.Command, wire.Raw(data))
		answer <- f
		return err
	})
	switch {
	case err != nil:
		c.reply(req, nil, err)
	case req.HasID:
		c.answer(req, <-answer)
	}
}

// await waits until the OnConnection functions have returned, so that commands see
// what they set. It returns false if the connection ends.
func (c *Connection) await(ctx context.Context) bool {
	select {
	case <-c.settled:
		return !c.failed
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
