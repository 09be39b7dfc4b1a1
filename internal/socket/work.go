package socket

import (
	"context"
	"fmt"
	"runtime/debug"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/wire"
)

// enqueue lets a command wait for its turn; false: too many wait already.
func (s *Socket) enqueue(req wire.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return true // of no interest any more
	}
	if limit := s.cfg.QueueBytes; len(s.commands) >= s.cfg.CommandQueue ||
		limit > 0 && len(s.commands) > 0 && s.commandBytes+req.Size > limit {
		return false
	}
	s.commands = append(s.commands, req)
	s.commandBytes += req.Size
	s.kickWorker()
	return true
}

// kickWorker starts the worker if there is a command to do and none is at it.
// The caller holds mu.
func (s *Socket) kickWorker() {
	if !s.working && s.toDo() {
		s.working = true
		s.workers.Go(s.work)
	}
}

// toDo tells whether a command may be started. While half of the queue is full
// none is: whoever does not read its answers gets EBUSY for new commands, and
// is not closed for the size of the answers it asked for. The caller holds mu.
func (s *Socket) toDo() bool {
	held := s.cfg.QueueBytes > 0 && s.queued() >= max(s.cfg.QueueBytes/2, 1)
	return len(s.commands) > 0 && s.ending == nil && !held
}

// work does commands, one after the other, until there is none left to do.
func (s *Socket) work() {
	stopped := false
	defer func() {
		if !stopped { // a handler ended this goroutine
			s.mu.Lock()
			defer s.mu.Unlock()
			s.working = false
			s.kickWorker()
		}
	}()
	for {
		req, ok := s.nextCommand()
		if !ok {
			stopped = true
			return
		}
		s.call(s.handler.Command, req)
	}
}

// nextCommand takes the first command that waits; false: none may be started,
// and the worker has stopped.
func (s *Socket) nextCommand() (wire.Request, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.toDo() {
		s.working = false
		return wire.Request{}, false
	}
	req := s.commands[0]
	s.commands[0] = wire.Request{}
	s.commandBytes -= req.Size
	if s.commands = s.commands[1:]; len(s.commands) == 0 {
		s.commands = nil
	}
	return req, true
}

// startBeside runs a command beside the others; false: too many do already.
func (s *Socket) startBeside(req wire.Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return true // of no interest any more
	}
	if limit := s.cfg.HandlerConcurrency; limit > 0 && int(s.beside) >= limit {
		return false
	}
	s.beside++
	s.workers.Go(func() {
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.beside--
		}()
		s.call(s.handler.Concurrent, req)
	})
	return true
}

// call calls a handler, and answers in its place if it panics.
func (s *Socket) call(handle func(context.Context, wire.Request), req wire.Request) {
	returned := false
	defer func() {
		if !returned {
			s.refuse(req, internalErr, wire.CodeServer, wire.NameError)
		}
	}()
	defer s.recovered("command")
	handle((*life)(s), req)
	returned = true
}

// recovered is deferred around what is not the socket's own: it recovers a
// panic, counts and logs it.
func (s *Socket) recovered(where string) {
	value := recover()
	if value == nil {
		return
	}
	s.stats().panics.Add(1)
	s.cfg.Log.Error("mesh: handler panicked", "in", where, "panic", limit.Shorten(fmt.Sprint(value)), "stack", string(debug.Stack()))
}
