package socket

import (
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/limit"
)

// Group holds the sockets of one server and their shared parts.
type Group struct {
	cfg        Config
	stats      Stats
	flushers   flushers
	pauses     pauseLine
	schedules  sync.Pool // unused schedules; the timer of one may still belong to the wheel
	lines      atomic.Int64
	extraLines int64 // see maxExtraLines
}

// NewGroup returns a group of sockets with the given configuration.
func NewGroup(cfg Config) *Group {
	if cfg.LinesAtOnce == 0 {
		cfg.LinesAtOnce = DefaultLinesAtOnce
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
	return &Group{cfg: cfg, pauses: pauseLine{lasts: updatePause}, extraLines: maxExtraLines}
}

// Wait returns when no goroutine of the group is left. Call it only when Run of every
// socket has returned.
func (g *Group) Wait() {
	g.flushers.running.Wait()
	g.pauses.running.Wait()
}

// Counts returns the counters of all sockets of the group.
func (g *Group) Counts() Counts { return g.stats.Counts() }

// New returns a socket for conn, the server's end of a connection. The socket takes conn
// over and sets its handlers, limits and deadlines. Nothing is read or written before
// Run. Frames sent before Run are queued, so that they come first.
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
