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
	codeLimit   = "ELIMIT"
	busyText    = "too many commands are waiting"
	besideText  = "too many commands are running"
	limitText   = "too many commands per second"
	internalErr = "internal error"
)

// setControlHandlers makes control frames signs of life, and has the writer
// answer them: by default the reader would, and wait for a slow peer.
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

// control notes a control frame; pong not nil: it is to be answered with that.
func (s *Socket) control(pong []byte) {
	now := time.Now()
	if !s.live(now) || !s.tolerated(now) || pong == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending == nil {
		s.pong = pong
		s.request(duePong)
	}
}

// read reads until reading fails and returns the error. Once the connection
// ends, frames are thrown away until the peer has seen the close frame.
//
// Where it can be waited for what comes without the websocket package, this
// goroutine does nothing else, and one that is there only while frames are read
// reads them: a goroutine that has ever read a frame has a stack of twice the
// size.
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

// reading is how frames are read on a goroutine of their own.
type reading struct {
	done     sync.WaitGroup
	err      error // why reading ended; nil: it did not
	panicked any
}

// errReaderExited says that reading panicked, or that something ended the
// goroutine that read.
var errReaderExited = fmt.Errorf("%w: reading was ended by a panic or runtime.Goexit", io.ErrClosedPipe)

// frames reads the frames that have come. A panic is one of the caller.
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

// readFrames reads frames until reading fails, and returns the error, or until
// there is nothing left to read, as idle tells.
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

// readAll reads one message. Its size is bounded here once more because the
// websocket package measures before decompression.
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

// live notes that a frame came; false: the connection ends and nobody is
// interested.
func (s *Socket) live(now time.Time) bool {
	if s.closed.Load() {
		return false
	}
	s.seen.Store(int64(s.offset(now)))
	s.handler.Seen(now)
	return true
}

// tolerated counts a frame; false: it was one too many, the connection ends.
func (s *Socket) tolerated(now time.Time) bool {
	if s.frameLimit.Take(now) {
		return true
	}
	s.end(&End{Cause: CauseFlood, Code: websocket.ClosePolicyViolation, Reason: "too many frames"})
	return false
}

// frame does with one message what it asks for, or has it done. It does not
// wait. A panic costs the frame and nothing else.
func (s *Socket) frame(messageType int, data []byte) {
	defer s.recovered("frame")
	now := time.Now()
	if !s.live(now) {
		return
	}
	req, ours := decode(messageType, data)
	if !ours && s.handler.TakesForeign() {
		s.handler.Foreign((*life)(s), messageType, data)
		return
	}
	if !s.tolerated(now) || !ours {
		return
	}
	switch req.Command {
	case wire.CommandPong:
	case wire.CommandLatencyResponse:
		s.latencyResponse(now)
	default:
		s.dispatch(now, req)
	}
}

// decode reads a request; false: the message is none.
func decode(messageType int, data []byte) (wire.Request, bool) {
	if messageType != websocket.TextMessage {
		return wire.Request{}, false
	}
	req, err := wire.Decode(data)
	return req, err == nil
}

// dispatch hands a command on, or refuses it.
func (s *Socket) dispatch(now time.Time, req wire.Request) {
	switch {
	case !s.commandLimit.Take(now):
		s.stats().limited.Add(1)
		s.refuse(req, limitText, codeLimit, wire.NameCommandError)
	case s.handler.IsConcurrent(req.Command):
		if !s.startBeside(req) {
			s.stats().busy.Add(1)
			s.refuse(req, besideText, wire.CodeBusy, wire.NameCommandError)
		}
	case !s.enqueue(req):
		s.stats().busy.Add(1)
		s.refuse(req, busyText, wire.CodeBusy, wire.NameCommandError)
	}
}

// refuse answers a request, if it wants an answer, with an error.
func (s *Socket) refuse(req wire.Request, message, code, name string) {
	if req.HasID {
		_ = s.Send(wire.ErrorAnswer(req.ID, req.Command, message, code, name)) // fails if the connection ends
	}
}
