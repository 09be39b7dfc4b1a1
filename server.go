package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/wire"
)

// Server speaks the Mesh wire protocol over WebSockets and keeps presence. It
// is an http.Handler: mount it where clients connect.
//
//	srv, err := mesh.NewServer(mesh.Options{Redis: client})
//	…
//	err = srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{})
//	err = srv.Start(ctx)
//	http.Handle("/ws", srv)
//
// Hooks, commands and rules may be added before and after Start. All methods
// are safe for concurrent use.
type Server struct {
	n        *node
	upgrader websocket.Upgrader
	arrivals arrivals
	sockets  *socket.Group
	log      *limit.Log // of all sockets
	hooks    hooks
	handlers handlers

	chosen bool // the app has set Limits.Connections

	mu      sync.RWMutex // guards the fields below
	most    int          // connections at once; negative: no limit
	conns   map[string]*Connection
	open    int // connections, those included that are being upgraded
	leaving leaving

	gone     chan struct{} // closed when no more are taken and the last connection has ended
	quit     chan struct{} // closed when Shutdown begins
	quitOnce sync.Once
}

// NewServer returns a server on opts.Redis, which stays the app's to close
// after Shutdown. Nothing is asked of Redis before Start. Errors wrap
// [ErrInvalidOptions].
func NewServer(opts Options) (*Server, error) {
	chosen := opts.Limits.Connections > 0 // before the default takes its place
	n, err := newNode(opts)
	if err != nil {
		return nil, err
	}
	origins, err := compileOrigins(n.opts.AllowedOrigins)
	if err != nil {
		return nil, err
	}
	s := &Server{
		n:      n,
		chosen: chosen,
		most:   n.opts.Limits.Connections,
		conns:  make(map[string]*Connection),
		log:    limit.NewLog(n.opts.Logger),
		gone:   make(chan struct{}),
		quit:   make(chan struct{}),
	}
	s.sockets = socket.NewGroup(s.socketConfig())
	s.arrivals.bucket = limit.NewBucket(time.Now(), n.opts.Limits.UpgradesPerSecond, 1)
	s.upgrader = websocket.Upgrader{
		CheckOrigin:     origins,
		WriteBufferPool: &sync.Pool{}, // a socket's writer needs none
	}
	n.control.sockets, n.control.closer = s.deliver, s.closeConn
	n.fit = s.fitConnections
	return s, nil
}

// socketConfig says how the sockets behave.
func (s *Server) socketConfig() socket.Config {
	o := &s.n.opts
	return socket.Config{
		Wheel: s.n.wheel, FrameBytes: o.Limits.FrameBytes, QueueBytes: o.Limits.QueueBytes, WriteTimeout: o.WriteTimeout,
		PingInterval: o.PingInterval, MaxMissedPongs: o.missedPongs(), LatencyInterval: o.LatencyInterval,
		CommandsPerSecond: o.Limits.CommandsPerSecond, HandlerConcurrency: o.HandlerConcurrency,
		Logger: o.Logger, Log: s.log,
	}
}

// Start makes the server one of those that share the Redis: it returns when
// Redis has answered and the subscriptions are confirmed. Until then, while
// ctx lasts, it keeps trying; after an error it may be called again, and once
// it has succeeded further calls do nothing. Requests before that are answered
// with 503.
//
// It returns [ErrUnavailable] if Redis did not answer before ctx ended. If trying
// again would not help it fails at once, and the message says what to do:
//   - [ErrUnavailable] if Redis rejects the user (a wrong password; a command,
//     key or channel that its ACL lacks), or lacks a command.
//   - [ErrInvalidOptions] if Options.Redis is of the wrong kind for what it leads
//     to: a *redis.Client to a Cluster or a replica, a *redis.ClusterClient to a
//     Redis that is none; or if Limits.Connections is more than this process has
//     file descriptors for. (Behind Sentinel a replica is waited for: it is about
//     to become the master.)
//   - [ErrIncompatible] if the keys under Options.Prefix are of another format,
//     of another kind of client, or of another number of Options.Buckets.
func (s *Server) Start(ctx context.Context) error { return s.n.start(ctx) }

// Ready returns nil while the server accepts connections: from when Start is
// through ([ErrNotStarted] before) until Drain or Shutdown is called ([ErrClosed]
// from then on). It is for readiness probes. It answers at once, from memory,
// whatever becomes of ctx.
//
// It stays nil while Redis is away: sockets are served then too, and all
// servers of a group would fail at once, so that none were left to connect to.
func (s *Server) Ready(ctx context.Context) error { return s.n.ready(ctx) }

// ReadyHandler returns a handler for a readiness probe: it answers 200 while
// Ready returns nil, and 503 with the error as text otherwise. It asks nothing
// of Redis. Mount it apart from the socket, say at /readyz.
func (s *Server) ReadyHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		if err := s.Ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n") // the probe that has gone does not care
	})
}

// Presence returns the manager of who is where.
func (s *Server) Presence() *PresenceManager { return &PresenceManager{n: s.n, ofServer: true} }

// Connections returns the manager of connections' metadata, on all servers.
func (s *Server) Connections() *ConnectionManager { return &ConnectionManager{n: s.n} }

// Rooms returns the manager of rooms, on all servers.
func (s *Server) Rooms() *RoomManager { return &RoomManager{n: s.n} }

// Connection returns the open socket of that id, if it is on this server.
func (s *Server) Connection(id string) (*Connection, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c, ok := s.conns[id]
	return c, ok
}

// ServeHTTP upgrades a request to a WebSocket, which is served from then on, and
// returns: what net/http keeps for a request and its handler would otherwise be
// most of what an idle connection costs. Values of the request's context are
// there for the app's commands; its end is not. A value that is used again for
// other requests once the handler has returned, as a router's own context often
// is, must not be read there: Options.Authenticate is the place, which copies
// what is needed into the metadata. Middleware that counts, times or limits
// handlers sees the upgrade, not the socket: see Server.Stats and
// Limits.Connections.
//
// What stands against it is answered with a status: 503 with Retry-After before
// Start, from Drain or Shutdown on, or past a limit; 403 for a foreign origin; what
// Options.Authenticate chose, or 401; 400 where it is no upgrade.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := s.reserve(); err != nil {
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return
	}
	serving := false
	defer func() {
		if !serving {
			s.release()
		}
	}()
	ws, metadata := s.upgrade(w, r)
	if ws == nil {
		return
	}
	ctx := context.WithoutCancel(r.Context())
	c, err := s.accept(ctx, ws, metadata, nil)
	if err != nil {
		return // the client has been told
	}
	serving = true
	go func() { // ends with the connection; Drain and Shutdown wait for it
		defer s.release()
		defer c.recovered()
		_ = c.run(ctx) // how a connection ended is logged where it did
	}()
}

// recovered is deferred where net/http does not recover: a connection that
// panics takes nobody with it.
func (c *Connection) recovered() {
	if value := recover(); value != nil {
		c.s.log.Error("mesh: connection panicked", "panic", limit.Shorten(fmt.Sprint(value)), "stack", string(debug.Stack()))
		_ = c.ws.NetConn().Close() // it is lost in any case
		c.s.remove(c)
		c.s.n.disconnect(c.own)
	}
}

// upgrade answers a request: with an upgrade, or (nil) with what stands against it.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request) (*websocket.Conn, []byte) {
	if !websocket.IsWebSocketUpgrade(r) {
		http.Error(w, "a WebSocket upgrade is expected here", http.StatusBadRequest)
		return nil, nil
	}
	if !s.arrivals.allow() {
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return nil, nil
	}
	if !s.upgrader.CheckOrigin(r) { // before the hook: a foreign page shall not trigger it
		http.Error(w, http.StatusText(http.StatusForbidden), http.StatusForbidden)
		return nil, nil
	}
	metadata, err := s.authenticate(r)
	if err != nil {
		status, message := refusalOf(err)
		http.Error(w, message, status)
		return nil, nil
	}
	if s.Ready(r.Context()) != nil { // it began to drain while the hook was asked
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return nil, nil
	}
	ws, err := socket.Upgrade(&s.upgrader, w, r)
	if err != nil {
		return nil, nil // the upgrader has answered
	}
	return ws, metadata
}

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
// Authenticate of [Options] is asked.
//
// While a handler of net/http waits for ServeConn, its stack, the request and
// its buffers stay in memory: 28 KiB for each idle connection, where ServeHTTP
// takes 10. What can be done about it is to return from the handler, with an
// upgrader whose ReadBufferSize is 512 and that has a WriteBufferPool; Shutdown
// waits for the connection all the same:
//
//	ctx := context.WithoutCancel(r.Context())
//	go func() { _ = srv.ServeConn(ctx, ws, opts) }()
//	return
func (s *Server) ServeConn(ctx context.Context, ws *websocket.Conn, opts ConnOptions) error {
	err := s.reserve()
	if err == nil {
		defer s.release()
		var metadata []byte
		if metadata, err = s.n.encodeMetadata(opts.Metadata); err == nil {
			c, err := s.accept(ctx, ws, metadata, opts.Foreign)
			if err != nil {
				return err
			}
			return c.run(ctx)
		}
	}
	return turnAway(ws, err)
}

// turnAway ends a WebSocket that is not served. Where the server takes no more,
// the client is told so, like those that it has.
func turnAway(ws *websocket.Conn, why error) error {
	if errors.Is(why, ErrClosed) {
		frame := websocket.FormatCloseMessage(websocket.CloseServiceRestart, restarting)
		_ = ws.WriteControl(websocket.CloseMessage, frame, time.Now().Add(time.Second)) // it is closed in any case
	}
	return errors.Join(why, ws.Close())
}

// add makes a connection known; false: the server takes no more.
func (s *Server) add(c *Connection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving.begun {
		return false
	}
	s.conns[c.id] = c
	return true
}

func (s *Server) remove(c *Connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns[c.id] != c {
		return
	}
	delete(s.conns, c.id)
	if c.told {
		s.leaving.told--
	}
}

// deliver queues a frame on a local socket.
func (s *Server) deliver(conn string, f *wire.Frame) bool {
	c, ok := s.Connection(conn)
	return ok && c.sock.Send(f) == nil
}

func (s *Server) closeConn(conn string) bool {
	c, ok := s.Connection(conn)
	if ok {
		c.sock.Close(websocket.CloseNormalClosure, "")
	}
	return ok
}
