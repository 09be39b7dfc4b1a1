package mesh

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
)

// hooks are the app's functions for the coming and going of connections.
type hooks struct {
	mu   sync.RWMutex // guards the fields below
	up   []func(ctx context.Context, c *Connection)
	down []func(ctx context.Context, c *Connection, reason error)
}

// OnConnection adds a function that is called for every new socket of this
// server, in the order added, right after the client has been told its id.
// The client's commands wait until all have returned, so that metadata set
// here is there when it joins. Each is recovered and limited by
// Options.HookTimeout; ctx ends then, and with the server.
//
// If one panics or does not return in time, the connection is closed with code
// 1011: it must not go on without what the function was to set up. It leaves the
// rooms that a function has already joined, its metadata is forgotten, none of
// its commands is carried out, and the functions that follow are not called. If
// the server shuts down before they have been called, the code is 1012. What a
// client is (its user id) is better set by Options.Authenticate, which refuses
// the request before there is a connection. A nil function is logged and ignored.
//
// The TypeScript server's onConnection.
func (s *Server) OnConnection(f func(ctx context.Context, c *Connection)) {
	if f == nil {
		s.n.opts.Logger.Error("mesh: OnConnection was given no function")
		return
	}
	s.hooks.mu.Lock()
	defer s.hooks.mu.Unlock()
	s.hooks.up = append(slices.Clip(s.hooks.up), f)
}

// OnDisconnection adds a function that is called for every socket of this
// server that has ended, in the order added, after it has left its rooms (or
// could not within two seconds, because Redis is away). reason says how it
// ended, for a log. Each is recovered and limited by Options.HookTimeout; one
// that panics or is late is counted and logged, and those after it are called.
// They are called for every connection for which the OnConnection functions
// were begun, also if one of those failed. A nil function is logged and ignored.
func (s *Server) OnDisconnection(f func(ctx context.Context, c *Connection, reason error)) {
	if f == nil {
		s.n.opts.Logger.Error("mesh: OnDisconnection was given no function")
		return
	}
	s.hooks.mu.Lock()
	defer s.hooks.mu.Unlock()
	s.hooks.down = append(slices.Clip(s.hooks.down), f)
}

// connected calls the OnConnection functions until one fails, and returns why.
func (h *hooks) connected(n *node, c *Connection) error {
	h.mu.RLock()
	list := h.up
	h.mu.RUnlock()
	for _, f := range list {
		err := n.calls.run(n.life, callbackConnection, n.opts.HookTimeout, func(ctx context.Context) error {
			f(ctx, c)
			return nil
		})
		if err != nil {
			return err // counted and logged
		}
	}
	return nil
}

func (h *hooks) disconnected(n *node, c *Connection, reason error) {
	h.mu.RLock()
	list := h.down
	h.mu.RUnlock()
	if len(list) > 0 {
		// Whoever looks into its rooms now is not to find it there any more.
		// Where Redis is away the hooks do not wait for it for ever.
		_ = n.awaitGone(n.life, c.own.Gone())
	}
	for _, f := range list {
		_ = n.calls.run(n.life, callbackDisconnection, n.opts.HookTimeout, func(ctx context.Context) error {
			f(ctx, c, reason)
			return nil
		})
	}
}

// CommandHandler carries out a command of the app's own. payload is what the
// client sent, nil where it sent none. The result is encoded to JSON and
// answered. ctx ends with the connection. It is called for many connections at
// once, and for several commands of one, so it must be safe for concurrent use.
//
// Of an error the client gets what a [*CommandError] says. One that wraps an
// error of this package, or of a context, is answered with that one's code
// ([ErrNotPresent] with ENOTFOUND, [ErrUnavailable] with EUNAVAILABLE, …); one
// of Redis or of the network, and a panic, with "Internal error". Any other is
// sent to the client as its text, with code ESERVER and name Error: return no
// error that says what clients must not know.
type CommandHandler func(ctx context.Context, c *Connection, payload json.RawMessage) (any, error)

// handlers are the app's own commands.
type handlers struct {
	mu     sync.RWMutex // guards byName
	byName map[string]CommandHandler
}

// HandleCommand lets clients send a command of the app's own on the same
// socket. Its calls run beside presence and each other, up to
// Options.HandlerConcurrency at once per connection (more are answered with
// EBUSY), so a slow one delays no other. A panic is recovered and answered
// with ESERVER, and so is a result that does not encode to JSON. The encoding
// is part of the call: a MarshalJSON of the app's may take as long, and is left
// behind in the same way when the connection ends.
//
// [ErrInvalidCommand] where the name is empty or the protocol's own, as all are
// that begin with "mesh/"; [ErrCommandExists] where it is taken;
// [ErrInvalidOptions] where h is nil.
func (s *Server) HandleCommand(name string, h CommandHandler) error {
	if err := checkCommand(name); err != nil {
		return err
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
