// Package socket reads, queues and writes one WebSocket connection. It handles frames,
// commands and signs of life, but does not know rooms or presence. Once a connection is
// given to a [Socket], no other code may use it.
//
// A socket has one reader, which never waits for a command to end, but only for space for
// the next command. The reader is the goroutine that called [Socket.Run]. Over TCP that
// goroutine only waits for data, and another goroutine reads the frames and ends when
// none is left. Workers for commands exist only while there are commands, and a writer
// exists only while there is something to write. The sockets of a [Group] share a few
// writers, and a socket has a writer of its own only while a write has to wait. All
// timers use a shared [clock.Wheel].
package socket

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/wire"
)

// Defaults for fields of [Config] that are zero.
const (
	DefaultLinesAtOnce        = 128
	DefaultHandlerConcurrency = 16
)

// closeGrace is the time for writing frames that were queued before a close, and then the
// time for the peer to answer the close frame.
const closeGrace = time.Second

const (
	burstSeconds = 2  // this many seconds' worth of frames may come at once
	floodFactor  = 10 // a flood has this many times the rate of commands
)

// ErrAlreadyRun says that Run was called before.
var ErrAlreadyRun = errors.New("mesh: socket has been run already")

// Handler handles the frames of a connection. Begin and Concurrent answer with
// [Socket.Answer]. A panic in either is recovered, logged and answered with ESERVER.
type Handler interface {
	// Seen is called for every frame that arrives, including control frames, before the
	// frame is handled. It is called on the reader's goroutine and must cost no more than
	// an atomic store.
	Seen(at time.Time)
	// Order returns the order of a command among the others. It is called on the reader's
	// goroutine and must not block.
	Order(req *wire.Request) Order
	// Begin executes a command, or begins it and returns the rest, which waits for it and
	// answers. The context ends with the connection, and its cause is the [*End]. If
	// commands overlap, Begin is called in their order. The Rest of each is called when
	// those before it have been answered, while others are being begun. If last is true,
	// Begun.Again has no effect any more.
	Begin(ctx context.Context, req wire.Request, last bool) Begun
	// Concurrent is called for commands with Order.Beside, at most
	// Config.HandlerConcurrency at once.
	Concurrent(ctx context.Context, req wire.Request)
	// Refusal returns the answer to a request that the socket refuses, or whose handler
	// has panicked. It is also called for requests without an id, which are not answered.
	// It must not block.
	Refusal(req wire.Request, message, code, name string) *wire.Frame
	// TakesForeignMessages reports whether ForeignMessage handles frames that are not of
	// the Mesh protocol. They then do not count for the limit of frames per second.
	// Otherwise they are ignored. The result is always the same for a connection.
	TakesForeignMessages() bool
	// ForeignMessage gets frames that are not of the Mesh protocol, if
	// TakesForeignMessages returns true. It is called on the reader's goroutine, in
	// order. While it blocks, nothing is read, and Run does not return. The context ends
	// with the connection, and then ForeignMessage must return. It may keep data.
	ForeignMessage(ctx context.Context, messageType int, data []byte)
}

// Config configures the sockets of a [Group]. Wheel is required.
type Config struct {
	// Wheel must run until Run of every socket has returned.
	Wheel *clock.Wheel

	// FrameBytes is the size of the largest accepted message, after decompression. A
	// larger one closes the connection with 1009. Not positive: no limit.
	FrameBytes int64
	// QueueBytes limits the bytes that wait to be written. Above the limit, states of one
	// member coalesce. If that does not help, the connection is closed with 1013. One
	// frame counts at most half of the limit, so that a large snapshot leaves space for
	// later frames. All answers to commands together also count at most half, so they
	// never close the connection. Commands wait while the queue is half full. If it is
	// full of frames other than answers, a few of the protocol's own commands are still
	// executed.
	//
	// The same limit holds for the bytes of commands. These are waiting commands, and the
	// protocol's own commands until they are done. Each counts its whole frame and 256
	// bytes more. Above the limit nothing is read until there is space. For that time the
	// peer counts as alive. If it takes longer than two minutes, the connection is closed
	// with 1013. Not positive: no limit.
	QueueBytes int
	// WriteTimeout limits the time of one write. Not positive: no limit.
	WriteTimeout time.Duration

	// PingInterval is the time between pings, counted from Run. Not positive: no pings,
	// and silence closes no connection.
	PingInterval time.Duration
	// MaxMissedPongs is the number of further PingIntervals for which a connection may
	// send nothing, after a ping was not answered for one interval.
	MaxMissedPongs int
	// LatencyInterval is the time between latency requests. Not positive: none.
	LatencyInterval time.Duration

	// CommandsPerSecond limits the rate of commands. Twice as many may come at once.
	// Further commands wait. A connection that keeps sending ten times as many frames is
	// closed with 1008, and a command that is one too many is answered with ELIMIT.
	// Frames count when they are read. A connection that keeps sending more than 10,000
	// fragments of messages per second is closed too. Empty fragments count as frames.
	// Not positive: no limit, except that no message may have more than 2,000 empty
	// fragments.
	CommandsPerSecond int
	// LinesAtOnce limits the lines (see Order) of one connection that are worked on at
	// once. Others wait. Of the commands without a line, 16 are executed at once.
	// Defaults to DefaultLinesAtOnce. If all sockets together have very many, only 4 of
	// each go on at once.
	LinesAtOnce int
	// HandlerConcurrency limits the calls of Handler.Concurrent that run at once. More
	// wait. Defaults to DefaultHandlerConcurrency. Negative: no limit.
	HandlerConcurrency int

	// Logger logs each connection, at Debug. Defaults to no logging.
	Logger *slog.Logger
	// Log logs unexpected events. Defaults to one of its own on Logger.
	Log *limit.Log
	// OnAbandoned is called if a connection has ended and Run does not return, because
	// reading, writing or closing its network connection, or one of its commands, hangs.
	// It must not block. May be nil.
	OnAbandoned func(h Handler, e *End)
}

// Socket is one WebSocket connection. Its methods are safe for concurrent use. Except for
// Run they never block.
type Socket struct {
	group   *Group
	cfg     *Config // the group's
	conn    *websocket.Conn
	gate    *gate // before the network connection; nil: the connection was upgraded elsewhere
	handler Handler
	begun   time.Time // offsets count from here

	// Only the reader uses these.
	frameLimit limit.Bucket
	// fragmentLimit and framing are used only if there is a gate.
	fragmentLimit limit.Bucket
	framing       framing

	seen atomic.Int64 // time of the last frame, as an offset from begun
	// stoppedAt is the time since which the reader waits for space; 0: it does not wait.
	stoppedAt  atomic.Int64
	closed     atomic.Bool // ending is set
	shard      uint8       // its shard in stats, set once
	shardIndex uint32      // guarded by the shard
	// bytes is the charge of the frames that are queued or being written. It changes only
	// with mu held. Reading it needs no lock.
	bytes  atomic.Int64
	behind *Socket // next in the queue of the flushers, guarded by them

	writer    limit.Group   // the writer, if there is one
	workers   limit.Group   // workers of commands, and the goroutine that closes the connection after the grace
	abandonCh chan struct{} // see abandonedCh; nil: not needed yet

	// mu guards the fields below. It is never held during I/O or while calling the
	// handler.
	mu         sync.Mutex
	parent     context.Context // given to Run
	endCh      chan struct{}   // closed when ending is set; nil: not needed yet
	afterwards *after          // to be called then
	ending     *End            // why the connection ends; nil: it does not
	queue      queue
	pauses     *pauses // nil: there are none
	pong       []byte  // payload of the control pong to send

	running   bool
	done      bool         // the connection is closed for good: nothing is left to cut
	netClosed bool         // the network connection has been closed, or is being closed
	abandoned bool         // see Abandon
	due       writeRequest // frames to write before the queue
	writing   bool
	writingAt time.Duration // start of the current write; 0: none
	broken    bool          // no more can be written
	closeSent bool
	flushed   bool // a frame of the queue was written since ending is set, but the close frame was not
	graceOver bool // the first grace was over before the close frame was written
	answers   int  // the part of bytes that are answers

	commandLimit limit.Bucket
	commands     *schedule // nil: there are none
	missed       int32     // pongs

	pings      clock.Timer
	pingAt     time.Duration // start of the last regular ping that was written; 0: none yet
	tickAt     time.Duration // time of the last onPing
	extra      *clock.Timer  // nil until there are extra pings
	extraEvery time.Duration // 0: no extra pings
	latencies  clock.Timer
	latencyAt  time.Duration // start of writing the oldest open latency request; 0: none
	latency    time.Duration // the round trip to send
	cut        *clock.Timer  // nil until the connection ends
}

// stats returns the counters of the group.
func (s *Socket) stats() *Stats { return &s.group.stats }

// Run reads until the connection ends and returns the reason, as an [*End]. When it
// returns, the connection is closed, no goroutine of the socket is left and no timer
// fires any more. For that it waits for running commands, whose context has ended. If a
// goroutine hangs in a network connection of the app's own, Run leaves it behind, see
// Config.OnAbandoned. The end of ctx closes the connection with 1001. Run can be called
// once. If reading panics, Run ends the connection and then panics too.
func (s *Socket) Run(ctx context.Context) error {
	if !s.start(ctx) {
		return ErrAlreadyRun
	}
	if ctx.Done() != nil {
		defer s.endWith(ctx)()
	}
	s.serve()
	end := s.ended()
	s.cfg.Logger.Debug("mesh: connection ended", "cause", end.Cause.String(), "code", end.Code, "error", end.Err)
	return end
}

// endWith ends the connection at the end of ctx, until stop is called.
func (s *Socket) endWith(ctx context.Context) (stop func()) {
	stopped := make(chan struct{})
	forget := context.AfterFunc(ctx, func() {
		defer close(stopped)
		s.end(&End{Cause: CauseShutdown, Code: websocket.CloseGoingAway, Reason: "server is going away", Err: context.Cause(ctx)})
	})
	return func() {
		if !forget() {
			<-stopped
		}
	}
}

// serve reads until the connection ends, and ends it. The connection may be the app's, so
// its Read may panic or end this goroutine.
func (s *Socket) serve() {
	e, readable := &End{Cause: CauseBroken, Err: errReaderExited}, false // if reading does not return
	defer func() {
		s.finish(e, readable)
		s.workers.Wait(s.abandonedCh())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cfg.Wheel.Cancel(s.cut)
	}()
	s.prepare()
	e, readable = s.classify(s.read())
}

// start makes the socket run. It returns false if it ran before.
func (s *Socket) start(ctx context.Context) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running {
		return false
	}
	s.running = true
	s.parent = ctx
	s.begun = time.Now()
	if s.gate != nil {
		s.gate.sock = s
	}
	if s.ending != nil {
		s.armCut()
	} else {
		s.armTimers()
	}
	s.kickWriter()
	s.stats().enter(s)
	return true
}

// prepare makes the connection ready to be read. It holds no lock, because the connection
// may be the app's.
func (s *Socket) prepare() {
	_ = s.conn.SetReadDeadline(time.Time{}) // an error shows at the first read
	s.conn.SetReadLimit(max(s.cfg.FrameBytes, 0))
	s.setControlHandlers()
}

// ended returns why the connection ends, or nil if it does not.
func (s *Socket) ended() *End {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ending
}

// QueueBytes returns the bytes that wait to be written or are being written. A large
// frame counts only half of Config.QueueBytes.
func (s *Socket) QueueBytes() int {
	s.mu.Lock() // not in the middle of a push, which may count more than remains
	defer s.mu.Unlock()
	return s.queued()
}

// queued is QueueBytes for callers that hold mu.
func (s *Socket) queued() int { return int(s.bytes.Load()) }

// offset returns now as an offset from begun. It is never 0, which means never.
func (s *Socket) offset(now time.Time) time.Duration {
	return max(now.Sub(s.begun), 1)
}
