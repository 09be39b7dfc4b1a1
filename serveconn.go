package mesh

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/gorilla/websocket"
)

// ConnOptions say how ServeConn serves a connection that the app upgraded.
type ConnOptions struct {
	// Metadata becomes the connection's first metadata: any value that encodes
	// to JSON; nil: none.
	Metadata any
	// Foreign gets the frames that are not Mesh's: text that is not a JSON
	// object with a command, and binary messages. messageType is
	// websocket.TextMessage or BinaryMessage; text is not checked to be valid
	// UTF-8. Connection.SendMessage answers. It is called with one frame after
	// the other, in order, and not held back until the OnConnection functions are
	// through. These frames do not count towards Limits.CommandsPerSecond: how
	// many are too many the app decides. While it blocks nothing more is read:
	// neither commands nor pongs, so that a connection that waits for it too long
	// is closed for silence (1011, see Options.MaxMissedPongs). It has no time
	// limit but that: when the connection ends, a call that has not returned is
	// left behind. A panic is recovered and costs the frame. data may be kept.
	// Defaults to nil: such frames are ignored.
	Foreign func(c *Connection, messageType int, data []byte)
}

// ServeConn serves a WebSocket that the app has upgraded itself, and blocks
// until it ends. It owns ws from then on: nothing else may read, write or
// close it, whatever is returned. The end of ctx closes it with 1001. The
// error is never nil. It wraps [ErrClosed] and says how the connection ended;
// [ErrNotStarted], [ErrLimit], [ErrInvalidMetadata] and [ErrTooLarge] say that
// it was not served at all, as [ErrClosed] does after Shutdown. Origins and
// authentication are the app's to check: neither AllowedOrigins nor
// Authenticate of [Options] is asked. Fragments of messages are not counted (see
// Limits.CommandsPerSecond): the package websocket does not show them.
//
// While a handler of net/http waits for ServeConn, its stack, the request and
// its buffers stay in memory: 28 KiB for each idle connection, where ServeHTTP
// takes 10. To avoid it, return from the handler, and use an upgrader with a
// ReadBufferSize of 512 and a WriteBufferPool. Shutdown waits for the connection
// all the same:
//
//	ctx := context.WithoutCancel(r.Context())
//	go func() { _ = srv.ServeConn(ctx, ws, opts) }()
//	return
//
// [ErrInvalidOptions] if ctx or ws is nil, or ws has no network connection. A
// panic of the network connection under ws ends it, and is counted and logged.
// If a call of it blocks and minds neither deadlines nor Close, the connection
// leaves its rooms all the same, a few seconds after it has ended; ServeConn
// returns when the call does.
func (s *Server) ServeConn(ctx context.Context, ws *websocket.Conn, opts ConnOptions) error {
	if ws == nil || ws.NetConn() == nil {
		return fmt.Errorf("%w: ServeConn needs a WebSocket", ErrInvalidOptions)
	}
	if err := checkContext(ctx); err != nil {
		return s.turnAway(ws, err)
	}
	if err := s.reserve(); err != nil {
		return s.turnAway(ws, err)
	}
	taken := false
	defer func() { s.release(taken) }()
	metadata, err := s.n.appMetadata(ctx, opts.Metadata)
	if err == nil {
		err = s.take(false)
	}
	if err != nil {
		return s.turnAway(ws, err)
	}
	taken = true
	c, err := s.accept(ctx, ws, metadata, opts.Foreign)
	if err != nil {
		return err
	}
	return c.run(ctx)
}

// turnAway ends a WebSocket that is not served. If the server takes no more,
// the client gets the same close code as those that are served.
func (s *Server) turnAway(ws *websocket.Conn, why error) (err error) {
	err = why
	defer func() {
		if value := recover(); value != nil {
			s.n.calls.note("net.Conn", value)
		}
	}()
	defer func() { err = errors.Join(why, ws.Close()) }() // also if writing panics
	if _, ofApp := why.(*encodeError); !ofApp && errors.Is(why, ErrClosed) {
		frame := websocket.FormatCloseMessage(websocket.CloseServiceRestart, restarting)
		_ = ws.WriteControl(websocket.CloseMessage, frame, time.Now().Add(time.Second)) // it is closed in any case
	}
	return why
}
