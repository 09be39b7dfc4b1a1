package socket

import (
	"log/slog"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/limit"
)

// Group is the sockets of one server, and what they share.
type Group struct {
	cfg      Config
	stats    Stats
	flushers flushers
}

// NewGroup returns a group of sockets that behave as cfg says.
func NewGroup(cfg Config) *Group {
	if cfg.CommandQueue == 0 {
		cfg.CommandQueue = DefaultCommandQueue
	}
	if cfg.HandlerConcurrency == 0 {
		cfg.HandlerConcurrency = DefaultHandlerConcurrency
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Log == nil {
		cfg.Log = limit.NewLog(cfg.Logger)
	}
	return &Group{cfg: cfg}
}

// Wait returns when no goroutine of the group is left. It is to be called when
// Run of every socket has returned, and not before.
func (g *Group) Wait() { g.flushers.running.Wait() }

// Counts returns what has been counted of all sockets of the group.
func (g *Group) Counts() Counts { return g.stats.Counts() }

// New returns a socket for conn, a connection on the server's side, which the
// socket takes over: its handlers, limits and deadlines are set anew. Nothing is
// read or written before Run; frames sent earlier are queued, so that they come
// first.
func (g *Group) New(conn *websocket.Conn, handler Handler) *Socket {
	now := time.Now()
	fragments := fragmentsPerSecond
	if g.cfg.CommandsPerSecond <= 0 {
		fragments = 0 // no limit
	}
	s := &Socket{
		group:        g,
		cfg:          &g.cfg,
		conn:         conn,
		handler:      handler,
		begun:        now,
		commandLimit: limit.NewBucket(now, g.cfg.CommandsPerSecond, burstSeconds),
		frameLimit:   limit.NewBucket(now, floodFactor*g.cfg.CommandsPerSecond, burstSeconds),

		fragmentLimit: limit.NewBucket(now, fragments, burstSeconds),
	}
	if conn != nil {
		s.gate, _ = conn.NetConn().(*gate)
	}
	return s
}
