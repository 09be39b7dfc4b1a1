package socket

import (
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/gorilla/websocket"
)

// errWriterExited says that writing panicked, or that something ended the
// goroutine that wrote.
var errWriterExited = fmt.Errorf("%w: writing was ended by a panic or runtime.Goexit", io.ErrClosedPipe)

// write writes until there is nothing left to, after j, which was done. The
// connection may be the app's: its Write may panic, or end this goroutine.
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

// writeFailed ends the connection after an error of writing. The reader is
// made to return too, unless it is the reader that has sent a close frame: the
// websocket package does that when it meets a frame that it refuses, and Run
// then says why.
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
	s.sever()
}
