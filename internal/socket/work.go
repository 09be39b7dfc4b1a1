package socket

import (
	"context"
	"runtime/debug"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/wire"
)

// waiting is a command that waits for its turn.
type waiting struct {
	req     wire.Request
	overlap bool // it may be begun before those before it have been answered
}

// pending is a command that has been begun, and what waits for it and answers.
type pending struct {
	req  wire.Request
	rest func(context.Context)
}

// owes is what the answer that is still to come counts towards what is queued:
// more than it will.
func (p *pending) owes() int { return 256 + len(p.req.ID) }

// enqueue lets a command wait for its turn; false: too many wait already. Those
// that wait for their answer count as well.
func (s *Socket) enqueue(req wire.Request) bool {
	overlap := s.handler.Overlaps(req.Command)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return true // of no interest any more
	}
	wait := len(s.commands) + len(s.pending)
	if limit := s.cfg.QueueBytes; wait >= s.cfg.CommandQueue ||
		limit > 0 && wait > 0 && s.commandBytes+req.Size > limit {
		return false
	}
	s.commands = append(s.commands, waiting{req, overlap})
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

// kickAnswerer starts the answerer if there are commands to be answered and
// none is at it. The caller holds mu.
func (s *Socket) kickAnswerer() {
	if !s.answering && len(s.pending) > 0 {
		s.workers.Go(s.answer)
	}
}

// toDo tells whether a command may be started. While half of the queue is full,
// with the answers that are still to come, none is: whoever does not read its
// answers gets EBUSY for new commands, and is not closed for the size of the
// answers it asked for. One that does not overlap waits until all before it
// have been answered. The caller holds mu.
func (s *Socket) toDo() bool {
	if len(s.commands) == 0 || s.ending != nil {
		return false
	}
	if !s.commands[0].overlap && (s.answering || len(s.pending) > 0) {
		return false
	}
	return s.cfg.QueueBytes <= 0 || s.queued()+s.owed < max(s.cfg.QueueBytes/2, 1)
}

// work does commands, or begins them, one after the other until there is none
// left to do. Then it is the answerer, if there is no other.
func (s *Socket) work() {
	stopped := false
	defer func() {
		if !stopped { // a handler ended this goroutine
			s.mu.Lock()
			defer s.mu.Unlock()
			s.working = false
			s.kickWorker()
			s.kickAnswerer()
		}
	}()
	for {
		next, ok := s.nextCommand()
		if !ok {
			break
		}
		if next.overlap {
			s.begin(next.req)
		} else {
			s.call(s.handler.Command, next.req)
		}
	}
	stopped = true
	s.answer()
}

// nextCommand takes the first command that waits; false: none may be started,
// and the worker has stopped.
func (s *Socket) nextCommand() (waiting, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.toDo() {
		s.working = false
		return waiting{}, false
	}
	next := s.commands[0]
	s.commands[0] = waiting{}
	if s.commands = s.commands[1:]; len(s.commands) == 0 {
		s.commands = nil
	}
	s.commandBytes -= next.req.Size
	s.kickAnswerer() // the worker may be held up by this one
	return next, true
}

// begin begins a command. It is answered behind those before it, also if it
// panics.
func (s *Socket) begin(req wire.Request) {
	p := pending{req: req, rest: func(context.Context) { s.refuse(req, internalErr, wire.CodeServer, wire.NameError) }}
	defer func() {
		if p.rest == nil {
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pending = append(s.pending, p)
		s.commandBytes += req.Size
		s.owed += p.owes()
	}()
	defer s.recovered("command")
	p.rest = s.handler.Begin((*life)(s), req)
}

// answer waits for the commands that have been begun, and answers them, one
// after the other until there is none left. It does nothing if somebody is at
// it.
func (s *Socket) answer() {
	s.mu.Lock()
	mine := !s.answering && len(s.pending) > 0
	s.answering = s.answering || mine
	s.mu.Unlock()
	if !mine {
		return
	}
	stopped := false
	defer func() {
		if !stopped { // a handler ended this goroutine
			s.mu.Lock()
			defer s.mu.Unlock()
			s.answering = false
			s.kickWorker()
			s.kickAnswerer()
		}
	}()
	for {
		next, ok := s.nextPending()
		if !ok {
			break
		}
		s.settle(next)
	}
	stopped = true
}

// settle waits for a command that has been begun, and answers it.
func (s *Socket) settle(p pending) {
	defer func() { // also if it ends this goroutine
		s.mu.Lock()
		defer s.mu.Unlock()
		s.owed -= p.owes()
	}()
	s.call(func(ctx context.Context, _ wire.Request) { p.rest(ctx) }, p.req)
}

// nextPending takes the first command that waits for its answer; false: there is
// none, and the answerer has stopped.
func (s *Socket) nextPending() (pending, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) == 0 {
		s.answering = false
		s.kickWorker()
		return pending{}, false
	}
	next := s.pending[0]
	s.pending[0] = pending{}
	if s.pending = s.pending[1:]; len(s.pending) == 0 {
		s.pending = nil
	}
	s.commandBytes -= next.req.Size
	s.kickWorker() // what there was no room for
	return next, true
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

// recovered is deferred around code that may be the app's: it recovers a panic,
// counts and logs it.
func (s *Socket) recovered(where string) {
	value := recover()
	if value == nil {
		return
	}
	s.stats().panics.Add(1)
	s.cfg.Log.Error("mesh: handler panicked", "in", where, "panic", limit.PanicText(value), "stack", string(debug.Stack()))
}
