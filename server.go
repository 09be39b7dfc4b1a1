package mesh

import (
	"context"
	"errors"
	"fmt"
	"net/http"
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
	sockets  socket.Stats
	hooks    hooks
	handlers handlers

	mu      sync.RWMutex // guards the fields below
	closing bool
	conns   map[string]*Connection
	open    int            // connections, those included that are being upgraded
	work    sync.WaitGroup // connections; Add with mu held and closing false
}

// NewServer returns a server on opts.Redis, which stays the app's to close
// after Shutdown. Nothing is asked of Redis before Start. Errors wrap
// ErrInvalidOptions.
func NewServer(opts Options) (*Server, error) {
	n, err := newNode(opts)
	if err != nil {
		return nil, err
	}
	origins, err := compileOrigins(n.opts.AllowedOrigins)
	if err != nil {
		return nil, err
	}
	s := &Server{
		n:     n,
		conns: make(map[string]*Connection),
	}
	s.arrivals.bucket = limit.NewBucket(time.Now(), n.opts.Limits.UpgradesPerSecond, 1)
	s.upgrader = websocket.Upgrader{
		CheckOrigin: origins,
		// The buffers of a handshake are net/http's; those for writing are
		// shared, since most sockets write little.
		WriteBufferPool: &sync.Pool{},
	}
	n.control.sockets, n.control.closer = s.deliver, s.closeConn
	return s, nil
}

// Start makes the server one of those that share the Redis: it returns when
// Redis has answered and the subscriptions are confirmed. Until then, while
// ctx lasts, it keeps trying; after an error it may be called again, and once
// it has succeeded further calls do nothing. Requests before that are answered
// with 503.
//
// ErrIncompatible where the keys under Options.Prefix are of another format,
// ErrUnavailable where Redis did not answer before ctx ended. Where Redis
// refuses the user (a wrong password, a command, key or channel that its ACL
// lacks) that is an ErrUnavailable at once, and the message names what.
func (s *Server) Start(ctx context.Context) error { return s.n.start(ctx) }

// Ready returns nil when the server accepts connections: once Start is through,
// until Shutdown begins, and while its subscriptions stand. It waits for a
// subscription that is being renewed as long as ctx lasts.
func (s *Server) Ready(ctx context.Context) error { return s.n.ready(ctx) }

// Shutdown closes every connection with code 1012 (the stock client comes
// back by itself), lets their entries leave in batches, and stops everything
// that Start started. It is idempotent, and bounded by ctx: what Redis does
// not take until then, the other servers end when the lease runs out. Give it
// a deadline: without one it waits for a Redis that is away.
//
// http.Server.Shutdown knows nothing of WebSockets: it neither closes nor
// awaits them. Call this one first, so that they are gone, then that of the
// http.Server, then close the Redis client.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closing = true
	conns := make([]*Connection, 0, len(s.conns))
	for _, c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.sock.Close(websocket.CloseServiceRestart, "server is restarting")
	}
	gone := make(chan struct{})
	go func() { // ends with the last connection
		s.work.Wait()
		close(gone)
	}()
	if !waitFor(ctx, gone, closingTime(ctx)) {
		for _, c := range conns { // who does not answer the close frame
			_ = c.ws.NetConn().Close()
		}
	}
	var late error
	if !waitFor(ctx, gone, closingTime(ctx)) {
		late = errors.New("mesh: handlers of connections are still running")
	}
	return errors.Join(late, s.n.stop(ctx))
}

// closingTime is how long clients are waited for when the server shuts down:
// less than ctx leaves, so that their leaves still get to Redis.
func closingTime(ctx context.Context) time.Duration {
	const most = 3 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		return min(most, time.Until(deadline)/3)
	}
	return most
}

// waitFor reports whether done was closed within d, and before ctx ended.
func waitFor(ctx context.Context, done <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
	case <-ctx.Done():
	}
	select {
	case <-done:
		return true
	default:
		return false
	}
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

// ServeHTTP upgrades a request to a WebSocket and serves it until it ends.
// What stands against it is answered with a status: 503 before Start, after
// Shutdown, or past a limit (with Retry-After); 403 for a foreign origin; what
// Options.Authenticate chose, or 401; 400 where it is no upgrade.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := s.reserve(); err != nil {
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return
	}
	defer s.release()
	if !websocket.IsWebSocketUpgrade(r) {
		http.Error(w, "a WebSocket upgrade is expected here", http.StatusBadRequest)
		return
	}
	if !s.arrivals.allow() {
		refuseUpgrade(w, http.StatusServiceUnavailable)
		return
	}
	if !s.upgrader.CheckOrigin(r) { // before the hook: a foreign page shall not trigger it
		http.Error(w, http.StatusText(http.StatusForbidden), http.StatusForbidden)
		return
	}
	metadata, err := s.authenticate(r)
	if err != nil {
		status, message := refusalOf(err)
		http.Error(w, message, status)
		return
	}
	ws, err := s.upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // the upgrader has answered
	}
	_ = s.serve(r.Context(), ws, metadata, nil) // how a connection ended is logged where it did
}

// ConnOptions say how ServeConn serves a connection that the app upgraded.
type ConnOptions struct {
	// Metadata becomes the connection's first metadata: any value that encodes
	// to JSON; nil: none.
	Metadata any
	// Foreign gets the frames that are not Mesh's: text that is not a JSON
	// object with a command, and binary messages. messageType is
	// websocket.TextMessage or BinaryMessage. It is called on the connection's
	// reader, in order; while it blocks nothing is read. Defaults to nil: such
	// frames are ignored.
	Foreign func(c *Connection, messageType int, data []byte)
}

// ServeConn serves a WebSocket that the app has upgraded itself, and blocks
// until it ends. It owns ws from then on: nothing else may read, write or
// close it, whatever is returned. The end of ctx closes it with 1001. The
// error says how the connection ended; ErrClosed or ErrNotStarted, ErrLimit,
// ErrInvalidMetadata or ErrTooLarge that it was not served at all.
func (s *Server) ServeConn(ctx context.Context, ws *websocket.Conn, opts ConnOptions) error {
	err := s.reserve()
	if err == nil {
		defer s.release()
		var metadata []byte
		if metadata, err = s.n.encodeMetadata(opts.Metadata); err == nil {
			return s.serve(ctx, ws, metadata, opts.Foreign)
		}
	}
	return errors.Join(err, ws.Close())
}

// reserve counts a connection in, if one more may be.
func (s *Server) reserve() error {
	if err := s.n.usable(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return ErrClosed
	}
	if limit := s.n.opts.Limits.Connections; over(s.open+1, limit) {
		return fmt.Errorf("%w: %d connections", ErrLimit, limit)
	}
	s.open++
	s.work.Add(1)
	return nil
}

func (s *Server) release() {
	s.mu.Lock()
	s.open--
	s.mu.Unlock()
	s.work.Done()
}

// add makes a connection known; false: the server is closing.
func (s *Server) add(c *Connection) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.conns[c.id] = c
	return true
}

func (s *Server) remove(c *Connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c.id)
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
