package socket

import (
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/gorilla/websocket"
)

// errWriterExited says that writing panicked, or that its goroutine was ended.
var errWriterExited = fmt.Errorf("%w: writing was ended by a panic or runtime.Goexit", io.ErrClosedPipe)

// write writes until nothing is left, after j, which was done. The connection may be the
// app's, so its Write may panic or end this goroutine.
func (s *Socket) write(j *job) {
	stopped := false
	defer func() {
		if !stopped {
			s.giveUpWriting()
			s.more(j)
			s.writeFailed(errWriterExited)
		}
	}()
	defer s.recovered("connection")
	for s.next(j) {
		s.written(j, s.writeJob(j))
	}
	stopped = true
}

// writeFailed ends the connection after an error of writing. It also makes the reader
// return, unless the reader has sent a close frame. The websocket package does that if it
// rejects a frame, and Run then returns the reason.
func (s *Socket) writeFailed(err error) {
	s.giveUpWriting()
	if errors.Is(err, websocket.ErrCloseSent) {
		return
	}
	cause := CauseBroken
	var network net.Error
	if errors.As(err, &network) && network.Timeout() {
		cause = CauseStuck
	}
	s.end(&End{Cause: cause, Err: err})
	s.closeNet()
}
