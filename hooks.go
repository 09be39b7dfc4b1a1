package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"

	"github.com/meshpresence/mesh/internal/callbacks"
	"github.com/meshpresence/mesh/internal/wire"
)

// hooks are the app's functions for the start and end of connections.
type hooks struct {
	mu   sync.RWMutex // guards the fields below
	up   []func(ctx context.Context, c *Connection)
	down []func(ctx context.Context, c *Connection, reason error)
}

// OnConnection adds a function that is called for every new socket of this server,
// after the client has got its id. Functions are called in the order in which they were
// added. The client's commands wait until all have returned, so that metadata set here
// is present when the client joins. Panics are recovered. Each call is limited by
// Options.HookTimeout, and ctx ends after it and with the server.
//
// If a function panics or does not return in time, the connection is closed with code
// 1011, because its setup is not complete. It leaves the rooms that a function has
// already joined, its metadata is removed, none of its commands is carried out, and
// later functions are not called. If the server shuts down before the functions have
// been called, the code is 1012. To set metadata that identifies the client (its user
// id), prefer Options.Authenticate, which refuses a request before there is a
// connection. A nil function is logged and ignored.
//
// The TypeScript server's onConnection.
func (s *Server) OnConnection(f func(ctx context.Context, c *Connection)) {
	if f == nil {
		s.n.opts.Logger.Error("mesh: OnConnection was called with a nil function")
		return
	}
	s.hooks.mu.Lock()
	defer s.hooks.mu.Unlock()
	s.hooks.up = append(slices.Clip(s.hooks.up), f)
}

// OnDisconnection adds a function that is called for every socket of this server that
// has ended. It is called after the connection has left its rooms, or after two seconds
// if Redis does not answer. Functions are called in the order in which they were added.
// reason is the reason for the end, for a log. Panics are recovered, and each call is
// limited by Options.HookTimeout. If a function panics or is late, that is counted and
// logged, and later functions are still called. The functions are called for every
// connection for which the OnConnection functions were called, also if one of those
// failed. A nil function is logged and ignored.
func (s *Server) OnDisconnection(f func(ctx context.Context, c *Connection, reason error)) {
	if f == nil {
		s.n.opts.Logger.Error("mesh: OnDisconnection was called with a nil function")
		return
	}
	s.hooks.mu.Lock()
	defer s.hooks.mu.Unlock()
	s.hooks.down = append(slices.Clip(s.hooks.down), f)
}

// connected calls the OnConnection functions until one fails, and returns its error.
func (h *hooks) connected(n *core, c *Connection) error {
	h.mu.RLock()
	list := h.up
	h.mu.RUnlock()
	for _, f := range list {
		err := n.calls.Run(n.life.ctx, callbacks.Connection, n.opts.HookTimeout, func(ctx context.Context) error {
			f(ctx, c)
			return nil
		})
		if err != nil {
			return err // already counted and logged
		}
	}
	return nil
}

func (h *hooks) disconnected(n *core, c *Connection, reason error) {
	h.mu.RLock()
	list := h.down
	h.mu.RUnlock()
	if len(list) > 0 {
		// A hook that reads the rooms must not find the connection there. If Redis is
		// away, the hooks do not wait for long.
		_ = n.awaitRemoved(n.life.ctx, c.local.Gone())
	}
	for _, f := range list {
		_ = n.calls.Run(n.life.ctx, callbacks.Disconnection, n.opts.HookTimeout, func(ctx context.Context) error {
			f(ctx, c, reason)
			return nil
		})
	}
}

// CommandHandler carries out a command of the app. payload is the payload that the
// client sent, or nil if it sent none. The result is encoded to JSON and sent as the
// answer. ctx ends with the connection. A handler is called for many connections at
// once, and for several commands of one connection, so it must be safe for concurrent
// use.
//
// The answer to an error depends on its kind:
//
//   - a [*CommandError] chooses the answer
//   - an error that wraps an error of this package or of a context is answered with the
//     code of that error ([ErrNotPresent] with ENOTFOUND, [ErrUnavailable] with
//     EUNAVAILABLE, …)
//   - an error of Redis or of the network, and a panic, is answered with "Internal
//     error"
//   - the text of any other error is sent to the client, with code ESERVER and name
//     Error: do not return errors with text that clients must not see
type CommandHandler func(ctx context.Context, c *Connection, payload json.RawMessage) (any, error)

// handlers are the app's commands.
type handlers struct {
	mu     sync.RWMutex // guards byName
	byName map[string]CommandHandler
}

// HandleCommand registers a command of the app, which clients send on the same socket.
// Calls run concurrently with presence commands and with each other, up to
// Options.HandlerConcurrency per connection, and more wait. So a slow call delays no
// other. A call begins after earlier changes of the connection's metadata by the client
// have completed. A panic is recovered and answered with ESERVER, and so is a result
// that does not encode to JSON. The encoding is part of the call: a slow MarshalJSON of
// the app is left behind in the same way when the connection ends.
//
// It returns [ErrInvalidCommand] if the name is empty or one of the protocol's own (all
// that begin with "mesh/"), [ErrCommandExists] if the name is taken, and
// [ErrInvalidOptions] if h is nil.
func (s *Server) HandleCommand(name string, h CommandHandler) error {
	if wire.IsReserved(name) {
		return fmt.Errorf("%w: %q", ErrInvalidCommand, name)
	}
	if h == nil {
		return fmt.Errorf("%w: nil handler of %q", ErrInvalidOptions, name)
	}
	s.handlers.mu.Lock()
	defer s.handlers.mu.Unlock()
	if _, ok := s.handlers.byName[name]; ok {
		return fmt.Errorf("%w: %q", ErrCommandExists, name)
	}
	if s.handlers.byName == nil {
		s.handlers.byName = make(map[string]CommandHandler)
	}
	s.handlers.byName[name] = h
	return nil
}

func (h *handlers) get(name string) CommandHandler {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.byName[name]
}
