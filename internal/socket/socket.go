// Package socket reads, queues and writes one WebSocket connection. It knows
// frames, commands and signs of life, and nothing of rooms or presence. Once a
// connection is given to a [Socket], nothing else may touch it.
//
// A socket has one reader, which never waits for a command: the goroutine that
// called [Socket.Run], or, over TCP, one that is there while frames come, for
// which that goroutine waits. A worker for commands, and an answerer for those
// that overlap, exist only while there is something to do, and a writer while
// there is something to write: one of a few that the sockets of a [Group] share,
// or of the socket's own where writing has to wait. All timers sit on a shared
// [clock.Wheel].
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
	DefaultCommandQueue       = 64
	DefaultHandlerConcurrency = 16
)

// grace is how long what was queued before a close may take to be written,
// and then how long the peer has to answer the close frame.
const grace = time.Second

const (
	burstSeconds = 2  // how many seconds' worth of frames may come at once
	floodFactor  = 10 // how many times the rate of commands is a flood
)

// ErrAlreadyRun says that Run was called before.
var ErrAlreadyRun = errors.New("mesh: socket has been run already")

// Handler does what frames ask for. Command and Concurrent answer with
// [Socket.Send]; a panic in either is recovered, logged and answered with
// ESERVER.
type Handler interface {
	// Seen is told of every frame that arrives, control frames included,
	// before anything else is done with it. It is called on the reader's
	// goroutine and must cost no more than an atomic store.
	Seen(at time.Time)
	// Command is called with one request after the other, in the order they
	// arrived. The context ends with the connection, and its cause is the
	// [*End].
	Command(ctx context.Context, req wire.Request)
	// Overlaps tells whether a command only has to be begun before the next one
	// may be. Called on the reader's goroutine.
	Overlaps(command string) bool
	// Begin is called in place of Command, in the same order, for commands for
	// which Overlaps is true. What it returns waits for what has been begun and
	// answers; it is called when those before have been answered, while others
	// are being begun. Commands that do not overlap are called after it. nil:
	// there is no answer.
	Begin(ctx context.Context, req wire.Request) (rest func(ctx context.Context))
	// IsConcurrent tells whether a command may run beside others. Called on
	// the reader's goroutine.
	IsConcurrent(command string) bool
	// Concurrent is called on a goroutine of its own for commands for which
	// IsConcurrent is true, at most Config.HandlerConcurrency at once.
	Concurrent(ctx context.Context, req wire.Request)
	// TakesForeign tells whether Foreign has a use for frames that are not
	// Mesh's. They then do not count towards the limit of frames per second.
	// Otherwise they are ignored. It is always the same for a connection.
	TakesForeign() bool
	// Foreign is handed frames that are not Mesh's if TakesForeign. It
	// is called on the reader's goroutine, in order: while it blocks, nothing
	// is read, and Run does not return. The context ends with the connection,
	// and then it must return. data may be kept.
	Foreign(ctx context.Context, messageType int, data []byte)
}

// Config says how the sockets of a [Group] behave. Wheel is required.
type Config struct {
	// Wheel must run until Run of every socket has returned.
	Wheel *clock.Wheel

	// FrameBytes is the size of the largest message accepted, after
	// decompression; a larger one closes with 1009. Not positive: no limit.
	FrameBytes int64
	// QueueBytes bounds what waits to be written. Past it states of one member
	// coalesce, and if that does not help the connection is closed with 1013.
	// One frame counts at most half of it, so that a large snapshot leaves
	// room for what follows. Commands wait while it is half full; so do not
	// more than this many bytes of commands. Not positive: no limit.
	QueueBytes int
	// WriteTimeout bounds one write. Not positive: no limit.
	WriteTimeout time.Duration

	// PingInterval is the time between pings, counted from Run. Not positive:
	// no pings, and nobody is closed for silence.
	PingInterval time.Duration
	// MaxMissedPongs is for how many further PingIntervals a connection may
	// send nothing after a ping went unanswered for one.
	MaxMissedPongs int
	// LatencyInterval is the time between latency requests. Not positive: none.
	LatencyInterval time.Duration

	// CommandsPerSecond is how many commands are accepted in the long run;
	// twice as many may come at once. More are answered with ELIMIT, and a
	// connection that keeps sending ten times as many frames is closed with
	// 1008. So is one that keeps sending more than 10,000 fragments of messages
	// per second; empty ones count as frames. Not positive: no limit, but that
	// no message may have more than 2,000 empty fragments.
	CommandsPerSecond int
	// CommandQueue is how many commands may wait; more are answered with
	// EBUSY. Defaults to DefaultCommandQueue.
	CommandQueue int
	// HandlerConcurrency is how many calls of Handler.Concurrent may run at
	// once; more are answered with EBUSY. Defaults to
	// DefaultHandlerConcurrency; negative: no limit.
	HandlerConcurrency int

	// Logger is told of each connection, at Debug. Defaults to silence.
	Logger *slog.Logger
	// Log is told of what should not happen. Defaults to one of its own on
	// Logger.
	Log *limit.Log
	// OnAbandoned is called if a connection has ended and Run does not return,
	// because reading, writing or closing its network connection, or one of its
	// commands, hangs. It must not block. Nil: not called.
	OnAbandoned func(h Handler, e *End)
}

// Socket is one WebSocket connection. Its methods are safe for concurrent use
// and, but for Run, never block.
type Socket struct {
	group   *Group
	cfg     *Config // the group's
	conn    *websocket.Conn
	gate    *gate // before the network connection; nil: somebody else upgraded it
	handler Handler
	begun   time.Time // offsets count from here

	// Of the reader alone.
	commandLimit limit.Bucket
	frameLimit   limit.Bucket
	// fragmentLimit and framing are used only if there is a gate.
	fragmentLimit limit.Bucket
	framing       framing

	seen   atomic.Int64 // when a frame last came, as an offset from begun
	closed atomic.Bool  // ending is set
	shelf  uint8        // where stats keeps it: set once
	place  uint32       // guarded by the shelf
	// bytes are charged for what is queued and what is being written. They
	// change with mu held; who only looks needs no lock.
	bytes  atomic.Int64
	behind *Socket // in the line of the flushers: guarded by them

	writer  limit.Crew    // the writer, if there is one
	workers limit.Crew    // the worker, the answerer, concurrent commands, and what closes the connection when the grace is over
	gaveUp  chan struct{} // see givenUp; nil: nothing waits

	// mu guards the fields below. It is never held during I/O, nor while
	// calling the handler.
	mu         sync.Mutex
	parent     context.Context // given to Run
	over       chan struct{}   // closed when ending is set; nil: nobody has asked for it
	afterwards *after          // to be called then
	ending     *End            // why the connection ends; nil: it does not
	queue      queue
	pong       []byte // payload of the control pong that is due

	running   bool
	done      bool // the connection is closed for good: nothing left to cut
	severed   bool // the network connection has been closed, or is being closed
	abandoned bool // see Abandon
	due       due  // what the writer is to send before the queue
	writing   bool
	writingAt time.Duration // when the write under way was begun; 0: none is
	broken    bool          // no more can be written
	closeSent bool
	flushed   bool // something of the queue was written since ending is set, the close frame was not
	hurried   bool // the first grace was over before the close frame was written
	working   bool

	commands     []waiting
	pending      []pending // begun in that order, answered in that order
	commandBytes int       // of both
	owed         int       // room for the answers that are to come
	answering    bool
	beside       int32 // concurrent commands running
	missed       int32 // pongs

	pings      clock.Timer
	pingAt     time.Duration // when the last regular ping that was written was begun; 0: none yet
	tickAt     time.Duration // when pings last fired
	extra      *clock.Timer  // nil until there are extra pings
	extraEvery time.Duration // 0: no extra pings
	latencies  clock.Timer
	latencyAt  time.Duration // when the oldest open latency request was begun to be written; 0: none
	latency    time.Duration // the round trip to be told
	cut        *clock.Timer  // nil until the connection ends
}

// stats counts what happens.
func (s *Socket) stats() *Stats { return &s.group.stats }

// Run reads until the connection ends and returns why, as an [*End]. When it
// returns the connection is closed, no goroutine of the socket is left and no
// timer fires any more; for that it waits for running commands, whose context
// is done. A goroutine that hangs in a network connection of the app's is left
// behind, see Config.OnAbandoned. The end of ctx closes the connection with
// 1001. Run can be called once. A panic while reading is the caller's, after
// the connection has been ended.
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

// serve reads until the connection ends, and ends it. The connection may be the
// app's: its Read may panic, or end this goroutine.
func (s *Socket) serve() {
	e, readable := &End{Cause: CauseBroken, Err: errReaderExited}, false // unless reading returns
	defer func() {
		s.finish(e, readable)
		s.workers.Wait(s.givenUp())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cfg.Wheel.Cancel(s.cut)
	}()
	s.prepare()
	e, readable = s.classify(s.read())
}

// start makes the socket run; false: it did before.
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

// prepare makes the connection ready to be read. No lock is held: it may be the
// app's.
func (s *Socket) prepare() {
	_ = s.conn.SetReadDeadline(time.Time{}) // an error shows at the first read
	s.conn.SetReadLimit(max(s.cfg.FrameBytes, 0))
	s.setControlHandlers()
}

// ended returns why the connection ends; nil: it does not.
func (s *Socket) ended() *End {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ending
}

// QueueBytes returns how many bytes wait to be written or are being written.
// Of a large frame only half of Config.QueueBytes counts.
func (s *Socket) QueueBytes() int {
	s.mu.Lock() // not in the middle of a push, which may count more than stays
	defer s.mu.Unlock()
	return s.queued()
}

// queued is QueueBytes for callers that hold mu.
func (s *Socket) queued() int { return int(s.bytes.Load()) }

// offset returns now as an offset from begun, never 0: that means never.
func (s *Socket) offset(now time.Time) time.Duration {
	return max(now.Sub(s.begun), 1)
}
