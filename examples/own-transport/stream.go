package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// stream writes Server-Sent Events to one response. Events and heartbeats come
// from two goroutines.
type stream struct {
	w      http.ResponseWriter
	ctl    *http.ResponseController
	within time.Duration

	mu sync.Mutex // one event after the other; held while it is written
}

func newStream(w http.ResponseWriter, within time.Duration) *stream {
	return &stream{w: w, ctl: http.NewResponseController(w), within: within}
}

// begin sends the headers and the first event.
func (s *stream) begin(h hello) error {
	head := s.w.Header()
	head.Set("Content-Type", "text/event-stream")
	head.Set("Cache-Control", "no-store") // a token is in it
	head.Set("X-Accel-Buffering", "no")   // nginx would keep events until it has some KiB
	head.Set("X-Content-Type-Options", "nosniff")
	return s.send("hello", h)
}

// send writes one event through to the network. A client that does not read
// holds up nobody but itself: meanwhile the subscription keeps what happens, up
// to a bound (mesh.ErrSlowConsumer), and when the time is over the write fails.
func (s *stream) send(event string, v any) error {
	data, err := json.Marshal(v) // of one line, whatever is in it
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.ctl.SetWriteDeadline(time.Now().Add(s.within)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(s.w, "event: %s\ndata: %s\n\n", event, data); err != nil {
		return err
	}
	if err := s.ctl.Flush(); err != nil {
		return err
	}
	// By HTTP/2 a deadline that passes ends the stream even if nothing is being
	// written then.
	return s.ctl.SetWriteDeadline(time.Time{})
}

// last limits what the server itself has still to write: the end of the
// response, which must not wait for a client that does not read.
func (s *stream) last() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.ctl.SetWriteDeadline(time.Now().Add(s.within)) // nothing to be done about it
}
