package socket

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
	"unicode/utf8"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/clock"
)

// maxReason is how many bytes of a reason fit into a close frame.
const maxReason = 123

// ErrClosed says that the connection has ended or is about to: what is sent
// now reaches nobody. The error that Send returns then wraps it and the
// [*End].
var ErrClosed = errors.New("mesh: connection is closed")

// Cause says why a connection ended.
type Cause uint8

// The causes.
const (
	CausePeer     Cause = iota // the peer sent a close frame
	CauseBroken                // the network failed, or the peer went without a close frame
	CauseClosed                // Close was called
	CauseShutdown              // the context of Run ended
	CauseSilent                // no frame came for too long (1011)
	CauseSlow                  // too much waited to be written (1013)
	CauseStuck                 // a write took longer than WriteTimeout
	CauseFlood                 // it sent far more frames than it may (1008)
	CauseTooLarge              // a message was larger than FrameBytes (1009)
	CauseProtocol              // what it sent was no WebSocket frame (1002)
	causes        = iota
)

var causeNames = [causes]string{
	"peer", "broken", "closed", "shutdown", "silent", "slow", "stuck", "flood", "too_large", "protocol",
}

// String returns the cause in one word.
func (c Cause) String() string {
	if int(c) < len(causeNames) {
		return causeNames[c]
	}
	return fmt.Sprintf("cause %d", uint8(c))
}

// End says why a connection ended. It wraps ErrClosed and Err.
type End struct {
	Cause  Cause
	Code   int    // of the close frame, sent or (CausePeer) received; 0: none
	Reason string // as given with Code
	Err    error  // of the network or the context; nil: none
}

// Error says why the connection ended.
func (e *End) Error() string {
	text := fmt.Sprintf("%v (%v)", ErrClosed, e.Cause)
	if e.Code != 0 {
		text += fmt.Sprintf(": %d %q", e.Code, e.Reason)
	}
	if e.Err != nil {
		text += ": " + e.Err.Error()
	}
	return text
}

// Unwrap returns ErrClosed and Err.
func (e *End) Unwrap() []error {
	if e.Err == nil {
		return []error{ErrClosed}
	}
	return []error{ErrClosed, e.Err}
}

// flushes tells whether what was queued before the end is still to be written.
func (e *End) flushes() bool { return e.Cause == CauseClosed || e.Cause == CauseShutdown }

// lingers tells whether the peer may still be sending although reading has
// ended: to close at once would reset the connection, and the peer would never
// see the close frame.
func (e *End) lingers() bool { return e.Cause == CauseTooLarge || e.Cause == CauseProtocol }

// Close ends the connection: frames sent before have a second to be written,
// then a close frame with code and reason is, and the peer has another second
// to answer it. What is not written after the first second is dropped; a peer
// that has read nothing in it is cut off. Only the first end counts, whoever
// asked for it. Code 0 is 1000; reasons are cut at 123 bytes. Close does not
// wait; Run returns when the end has come.
func (s *Socket) Close(code int, reason string) {
	if code == 0 {
		code = websocket.CloseNormalClosure
	}
	s.end(&End{Cause: CauseClosed, Code: code, Reason: truncate(reason, maxReason)})
}

// truncate cuts text to at most n bytes, not within a character.
func truncate(text string, n int) string {
	if len(text) <= n {
		return text
	}
	for n > 0 && !utf8.RuneStart(text[n]) {
		n--
	}
	return text[:n]
}

// end begins the end of the connection, unless it has begun already.
func (s *Socket) end(e *End) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(e)
}

// endLocked is end for callers that hold mu.
func (s *Socket) endLocked(e *End) {
	if s.ending != nil {
		return
	}
	s.ending = e
	s.closed.Store(true)
	s.stats().closes[e.Cause].Add(1)
	if !e.flushes() {
		s.dropQueue()
	}
	if e.Code == 0 {
		s.broken = true // no close frame: nobody would see it
	}
	s.due, s.pong = 0, nil
	s.commands, s.commandBytes = nil, 0
	for _, t := range []*clock.Timer{&s.pings, s.extra, &s.latencies} {
		if t != nil {
			s.cfg.Wheel.Cancel(t)
		}
	}
	if !s.running {
		return // start does the rest
	}
	(*life)(s).end()
	s.armCut()
	s.kickWriter()
}

// hangs is how long commands may go on after the connection was closed before
// it is abandoned. Their contexts have ended, and Redis answers within two
// seconds or not at all.
const hangs = 10 * time.Second

// armCut has the network connection closed after the grace. The caller holds
// mu.
func (s *Socket) armCut() { s.armEnd(grace) }

// armEnd has onCut called after d. The caller holds mu.
func (s *Socket) armEnd(d time.Duration) {
	if s.cut == nil {
		s.cut = new(clock.Timer)
	}
	s.cfg.Wheel.Schedule(s.cut, d, s.onCut)
}

// Cut closes the network connection without a close frame, and does not wait.
func (s *Socket) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return
	}
	s.severed = true
	s.workers.Go(s.sever)
	if s.ending != nil && s.running {
		s.armCut()
	}
}

// onCut closes the network connection of one that did not end in time: what is
// stuck in a read or a write returns then. Closing may block, which the wheel
// must not. Where the peer reads and the queue was too long for the time, or
// this process too busy to write it, the close frame is still to come: without
// it the peer would take the end for a broken network.
//
// If that does not help, the socket is abandoned: a call of the app's network
// connection, or a command, hangs.
func (s *Socket) onCut() {
	if s.cutNow() {
		s.Abandon()
	}
}

// Abandon has Run, if it waits for a goroutine that hangs, wait no longer. It
// does nothing to a socket that has not begun to end.
func (s *Socket) Abandon() {
	s.mu.Lock()
	e := s.ending
	first := e != nil && s.running && !s.abandoned
	if first {
		s.abandoned = true
		close(s.untilGivenUp())
	}
	s.mu.Unlock()
	if first && s.cfg.OnAbandoned != nil {
		s.cfg.OnAbandoned(s.handler, e)
	}
}

// cutNow closes the network connection, or has the rest written first; true:
// that has been tried.
func (s *Socket) cutNow() (tried bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.done || s.severed:
		return true
	case s.flushed && !s.hurried:
		s.hurried = true
		s.dropQueue()
	default:
		s.severed = true
		s.workers.Go(s.sever)
	}
	s.armCut()
	return false
}

// givenUp returns a channel that is closed when the socket is abandoned.
func (s *Socket) givenUp() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.untilGivenUp()
}

// untilGivenUp is givenUp for callers that hold mu.
func (s *Socket) untilGivenUp() chan struct{} {
	if s.gaveUp == nil {
		s.gaveUp = make(chan struct{})
	}
	return s.gaveUp
}

// sever closes the network connection without a close frame.
func (s *Socket) sever() {
	defer s.recovered("connection")
	conn := s.netConn()
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn() // its own Close may wait 5 s to send an alert
	}
	_ = conn.Close() // nothing to be done about it
}

// finish ends the connection after reading has ended because of e, and waits
// for the writer.
func (s *Socket) finish(e *End, readable bool) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.done = true
		s.armEnd(hangs)
		s.stats().exit(s)
	}()
	defer s.recovered("connection")
	s.end(e)
	if !readable {
		s.giveUpWriting()
		s.sever()
	}
	s.writer.Wait(s.givenUp())
	if readable && s.ended().lingers() {
		_, _ = io.Copy(io.Discard, s.conn.NetConn()) // until the peer closes or the grace is over
	}
	_ = s.conn.Close() // over already, or nothing to be done about it
}

// classify says what an error of reading means, and whether the peer may still
// be there to read a close frame.
func (s *Socket) classify(err error) (e *End, readable bool) {
	var closed *websocket.CloseError
	var network net.Error
	switch {
	case errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure:
		return &End{Cause: CausePeer, Code: closed.Code, Reason: closed.Text}, true
	case errors.Is(err, websocket.ErrReadLimit):
		return &End{Cause: CauseTooLarge, Code: websocket.CloseMessageTooBig, Reason: "message too large"}, true
	case closed != nil, errors.As(err, &network),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.ErrClosedPipe),
		errors.Is(err, net.ErrClosed), errors.Is(err, os.ErrDeadlineExceeded):
		return &End{Cause: CauseBroken, Err: err}, false
	default:
		return &End{Cause: CauseProtocol, Code: websocket.CloseProtocolError, Reason: "protocol error", Err: err}, true
	}
}

// closeMessage returns the payload of the close frame that e calls for.
func (e *End) closeMessage() []byte {
	if e.Cause == CausePeer {
		return websocket.FormatCloseMessage(e.Code, "")
	}
	return websocket.FormatCloseMessage(e.Code, e.Reason)
}
