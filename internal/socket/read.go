package socket

import (
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// Errors that the socket answers by itself.
const (
	limitText   = "too many frames"
	internalErr = "internal error"
)

// setControlHandlers makes control frames signs of life and lets the writer answer them.
// By default the reader would answer them, and wait for a slow peer.
func (s *Socket) setControlHandlers() {
	s.conn.SetPongHandler(func(string) error {
		s.control(nil)
		return nil
	})
	s.conn.SetPingHandler(func(data string) error {
		s.control(append(make([]byte, 0, len(data)), data...))
		return nil
	})
	s.conn.SetCloseHandler(func(int, string) error { return nil }) // finish answers it
}

// control handles a control frame. If pong is not nil, it is the payload of the answer.
func (s *Socket) control(pong []byte) {
	now := time.Now()
	if !s.noteFrame(now) || !s.countFrame(now) || pong == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending == nil {
		s.pong = pong
		s.request(duePong)
	}
}

// read reads until reading fails, and returns the error. Once the connection ends, frames
// are discarded until the peer has seen the close frame.
//
// If it is possible to wait for data without the websocket package, this goroutine only
// waits, and another goroutine reads the frames and ends when none is left. A goroutine
// that has read a frame has a stack of twice the size.
func (s *Socket) read() error {
	if s.gate == nil || s.gate.raw == nil {
		return s.readFrames(func() bool { return false })
	}
	var r reading
	for {
		if err := s.gate.await(); err != nil {
			return err
		}
		if r.frames(s); r.err != nil {
			return r.err
		}
	}
}

// reading is the state of reading frames on a goroutine of their own.
type reading struct {
	done     sync.WaitGroup
	err      error // why reading ended; nil: it did not
	panicked any
}

// errReaderExited says that reading panicked, or that its goroutine was ended.
var errReaderExited = fmt.Errorf("%w: reading was ended by a panic or runtime.Goexit", io.ErrClosedPipe)

// frames reads the frames that have come. It passes a panic on to the caller.
func (r *reading) frames(s *Socket) {
	r.err = errReaderExited
	r.done.Go(func() {
		defer func() {
			if value := recover(); value != nil {
				r.panicked = fmt.Sprintf("%v\n\n%s", value, debug.Stack())
			}
		}()
		r.err = s.readFrames(s.gate.idle)
	})
	r.done.Wait()
	if r.panicked != nil {
		panic(r.panicked)
	}
}

// readFrames reads frames until reading fails, and returns the error. It returns nil when
// idle says that nothing is left to read.
func (s *Socket) readFrames(idle func() bool) error {
	for {
		messageType, r, err := s.conn.NextReader()
		if err != nil {
			return err
		}
		data, err := s.readAll(r)
		if err != nil {
			return err
		}
		s.frame(messageType, data)
		if idle() {
			return nil
		}
	}
}

// readAll reads one message. It checks the size again, because the websocket package
// checks it before decompression.
func (s *Socket) readAll(r io.Reader) ([]byte, error) {
	limit := s.cfg.FrameBytes
	if limit <= 0 {
		return io.ReadAll(r)
	}
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(data)) > limit {
		return nil, websocket.ErrReadLimit
	}
	return data, err
}

// noteFrame notes that a frame came. It returns false if the connection ends, so that the
// frame must be ignored.
func (s *Socket) noteFrame(now time.Time) bool {
	if s.closed.Load() {
		return false
	}
	s.seen.Store(int64(s.offset(now)))
	s.handler.Seen(now)
	return true
}

// countFrame counts a frame. If it was one too many, it ends the connection and returns
// false.
func (s *Socket) countFrame(now time.Time) bool {
	if s.frameLimit.Take(now) {
		return true
	}
	s.end(flooded())
	return false
}

// frame handles one message. It waits only for space for a command. A panic affects only
// this frame.
func (s *Socket) frame(messageType int, data []byte) {
	defer s.recovered("frame")
	now := time.Now()
	if !s.noteFrame(now) {
		return
	}
	req, ours := decode(messageType, data)
	switch {
	case !ours && s.handler.TakesForeignMessages():
		s.handler.ForeignMessage((*socketContext)(s), messageType, data)
	case !s.frameLimit.Take(now):
		s.flood(req)
	case !ours, req.Command == wire.CommandPong:
	case req.Command == wire.CommandLatencyResponse:
		s.latencyResponse(now)
	default:
		s.take(req)
	}
}

// flood ends the connection because of a frame that was one too many. If the frame is a
// command, it is answered first.
func (s *Socket) flood(req wire.Request) {
	var it *item
	if req.HasID || req.Command != "" {
		f := s.handler.Refusal(req, limitText, wire.CodeLimit, wire.NameCommandError) // without mu, because it may log
		it = &item{frame: f}
		it.setCharge(0)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(flooded())
	if !req.HasID || s.ending.Cause != CauseFlood {
		return
	}
	s.stats().limited.Add(1)
	s.queue.push(it)
	s.bytes.Add(int64(it.charge))
	s.kickWriter()
}

// decode reads a request. It returns false if the message is not a request.
func decode(messageType int, data []byte) (wire.Request, bool) {
	if messageType != websocket.TextMessage {
		return wire.Request{}, false
	}
	req, err := wire.Decode(data)
	return req, err == nil
}

// take queues a command. It waits until there is space.
func (s *Socket) take(req wire.Request) {
	order := s.handler.Order(&req)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.awaitBytes(cost(&req)) {
		s.enqueue(req, order)
	}
}

// refuse answers a request, and those that it supersedes, with an error. Requests without
// an id get no answer, but the handler is called for them too.
func (s *Socket) refuse(req wire.Request, message, code, name string) {
	for _, id := range req.Also {
		also := wire.Request{ID: id, HasID: true, Command: req.Command}
		_ = s.Answer(s.handler.Refusal(also, message, code, name)) // fails if the connection ends
	}
	if f := s.handler.Refusal(req, message, code, name); req.HasID {
		_ = s.Answer(f)
	}
}
