package mesh

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/admission"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/origin"
	"github.com/meshpresence/mesh/internal/redisclient"
	"github.com/meshpresence/mesh/internal/socket"
	"github.com/meshpresence/mesh/internal/wire"
)

// Server speaks the Mesh wire protocol over WebSockets and keeps presence. It is an
// http.Handler. Mount it where clients connect:
//
//	srv, err := mesh.NewServer(mesh.Options{Redis: client})
//	…
//	err = srv.TrackPresence(mesh.Exact("lobby"), mesh.PresenceOptions{})
//	err = srv.Start(ctx)
//	http.Handle("/ws", srv)
//
// Hooks, commands and rules may be added before and after Start. All methods are safe
// for concurrent use.
type Server struct {
	n        *core
	upgrader websocket.Upgrader
	gate     *admission.Gate
	refused  refusedUpgrades
	asking   atomic.Int64 // calls of Authenticate that have not returned
	sockets  *socket.Group
	log      *limit.Log // for all sockets
	hooks    hooks
	handlers handlers
	failed   failedCommands
	stale    staleWatch

	mu      sync.RWMutex // guards the fields below
	conns   map[string]*Connection
	leaving drainState

	quit     chan struct{} // closed when Shutdown begins
	quitOnce sync.Once
}

// drainState is the state of a drain.
type drainState struct {
	begun   bool      // no more connections are accepted
	order   []string  // ids of the sockets to close, last first; some may have ended
	closing int       // number of conns that have been told to close
	last    time.Time // time of the last turn
}

// NewServer returns a server that uses opts.Redis. The app closes that client after
// Shutdown. NewServer makes no call to Redis. Errors wrap [ErrInvalidOptions].
func NewServer(opts Options) (*Server, error) {
	chosen := opts.Limits.Connections > 0 // before the default is filled in
	s := &Server{conns: make(map[string]*Connection), quit: make(chan struct{})}
	n, err := newCore(opts, sockets{
		deliver: s.deliver, close: s.closeConn, replaced: s.closeReplaced, checkFiles: s.checkFiles, away: s.stale.look,
	})
	if err != nil {
		return nil, err
	}
	origins, err := origin.Compile(n.opts.AllowedOrigins)
	if err != nil {
		return nil, err
	}
	s.n, s.log, s.stale.s = n, limit.NewLog(n.opts.Logger), s
	s.gate = admission.New(admission.Config{
		Max: n.opts.Limits.Connections, Chosen: chosen, PerSecond: n.opts.Limits.UpgradesPerSecond, Logger: n.opts.Logger,
	})
	s.sockets = socket.NewGroup(s.socketConfig())
	s.upgrader = websocket.Upgrader{
		CheckOrigin:      origins,
		HandshakeTimeout: n.opts.WriteTimeout,
		WriteBufferPool:  &sync.Pool{},                                            // a socket's writer needs none
		Error:            func(http.ResponseWriter, *http.Request, int, error) {}, // upgrade writes the answer
	}
	return s, nil
}

// socketConfig returns the settings of the sockets.
func (s *Server) socketConfig() socket.Config {
	o := &s.n.opts
	return socket.Config{
		Wheel: s.n.wheel, FrameBytes: o.Limits.FrameBytes, QueueBytes: o.Limits.QueueBytes, WriteTimeout: o.WriteTimeout,
		PingInterval: o.PingInterval, MaxMissedPongs: o.missedPongs(), LatencyInterval: o.LatencyInterval,
		CommandsPerSecond: o.Limits.CommandsPerSecond, LinesAtOnce: o.linesAtOnce(), HandlerConcurrency: o.HandlerConcurrency,
		Logger: o.Logger, Log: s.log,
		OnAbandoned: func(h socket.Handler, e *socket.End) { (*Connection)(h.(*wireHandler)).abandoned(e) },
	}
}

// mostLines limits the rooms of one connection whose commands run at once.
const mostLines = 1024

// linesAtOnce returns the number of rooms of one connection whose commands run at once:
// all rooms that it may be in or subscribed to. So a hanging guard delays no other
// room.
func (o Options) linesAtOnce() int {
	rooms, subs := o.Limits.RoomsPerConnection, o.Limits.SubscriptionsPerConnection
	if rooms < 0 || subs < 0 {
		return mostLines
	}
	return min(rooms+subs, mostLines)
}

// TrackPresence adds a rule: the rooms that match pattern have presence. It may be
// called at any time and takes effect at once. Entries in matching rooms that are in
// use get the rule's TTL and StateInterval, and guards are asked again about
// subscriptions to these rooms. Other rooms are not affected.
//
// The guards of all matching rules must allow. The TTL and the StateInterval come from
// the rule with the exact name, otherwise from the first pattern that was given. A rule
// with the same name or the same expression replaces the earlier one.
// [Server.UntrackPresence] removes a rule.
//
// The cost of adding a name does not depend on the number of rules. Each takes about
// 100 bytes. For rooms whose names follow a scheme, prefer one Regexp with a guard that
// looks at the name: then no rule has to be added and removed as rooms come and go.
// Each Regexp is tried on every new room name, and adding one looks at all rooms in
// use. A few dozen are fine.
//
// An invalid rule is an error that wraps [ErrInvalidPattern] or [ErrInvalidOptions] and
// changes nothing. Safe for concurrent use. Rules apply to this server alone: give all
// servers the same.
//
// The TypeScript server's trackPresence.
func (s *Server) TrackPresence(pattern Pattern, opts PresenceOptions) error {
	return s.n.trackPresence(pattern, opts)
}

// UntrackPresence removes the rule that was given to [Server.TrackPresence] with the
// same name or the same expression. It takes effect at once in the rooms of the rule.
// It returns false if there is no such rule. Nothing has changed then.
//
// If another rule still matches a room, that rule decides about it from now on.
// Otherwise the room is not tracked any more:
//
//   - Its subscriptions end: those of clients with the push mesh/presence-ended, those
//     of the app with [ErrNotTracked].
//   - Its members stay in, without a TTL and without events. A join that waits for the
//     rule's JoinGuard takes place when the guard has answered, regardless of the
//     answer, or after Options.HookTimeout.
//   - The states of its members stay until they expire or the member leaves, and only
//     the app can read them. No state can be published.
//   - Any client may join it, gets its members in the answer, and may read its
//     metadata. To close a room, give it a Guard and a JoinGuard that refuse.
//
// Safe for concurrent use. Rules apply to this server alone.
func (s *Server) UntrackPresence(pattern Pattern) bool { return s.n.untrackPresence(pattern) }

// Start makes the server a member of the group that shares the Redis. It returns when
// Redis has answered and the subscriptions are confirmed, and retries until then or
// until ctx ends. After an error it may be called again. After a success further calls
// do nothing. Requests before that are answered with 503.
//
// It returns [ErrUnavailable] if Redis did not answer before ctx ended. If a retry
// cannot help, it fails at once, and the message says what to do:
//   - [ErrUnavailable] if Redis rejects the user (a wrong password, or an ACL without a
//     needed command, key or channel), or lacks a command.
//   - [ErrInvalidOptions] if Options.Redis is of the wrong kind: a *redis.Client for a
//     Cluster or a replica, a *redis.ClusterClient for a Redis that is no Cluster, or a
//     Sentinel client for a Redis that is no Sentinel. Also if Limits.Connections is
//     higher than the file descriptors of this process allow. (Behind Sentinel, Start
//     waits while the master is still a replica.)
//   - [ErrIncompatible] if the keys under Options.Prefix have another format, or were
//     written with another kind of client or another number of Options.Buckets.
func (s *Server) Start(ctx context.Context) error { return s.n.start(ctx) }

// Ready returns nil while the server accepts connections: from the end of Start
// ([ErrNotStarted] before) until Drain or Shutdown is called ([ErrClosed] from then
// on). It is for readiness probes. It answers from memory at once, also if ctx has
// ended.
//
// It stays nil while Redis is unavailable. Sockets are served then, too, and otherwise
// all servers of a group would fail at once, and clients could not connect to any.
func (s *Server) Ready(ctx context.Context) error { return s.n.ready(ctx) }

// ReadyHandler returns a handler for a readiness probe. It answers 200 while Ready
// returns nil, and otherwise 503 with the error as text. It makes no call to Redis.
// Mount it apart from the socket, for example at /readyz.
func (s *Server) ReadyHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		if err := s.Ready(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n") // fails only if the probe has gone
	})
}

// Presence returns the presence manager of this server.
func (s *Server) Presence() *PresenceManager { return &PresenceManager{n: s.n, ofServer: true} }

// Connections returns the manager of the connections on all servers.
func (s *Server) Connections() *ConnectionManager { return &ConnectionManager{n: s.n} }

// Rooms returns the manager of the rooms on all servers.
func (s *Server) Rooms() *RoomManager { return &RoomManager{n: s.n} }

// Connection returns the open connection with that id, if it is on this server.
func (s *Server) Connection(id string) (*Connection, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	c, ok := s.conns[id]
	return c, ok
}

// enter counts a request, or a connection that the app upgraded, as open. It returns an
// error if the server accepts no more. After nil, gate.Leave must follow.
func (s *Server) enter() error {
	if err := s.n.checkRunning(); err != nil {
		return err
	}
	if !s.gate.Enter() {
		return ErrClosed
	}
	return nil
}

// add registers a connection. It returns false if the server accepts no more.
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
	if c.closing {
		s.leaving.closing--
	}
}

// deliver queues a frame on a socket of this server.
func (s *Server) deliver(conn string, f *wire.Frame) bool {
	c, ok := s.Connection(conn)
	return ok && c.sock.Send(f) == nil
}

// closeConn closes the socket of a connection with code 1000. app says that the connection
// leaves at once, because the app closes it for good.
func (s *Server) closeConn(conn string, app bool) bool {
	c, ok := s.Connection(conn)
	switch {
	case !ok:
	case app:
		c.sock.CloseByApp(websocket.CloseNormalClosure, "")
	default:
		c.sock.Close(websocket.CloseNormalClosure, "")
	}
	return ok
}

// replacedReason is the reason of the close frame for a connection that was replaced.
const replacedReason = "another connection took its place"

// closeReplaced closes the socket of a connection whose place another one has taken.
func (s *Server) closeReplaced(conn string) {
	if c, ok := s.Connection(conn); ok {
		c.sock.Close(websocket.CloseGoingAway, replacedReason)
	}
}

// checkFiles lowers the number of connections to what file descriptors allow.
func (s *Server) checkFiles(ctx context.Context) error {
	openFiles := limit.OpenFiles
	if s.n.opts.files != nil {
		openFiles = s.n.opts.files
	}
	files, known := openFiles()
	if !known {
		return nil
	}
	nodes, err := s.n.store.Nodes(ctx)
	if err != nil {
		return err
	}
	return s.gate.Fit(files, nodes*redisclient.Connections(s.n.opts.Redis))
}

// Servers returns the live servers of the group and the dead ones whose entries are
// still being ended, at most 1,000 of each. Live servers come first. Both are sorted by
// the end of their lease, by Redis's clock. A server that was shut down is neither live
// nor dead.
//
// It reads from masters, writes nothing, and takes at most two seconds. It returns
// ErrUnavailable if Redis does not answer. Safe for concurrent use.
func (s *Server) Servers(ctx context.Context) ([]ServerInfo, error) { return s.n.servers(ctx) }

// failedCodes are the codes by which failed commands are counted. Other codes count as
// the last one.
var failedCodes = [...]string{
	wire.CodeInvalid, wire.CodeTooLarge, wire.CodeLimit, wire.CodeNotFound, wire.CodeRefused,
	wire.CodeBusy, wire.CodeUnavailable, wire.CodeConflict, wire.CodeTimeout, wire.CodeClosed, wire.CodeServer, codeOther,
}

// codeOther stands for codes of the app.
const codeOther = "other"

// failedCommands counts failed commands for which answersFalse is true.
type failedCommands [len(failedCodes)]atomic.Uint64

func (f *failedCommands) add(code string) { addTo(f[:], failedCodes[:], code, codeOther) }

// counts returns the numbers by code.
func (f *failedCommands) counts() map[string]uint64 { return countsOf(f[:], failedCodes[:]) }

// refusedStatuses are the keys of Stats.RefusedUpgrades. The last two stand for all
// other statuses that the app can choose.
var refusedStatuses = [...]string{"400", "401", "403", "404", "405", "429", "499", "500", "503", "505", "4xx", "5xx"}

// refusedUpgrades counts refused requests by status. Safe for concurrent use.
type refusedUpgrades [len(refusedStatuses)]atomic.Uint64

func (c *refusedUpgrades) count(status int) {
	other := "5xx"
	if status < http.StatusInternalServerError {
		other = "4xx"
	}
	addTo(c[:], refusedStatuses[:], strconv.Itoa(status), other)
}

func (c *refusedUpgrades) counts() map[string]uint64 { return countsOf(c[:], refusedStatuses[:]) }

// addTo counts one event under its key. A key that is not in keys counts as other,
// which must be in keys. Safe for concurrent use.
func addTo(counters []atomic.Uint64, keys []string, key, other string) {
	at := slices.Index(keys, key)
	if at < 0 {
		at = slices.Index(keys, other)
	}
	counters[at].Add(1)
}

// countsOf returns the counters by key, including zeros.
func countsOf(counters []atomic.Uint64, keys []string) map[string]uint64 {
	counts := make(map[string]uint64, len(keys))
	for i, key := range keys {
		counts[key] = counters[i].Load()
	}
	return counts
}
