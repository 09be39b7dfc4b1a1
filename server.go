package mesh

import (
	"context"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
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
	asking   atomic.Int64 // calls of Authenticate that have not returned
	sockets  *socket.Group
	log      *limit.Log // of all sockets
	hooks    hooks
	handlers handlers

	chosen bool // the app has set Limits.Connections

	mu      sync.RWMutex // guards the fields below
	most    int          // connections at once; negative: no limit
	conns   map[string]*Connection
	open    int // connections and requests that are being decided about: Shutdown waits for them
	taken   int // of open, connections: Limits.Connections is about them
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
		OnAbandoned: func(h socket.Handler, e *socket.End) { (*Connection)(h.(*wireHandler)).abandoned(e) },
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
//     Redis that is none, a client for Sentinels to a Redis that is none; or if
//     Limits.Connections is more than this process has file descriptors for.
//     (Behind Sentinel Start waits while the master is still a replica.)
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
// A request that is refused gets a status: 503 with Retry-After before Start, and
// from Drain or Shutdown on; 400 or 405 if it is no WebSocket handshake; 403 for a
// foreign origin; 503 with Retry-After past a limit, or while 1,024 calls of
// Options.Authenticate have not returned; what Options.Authenticate chose, or 401.
// They are checked in this order, the cheap ones first, and a refused request does
// not count towards Limits.Connections and Limits.UpgradesPerSecond.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if w == nil || r == nil {
		s.log.Error("mesh: ServeHTTP was called without a request or a response")
		return
	}
	defer s.survive(w)
	if err := s.reserve(); err != nil {
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return
	}
	serving, taken := false, false
	defer func() {
		if !serving {
			s.release(taken)
		}
	}()
	ws, metadata := s.upgrade(w, r)
	if ws == nil {
		return
	}
	taken = true
	ctx := context.WithoutCancel(r.Context())
	c, err := s.accept(ctx, ws, metadata, nil)
	if err != nil {
		return // the client has been told
	}
	serving = true
	go func() { // ends with the connection; Drain and Shutdown wait for it
		defer s.release(true)
		_ = c.run(ctx) // how a connection ended is logged where it did
	}()
}

// survive is deferred by ServeHTTP. A panic of the app's ResponseWriter is
// counted and logged, and answered with 500 if that is possible.
func (s *Server) survive(w http.ResponseWriter) {
	value := recover()
	if value == nil {
		return
	}
	if value == http.ErrAbortHandler {
		panic(value) // means something to net/http
	}
	s.n.calls.note("ResponseWriter", value)
	defer func() { _ = recover() }() // w may panic again
	http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
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
