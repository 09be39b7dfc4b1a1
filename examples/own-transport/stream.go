package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// stream writes Server-Sent Events to one response. Events and pings come from two
// goroutines.
type stream struct {
	w      http.ResponseWriter
	ctl    *http.ResponseController
	within time.Duration

	mu sync.Mutex // held while an event is written, so that events do not mix
}

func newStream(w http.ResponseWriter, within time.Duration) *stream {
	return &stream{w: w, ctl: http.NewResponseController(w), within: within}
}

// begin sends the headers and the first event.
func (s *stream) begin(h hello) error {
	head := s.w.Header()
	head.Set("Content-Type", "text/event-stream")
	head.Set("Cache-Control", "no-store") // the stream contains a token
	head.Set("X-Accel-Buffering", "no")   // otherwise nginx would buffer events
	head.Set("X-Content-Type-Options", "nosniff")
	return s.send("hello", h)
}

// send writes one event through to the network. A client that does not read blocks only
// its own stream. The subscription buffers events for it, up to a limit
// (mesh.ErrSlowConsumer), and the write fails after its deadline.
func (s *stream) send(event string, v any) error {
	data, err := json.Marshal(v) // always one line
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
	// With HTTP/2, a deadline that passes ends the stream even if nothing is being
	// written.
	return s.ctl.SetWriteDeadline(time.Time{})
}

// last limits the time for the end of the response, which must not wait for a client that
// does not read.
func (s *stream) last() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.ctl.SetWriteDeadline(time.Now().Add(s.within)) // an error changes nothing
}
