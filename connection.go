package mesh

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/handshake"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/local"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/watch"
	"github.com/meshpresence/mesh/internal/wire"
)

// Connection is one WebSocket on this server. All methods are safe for concurrent use,
// also after it has ended.
type Connection struct {
	s         *Server
	id        string
	ws        *websocket.Conn
	sock      *socket.Socket
	local     *local.Conn
	onForeign func(c *Connection, messageType int, data []byte)
	hooked    chan struct{} // closed when the OnConnection functions have returned; commands wait for it
	failed    bool          // one of them failed; read only after hooked is closed
	ended     sync.Once     // see end
	// closedByApp says that the app has called Close, perhaps after the connection has
	// begun to end.
	closedByApp atomic.Bool
	level       uint8 // of the wire protocol
	closing     bool  // told to close by Drain or Shutdown; guarded by the server's mu

	newRooms limit.Names  // rooms that it begins to use
	counted  *occupancies // rooms whose numbers it is subscribed to; nil: none yet; see there

	mu    sync.Mutex                     // guards the fields below
	subs  map[string]*watch.Subscription // by room
	stale *staleTold                     // nil: the client knows of no stale room
}

// core returns the core of the connection's server.
func (c *Connection) core() *core { return c.s.n }

// handler returns the app's handler of a command, or nil if it has none.
func (c *Connection) handler(command string) CommandHandler { return c.s.handlers.get(command) }

// ID returns the connection's id. It is random, new for every connection, and known to
// the client and to the viewers of its rooms.
func (c *Connection) ID() string { return c.id }

// Member returns the connection with its current metadata, as guards get it: without a
// state. The metadata is shared and must not be changed.
func (c *Connection) Member() Member {
	data, _ := c.local.Metadata()
	return Member{ID: c.id, UserID: c.local.User(), Metadata: data}
}

// Rooms returns the names of the rooms that the connection is in, tracked or not,
// sorted.
func (c *Connection) Rooms() []string { return c.local.Rooms() }

// RemoteAddr returns the peer's network address.
func (c *Connection) RemoteAddr() net.Addr { return c.ws.RemoteAddr() }

// Send queues a frame {command, payload} for the client and does not wait. A nil error
// does not mean that the frame has arrived. It fails if the payload does not encode to
// JSON, if the command is one of the protocol's own ([ErrInvalidCommand]), or if the
// connection has ended ([ErrClosed]). A client that does not keep up is closed with
// code 1013 (see QueueBytes of [Limits]).
func (c *Connection) Send(command string, payload any) error {
	// The end of the server ends the encoding as well, with ErrClosed.
	rf, err := c.core().appFrame(context.WithoutCancel(c.core().life.ctx), command, payload)
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

// SendMessage queues a message of the app's own protocol unchanged and does not wait.
// messageType is websocket.TextMessage or BinaryMessage. data is copied. The message is
// sent after all frames that were queued before. An app uses it to answer messages that
// [ConnOptions].Foreign received.
//
// The message counts towards Limits.QueueBytes, with at least 64 bytes and at most half
// of the limit. A client that does not read is closed with 1013. Text that is a JSON
// object with a command looks like a Mesh frame to the client. That is not checked.
//
// It returns [ErrInvalidMessage] if messageType is another, or if a text is not valid
// UTF-8 (the client would have to close the connection). It returns [ErrClosed] if the
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

// Close closes the connection with a WebSocket close code (0 means 1000) and reason. It
// leaves its rooms, whatever their Grace.
// Queued frames have one second to be written. The rest is dropped, and the peer has
// another second to answer. Close does not wait. Closing again does nothing.
//
// It returns [ErrInvalidOptions] if a close frame cannot carry the code or reason.
// Nothing is closed then. The code must be 1000 to 1003, 1007 to 1014 or 3000 to 4999,
// the reason valid UTF-8 of at most 123 bytes (RFC 6455, sections 5.5 and 7.4).
func (c *Connection) Close(code int, reason string) error {
	if code == 0 {
		code = websocket.CloseNormalClosure
	}
	if err := checkClose(code, reason); err != nil {
		return err
	}
	c.closedByApp.Store(true)
	c.sock.CloseByApp(code, reason)
	return nil
}

func checkClose(code int, reason string) error {
	switch {
	case (code < 1000 || code > 1003) && (code < 1007 || code > 1014) && (code < 3000 || code > 4999):
		return fmt.Errorf("%w: close code %d, must be 1000 to 1003, 1007 to 1014 or 3000 to 4999", ErrInvalidOptions, code)
	case !utf8.ValidString(reason):
		return fmt.Errorf("%w: the close reason is not valid UTF-8", ErrInvalidOptions)
	case len(reason) > wire.MaxCloseReason:
		return fmt.Errorf("%w: the close reason has %d bytes, must have at most %d", ErrInvalidOptions, len(reason), wire.MaxCloseReason)
	}
	return nil
}

// notSetUp is the reason of close frames with code 1011.
const notSetUp = "the connection could not be set up"

// restarting is the reason in close frames with code 1012.
const restarting = "server is restarting"

// errNetworkFailed is the reason for a connection whose network connection's Read
// panicked or ended its goroutine. It is created once, because fmt.Errorf would double
// the stack of the goroutine that waits for the connection.
var errNetworkFailed = fmt.Errorf("%w: the network connection failed", ErrClosed)

// run serves a connection until it ends, and returns the reason.
func (c *Connection) run(ctx context.Context) (reason error) {
	go c.welcome() // ends with the hooks, which are limited in time; end waits for it
	reason = errNetworkFailed
	defer func() { // also if the network connection's Read ends this goroutine
		if value := recover(); value != nil {
			c.core().calls.NotePanic("connection", value)
		}
		c.end(reason)
	}()
	reason = fmt.Errorf("%w: %w", ErrClosed, c.sock.Run(ctx))
	return reason
}

// welcome calls the OnConnection functions. If one of them fails, it closes the
// connection.
func (c *Connection) welcome() {
	defer close(c.hooked)
	err := c.s.hooks.connected(c.s.n, c)
	if err == nil {
		return
	}
	c.failed = true
	if errors.Is(err, ErrClosed) {
		c.restart()
	} else {
		c.sock.Close(websocket.CloseInternalServerErr, notSetUp)
	}
	c.close(departClosed)
}

// close removes the connection from the server and from its rooms.
func (c *Connection) close(d departure) {
	c.s.remove(c)
	c.core().disconnect(c.local, d)
}

// departureFor returns how the entries of the connection end, by the end of its socket.
func (c *Connection) departureFor(reason error) departure {
	end, ok := errors.AsType[*socket.End](reason)
	if !ok {
		return departLost // the network connection failed
	}
	if end.App {
		return departRemoved
	}
	switch end.Code {
	case websocket.CloseProtocolError, websocket.ClosePolicyViolation, websocket.CloseMessageTooBig:
		return departExpelled
	}
	switch end.Cause {
	case socket.CauseBroken, socket.CauseSilent, socket.CauseSlow, socket.CauseStuck:
		return departLost
	case socket.CauseFlood, socket.CauseTooLarge, socket.CauseProtocol:
		return departExpelled
	}
	return departClosed
}

// end cleans up after the connection has ended, once.
func (c *Connection) end(reason error) {
	c.ended.Do(func() {
		c.close(c.departureFor(reason))
		<-c.hooked
		c.s.hooks.disconnected(c.s.n, c, reason)
	})
}

// abandoned ends a connection whose socket has ended and hangs.
func (c *Connection) abandoned(e *socket.End) {
	c.core().life.work.Go(func() { c.end(fmt.Errorf("%w: %w", ErrClosed, e)) })
}

// wireHandler holds the methods that the socket calls. Those that carry out commands are in
// commands.go.
type wireHandler Connection

// Seen implements socket.Handler.
func (h *wireHandler) Seen(time.Time) { h.local.FrameSeen() }

// TakesForeignMessages implements socket.Handler.
func (h *wireHandler) TakesForeignMessages() bool { return h.onForeign != nil }

// ForeignMessage implements socket.Handler. A call that continues when the connection
// ends is left behind, so that the connection does not stay present until it returns.
func (h *wireHandler) ForeignMessage(ctx context.Context, messageType int, data []byte) {
	// calls.run counts and logs a failure, which loses the message.
	_ = h.s.n.calls.Run(ctx, callbacks.Foreign, 0, func(context.Context) error {
		h.onForeign((*Connection)(h), messageType, data)
		return nil
	})
}

// reply is what a command that has not failed leaves to be done. There are three kinds:
//
//   - valueReply: the answer with this value is to be sent. Nil is a value, too, and is
//     sent as null.
//   - answeredReply: nothing. The command has sent its answer by itself.
//   - pendingReply: the change is made but not yet written. While it waits for Redis,
//     later commands run. Then the answer is to be sent.
type reply struct {
	value    any
	answered bool
	wait     func(ctx context.Context) error // nil: nothing to wait for
	spared   bool                            // see pendingReply
}

// valueReply returns the reply of a command that is done. The answer has the given value.
func valueReply(value any) reply { return reply{value: value} }

// answeredReply returns the reply of a command that has sent its answer.
func answeredReply() reply { return reply{answered: true} }

// pendingReply returns the reply of a command that waits for Redis. The answer has the
// given value if wait returns nil, otherwise it is the error. spared reports that the
// command only superseded one whose state waited for its StateInterval.
func pendingReply(value any, spared bool, wait func(ctx context.Context) error) reply {
	return reply{value: value, wait: wait, spared: spared}
}

// await returns the value of the answer. For a pendingReply it waits.
func (r reply) await(ctx context.Context) (any, error) {
	if r.wait == nil {
		return r.value, nil
	}
	return r.value, r.wait(ctx)
}

// finish answers a request whose command has returned r and err, and waits before if r is
// pending.
func (c *Connection) finish(ctx context.Context, req wire.Request, r reply, err error) {
	var value any
	if err == nil {
		value, err = r.await(ctx)
	}
	c.respond(req, value, err)
}

// await waits until the OnConnection functions have returned, so that commands see
// metadata that these have set. It returns false if the connection ends.
func (c *Connection) await(ctx context.Context) bool {
	select {
	case <-c.hooked:
		return !c.failed
	case <-ctx.Done():
		return false
	}
}

// Refusal implements socket.Handler.
func (h *wireHandler) Refusal(req wire.Request, message, code, name string) *wire.Frame {
	return (*Connection)(h).failure(req, message, code, name, nil)
}

// respond answers a request, and the requests that it superseded, with a value or an
// error.
func (c *Connection) respond(req wire.Request, value any, err error) {
	for _, id := range req.Also {
		c.respond(wire.Request{ID: id, HasID: true, Command: req.Command}, value, err)
	}
	var f *wire.Frame
	if err == nil && req.HasID {
		f, err = wire.Answer(req.ID, req.Command, value)
	}
	if err != nil {
		message, code, name := wireError(err)
		f = c.failure(req, message, code, name, err)
	}
	c.answer(req, f)
}

func (c *Connection) answer(req wire.Request, f *wire.Frame) {
	if req.HasID {
		_ = c.sock.Answer(f) // fails only if the connection has ended
	}
}

// failure returns the answer to a failed request: an error object, or false if that is
// the only failure of the command at the connection's level. In that case the reason is
// counted and logged.
func (c *Connection) failure(req wire.Request, message, code, name string, err error) *wire.Frame {
	if answersFalse(req.Command) {
		c.s.failed.add(code)
		c.core().opts.Logger.Debug("mesh: command failed", "conn", c.id, "command", req.Command, "code", code, "reason", message, "error", err)
		if c.level < handshake.LevelErrors {
			f, _ := wire.Answer(req.ID, req.Command, false) // cannot fail to encode
			return f
		}
	}
	return wire.ErrorAnswer(req.ID, req.Command, message, code, name)
}

// answersFalse reports whether a failed command is answered with false at level 1, as
// by the TypeScript server. The stock client takes an error object for a success.
func answersFalse(command string) bool {
	switch command {
	case wire.CommandPublishPresenceState, wire.CommandClearPresenceState, wire.CommandUnsubscribePresence:
		return true
	}
	return false
}
