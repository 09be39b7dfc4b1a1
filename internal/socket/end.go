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
	"github.com/meshpresence/mesh/internal/wire"
)

// ErrClosed says that the connection has ended or is about to end, so that nothing more
// can be sent. The error of Send then wraps it and the [*End].
var ErrClosed = errors.New("mesh: connection is closed")

// Cause says why a connection ended.
type Cause uint8

// The causes.
const (
	CausePeer     Cause = iota // the peer sent a close frame
	CauseBroken                // the network failed, or the peer disconnected without a close frame
	CauseClosed                // Close was called
	CauseShutdown              // the context of Run ended
	CauseSilent                // no frame came for too long (1011)
	CauseSlow                  // too much waited to be written (1013)
	CauseStuck                 // a write took longer than WriteTimeout
	CauseFlood                 // it sent far more frames than allowed (1008)
	CauseTooLarge              // a message was larger than FrameBytes (1009)
	CauseProtocol              // it sent an invalid WebSocket frame (1002)
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
	Reason string // of the close frame
	App    bool   // CauseClosed: the app asked for it
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

// flushes reports whether frames that were queued before the end are still written.
func (e *End) flushes() bool { return e.Cause == CauseClosed || e.Cause == CauseShutdown }

// lingers reports whether the peer may still be sending although reading has ended.
// Closing at once would then reset the connection, and the peer would never see the close
// frame.
func (e *End) lingers() bool {
	return e.Cause == CauseTooLarge || e.Cause == CauseProtocol || e.Cause == CauseFlood
}

// flooded is the end of a connection that sent more frames than allowed.
func flooded() *End {
	return &End{Cause: CauseFlood, Code: websocket.ClosePolicyViolation, Reason: "too many frames"}
}

// Close ends the connection. Frames that were sent before have one second to be written.
// Then a close frame with code and reason is sent, and the peer has another second to
// answer it. Frames that are not written within the first second are dropped. If the peer
// has read nothing in that second, its connection is cut. Only the first end of a
// connection counts. Code 0 means 1000. Reasons are cut at 123 bytes. Close does not
// wait. Run returns when the connection has ended.
func (s *Socket) Close(code int, reason string) { s.close(code, reason, false) }

// CloseByApp is Close because the app asked for it, see End.App.
func (s *Socket) CloseByApp(code int, reason string) { s.close(code, reason, true) }

func (s *Socket) close(code int, reason string, app bool) {
	if code == 0 {
		code = websocket.CloseNormalClosure
	}
	s.end(&End{Cause: CauseClosed, Code: code, Reason: truncate(reason, wire.MaxCloseReason), App: app})
}

// truncate cuts text to at most n bytes, but not within a character.
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
		s.broken = true // without a close frame, nothing more is written
	}
	s.due, s.pong = 0, nil
	s.dropCommands()
	for _, t := range []*clock.Timer{&s.pings, s.extra, &s.latencies} {
		if t != nil {
			s.cfg.Wheel.Cancel(t)
		}
	}
	if !s.running {
		return // start does the rest
	}
	(*socketContext)(s).end()
	s.armCut()
	s.kickWriter()
}

// stuckTimeout is the time for which commands may run after the connection was closed.
// Then the socket is abandoned. The contexts of its commands have ended, and Redis
// answers within two seconds or not at all.
const stuckTimeout = 10 * time.Second

// armCut schedules closing the network connection after the grace. The caller holds mu.
func (s *Socket) armCut() { s.armEnd(closeGrace) }

// armEnd schedules onCut. The caller holds mu.
func (s *Socket) armEnd(d time.Duration) {
	if s.cut == nil {
		s.cut = new(clock.Timer)
	}
	s.cfg.Wheel.Schedule(s.cut, d, s.onCut)
}

// Cut closes the network connection without a close frame. It does not wait.
func (s *Socket) Cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		return
	}
	s.netClosed = true
	s.workers.Go(s.closeNet)
	if s.ending != nil && s.running {
		s.armCut()
	}
}

// onCut closes the network connection if the socket did not end in time, so that blocked
// reads and writes return. Closing may block, which the wheel must not, so it runs on a
// goroutine of its own. If the queue was too long for the time, or the process too busy,
// the close frame is still written first. Without it the peer would assume a broken
// network.
//
// If that does not help, a call of the app's network connection or a command hangs, and
// the socket is abandoned.
func (s *Socket) onCut() {
	if s.cutNow() {
		s.Abandon()
	}
}

// Abandon makes Run return although a goroutine of the socket hangs. It does nothing if
// the socket has not begun to end.
func (s *Socket) Abandon() {
	s.mu.Lock()
	e := s.ending
	first := e != nil && s.running && !s.abandoned
	if first {
		s.abandoned = true
		close(s.abandonedChLocked())
	}
	s.mu.Unlock()
	if first && s.cfg.OnAbandoned != nil {
		s.cfg.OnAbandoned(s.handler, e)
	}
}

// cutNow closes the network connection, or lets the writer send the close frame first. It
// returns true if both have been tried before.
func (s *Socket) cutNow() (tried bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.done || s.netClosed:
		return true
	case s.flushed && !s.graceOver:
		s.graceOver = true
		s.dropQueue()
		s.kickWriter() // it may have waited for a pause
	default:
		s.netClosed = true
		s.workers.Go(s.closeNet)
	}
	s.armCut()
	return false
}

// abandonedCh returns a channel that is closed when the socket is abandoned.
func (s *Socket) abandonedCh() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.abandonedChLocked()
}

// abandonedChLocked is abandonedCh for callers that hold mu.
func (s *Socket) abandonedChLocked() chan struct{} {
	if s.abandonCh == nil {
		s.abandonCh = make(chan struct{})
	}
	return s.abandonCh
}

// closeNet closes the network connection without a close frame.
func (s *Socket) closeNet() {
	defer s.recovered("connection")
	conn := s.netConn()
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn() // its own Close may wait 5 s to send an alert
	}
	_ = conn.Close() // an error changes nothing
}

// finish ends the connection after reading has ended because of e, and waits for the
// writer.
func (s *Socket) finish(e *End, readable bool) {
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.done = true
		s.armEnd(stuckTimeout)
		s.stats().exit(s)
	}()
	defer s.recovered("connection")
	s.end(e)
	if !readable {
		s.giveUpWriting()
		s.closeNet()
	}
	s.endPauses()
	s.writer.Wait(s.abandonedCh())
	if readable && e.Cause != CausePeer && s.ended().lingers() {
		_, _ = io.Copy(io.Discard, s.conn.NetConn()) // until the peer closes or the grace is over
	}
	_ = s.conn.Close() // has ended already, or an error changes nothing
}

// endPauses lets the close frame wait for no pause, because nothing is read any more.
func (s *Socket) endPauses() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats().dropped.Add(uint64(s.dropAllHeld()))
	s.kickWriter()
}

// classify maps an error of reading to the end of the connection. readable reports
// whether the peer may still read a close frame.
func (s *Socket) classify(err error) (e *End, readable bool) {
	var closed *websocket.CloseError
	var network net.Error
	switch {
	case errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure:
		return &End{Cause: CausePeer, Code: closed.Code, Reason: closed.Text}, true
	case errors.Is(err, errFlood):
		return flooded(), true
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

// closeMessage returns the payload of the close frame for e.
func (e *End) closeMessage() []byte {
	if e.Cause == CausePeer {
		return websocket.FormatCloseMessage(e.Code, "")
	}
	return websocket.FormatCloseMessage(e.Code, e.Reason)
}
