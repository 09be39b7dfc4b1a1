package mesh

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/encode"
	"github.com/meshpresence/mesh/internal/handshake"
	"github.com/meshpresence/mesh/internal/redact"
	"github.com/meshpresence/mesh/internal/wire"
)

// ConnOptions are the options of a connection that ServeConn serves.
type ConnOptions struct {
	// Metadata becomes the connection's first metadata: any value that encodes to JSON,
	// or nil for none.
	Metadata any
	// Level is the level of the wire protocol that the client speaks, 1 or 2. At level
	// 1, failed commands to publish or clear a state and to unsubscribe are answered
	// with false, as the stock client expects. At level 2 they are answered with an
	// error object that has a code, and the client also gets updates of the types
	// metadata, disconnect and reconnect. ServeHTTP takes the level from the parameter
	// mesh-level of the URL. Defaults to 1.
	Level int
	// Foreign receives foreign messages: text that is not a JSON object with a command,
	// and binary messages. messageType is websocket.TextMessage or BinaryMessage. Text
	// may be invalid UTF-8. Answer with Connection.SendMessage. data may be kept.
	//
	// It is called with one message at a time, in order, possibly before the
	// OnConnection functions have returned. Foreign messages do not count towards
	// Limits.CommandsPerSecond. The app decides how many are too many. While a call
	// blocks, nothing more is read from the socket, neither commands nor pongs, so that
	// the connection is closed for silence if the call takes too long (1011, see
	// Options.MaxMissedPongs). There is no other time limit. When the connection ends,
	// a call that has not returned is left behind. A panic is recovered and loses the
	// message. Defaults to nil: foreign messages are ignored.
	Foreign func(c *Connection, messageType int, data []byte)
}

// ServeConn serves a WebSocket that the app has upgraded itself, and blocks until the
// connection ends. It owns ws from then on: other code must not read, write or close
// it, whatever is returned. The end of ctx closes the connection with 1001.
//
// The error is never nil. It wraps [ErrClosed] and says how the connection ended.
// [ErrNotStarted], [ErrLimit], [ErrInvalidMetadata] and [ErrTooLarge] mean that it was
// not served at all, as does [ErrClosed] after Shutdown. That is also logged, and the
// client gets a close frame: 1012 from Drain or Shutdown on, 1013 before Start and
// beyond Limits.Connections, 1011 otherwise. [ErrInvalidOptions] if ctx or ws is nil,
// ws has no network connection, or the level is invalid.
//
// The app must check the origin and authenticate the client: AllowedOrigins and
// Authenticate of [Options] are not used. Fragments of messages are not counted (see
// Limits.CommandsPerSecond), because the package websocket does not show them.
//
// While a handler of net/http waits for ServeConn, its stack, the request and its
// buffers stay in memory: 27.4 KiB for each idle connection, compared with 9.9 KiB with
// ServeHTTP (BenchmarkMemory in bench/). To avoid that, return from the handler, and use
// an upgrader with a ReadBufferSize of 512 and a WriteBufferPool. Shutdown still waits
// for the connection:
//
//	ctx := context.WithoutCancel(r.Context())
//	go func() { _ = srv.ServeConn(ctx, ws, opts) }()
//	return
//
// A panic of the network connection under ws ends the connection, and is counted and
// logged. If a call to the network connection blocks and ignores both deadlines and
// Close, the connection still leaves its rooms a few seconds after it has ended.
// ServeConn returns when the call returns.
func (s *Server) ServeConn(ctx context.Context, ws *websocket.Conn, opts ConnOptions) error {
	if ws == nil || ws.NetConn() == nil {
		return fmt.Errorf("%w: ServeConn needs a WebSocket", ErrInvalidOptions)
	}
	if err := checkContext(ctx); err != nil {
		return s.turnAway(ws, err)
	}
	if err := s.enter(); err != nil {
		return s.turnAway(ws, err)
	}
	taken := false
	defer func() { s.gate.Leave(taken) }()
	level, err := validLevel(opts.Level)
	var metadata json.RawMessage
	if err == nil {
		metadata, err = s.n.appMetadata(ctx, opts.Metadata)
	}
	if err == nil {
		err = s.gate.Take(false)
	}
	if err != nil {
		return s.turnAway(ws, err)
	}
	taken = true
	c, err := s.accept(ctx, ws, metadata, level, opts.Foreign)
	if err != nil {
		return err
	}
	return c.run(ctx)
}

// validLevel returns the level that the app has chosen, or an error.
func validLevel(level int) (int, error) {
	switch {
	case level == 0:
		return handshake.LevelStock, nil
	case level < handshake.LevelStock || level > handshake.LevelErrors:
		return 0, fmt.Errorf("%w: ConnOptions.Level is %d, must be 1 or %d", ErrInvalidOptions, level, handshake.LevelErrors)
	}
	return level, nil
}

// accept makes a WebSocket a connection of this server, and owns it from then on. If
// that fails, the WebSocket is closed.
func (s *Server) accept(ctx context.Context, ws *websocket.Conn, metadata json.RawMessage,
	level int, foreign func(*Connection, int, []byte),
) (*Connection, error) {
	c := &Connection{s: s, id: rand.Text(), ws: ws, level: uint8(level), onForeign: foreign, hooked: make(chan struct{})}
	c.sock = s.sockets.New(ws, (*wireHandler)(c))
	own, err := s.n.connect(ctx, c.id, metadata, c.sock)
	if err != nil {
		return nil, s.turnAway(ws, err)
	}
	c.local = own
	if !s.add(c) {
		s.n.disconnect(own, departRemoved)
		return nil, s.turnAway(ws, ErrClosed)
	}
	// The client may pass on its id, and others may then ask any server about it. If
	// Redis is away, the client does not wait for long.
	if err := own.Registered(ctx); err != nil {
		s.n.opts.Logger.Debug("mesh: connection not registered yet", "conn", c.id, "error", err)
	}
	_ = c.sock.Send(wire.AssignID(c.id)) // the first frame
	return c, nil
}

// turnAway closes a WebSocket that is not served, and logs the reason.
func (s *Server) turnAway(ws *websocket.Conn, why error) (err error) {
	err = why
	defer func() {
		if value := recover(); value != nil {
			s.n.calls.NotePanic("net.Conn", value)
		}
	}()
	defer func() { err = errors.Join(why, ws.Close()) }() // also if writing panics
	t := turnedAwayFor(why)
	line := "mesh: connection not served: " + t.line
	s.log.As(t.level, line, line, "error", redact.OneLine(why.Error()))
	frame := websocket.FormatCloseMessage(t.code, t.reason)
	_ = ws.WriteControl(websocket.CloseMessage, frame, time.Now().Add(time.Second)) // the socket is closed in any case
	return why
}

// turnedAway is the close frame and the log line for a WebSocket that is not served.
type turnedAway struct {
	code   int    // of the close frame
	reason string // for the client
	level  slog.Level
	line   string // end and kind of the log line
}

// turnedAwayFor returns the close frame and the log line for an error. If the server
// accepts no more connections, the close code is the same as for served ones.
func turnedAwayFor(why error) turnedAway {
	_, ofApp := why.(*encode.Error) //nolint:errorlint // not the errors that it wraps
	switch {
	case ofApp: // regardless of the error that it wraps
	case errors.Is(why, ErrClosed):
		return turnedAway{websocket.CloseServiceRestart, restarting, slog.LevelInfo, "the server is draining or shut down"}
	case errors.Is(why, ErrNotStarted):
		return turnedAway{websocket.CloseTryAgainLater, "the server is starting", slog.LevelWarn, "the server has not been started"}
	case errors.Is(why, ErrLimit):
		return turnedAway{websocket.CloseTryAgainLater, "too many connections", slog.LevelWarn, "the server is full"}
	}
	return turnedAway{websocket.CloseInternalServerErr, notSetUp, slog.LevelWarn, "it could not be set up"}
}
