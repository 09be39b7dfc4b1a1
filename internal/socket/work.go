package socket

import (
	"context"
	"runtime/debug"

	"github.com/meshpresence/mesh/internal/limit"
	"github.com/meshpresence/mesh/internal/wire"
)

// answersPart is the share of half of the queue that answers may always use: one part in
// this many.
const answersPart = 8

// mayStart reports whether there is space for the answers to more commands. While half of
// the queue is full, counting the answers to come, no command of the app's own is
// started, and only a few of the protocol's own. So a client that does not read its
// answers makes its commands wait, but a client that is behind with updates can still
// leave the room. The caller holds mu.
func (s *Socket) mayStart() (some, beside bool) {
	if s.ending != nil || s.commands == nil {
		return false, false
	}
	reserved := s.commands.reserved
	beside = s.cfg.QueueBytes <= 0 || s.queued()+reserved < s.half()
	return beside || s.answers+reserved < s.half()/answersPart, beside
}

// half is half of the queue.
func (s *Socket) half() int { return max(s.cfg.QueueBytes/2, 1) }

// proceed starts all commands that may be started, each on a goroutine of its own. If
// mine is true, it returns the first of them instead, for the caller to execute. The
// caller holds mu.
func (s *Socket) proceed(mine bool) (kept *task) {
	for {
		some, beside := s.mayStart()
		if !some {
			break
		}
		t := s.startable(beside)
		if t == nil {
			break
		}
		if mine && kept == nil {
			kept = t
			continue
		}
		s.spawn(t)
	}
	return kept
}

// spawn executes a command on a goroutine of its own.
func (s *Socket) spawn(t *task) { s.workers.Go(func() { s.work(t) }) }

// work executes a command, and then others until none is left.
func (s *Socket) work(t *task) {
	defer func() {
		if t == nil {
			return
		}
		// The handler has ended this goroutine.
		if next := s.nextTask(t); next != nil {
			s.spawn(next)
		}
	}()
	for t != nil {
		s.do(t)
		t = s.nextTask(t)
	}
}

// do begins a command, or executes the rest of one that has been begun. If the handler
// panics, do answers with an error.
func (s *Socket) do(t *task) {
	if t.order.Overlaps && !t.restDue {
		s.begin(t)
		return
	}
	returned := false
	defer func() {
		if !returned {
			t.begun = Begun{}
			s.refuse(t.req, internalErr, wire.CodeServer, wire.NameError)
		}
	}()
	defer s.recovered("command")
	s.handle(t)
	returned = true
}

// handle calls the handler, and the rest that it returns.
func (s *Socket) handle(t *task) {
	switch {
	case t.restDue:
		t.begun.Rest(t)
	case t.order.Beside:
		s.handler.Concurrent(t.socketContext, t.req)
	default:
		t.begun = s.handler.Begin(t, t.req, t.first)
		if t.begun.Again = t.begun.Again && !t.first; !t.begun.Again && t.begun.Rest != nil {
			t.begun.Rest(t)
		}
		t.begun.Rest = nil
	}
}

// begin begins a command that overlaps. It is answered after those before it, even if it
// panics.
func (s *Socket) begin(t *task) {
	t.begun = Begun{Rest: func(context.Context) { s.refuse(t.req, internalErr, wire.CodeServer, wire.NameError) }}
	defer s.recovered("command")
	t.begun = s.handler.Begin(t, t.req, true)
	t.begun.Again = false
}

// nextTask accounts for the last step of a task and starts the commands that may be
// started then. It returns the caller's next task, or nil.
func (s *Socket) nextTask(t *task) *task {
	s.mu.Lock()
	defer s.mu.Unlock()
	sc, l := s.commands, t.line
	if t.begun.Spared {
		t.begun.Spared = false
		s.commandLimit.Return()
		s.admit()
	}
	switch {
	case t.restDue:
		l.pending.pop()
	case t.begun.Rest != nil:
		t.restDue = true
		l.busy = false
		awaited := l.pending.head != nil
		l.pending.push(t)
		sc.offer(l)
		if !awaited {
			s.proceed(false)
			return t
		}
		return s.proceed(true)
	case t.begun.Again && s.ending == nil:
		s.park(t)
		return s.proceed(true)
	}
	var behind *task // to be awaited now
	if t.restDue {
		behind = l.pending.head
	}
	if s.complete(t); behind == nil { // l may belong to another socket from here on
		return s.proceed(true)
	}
	s.proceed(false)
	return behind
}

// complete removes a command that is done. The caller holds mu.
func (s *Socket) complete(t *task) {
	sc := s.commands
	if t.order.Beside {
		sc.beside.running--
		s.freeSchedule()
		return
	}
	s.uncount(t)
	s.release(t)
	sc.unlist(t)
	if sc.holding == t {
		sc.holding = nil
		s.admit()
	}
	switch l := t.line; {
	case l == nil:
		sc.free.running--
	default:
		if !t.restDue {
			l.busy = false
		}
		s.activate(l, l.busy || l.pending.head != nil)
		sc.offer(l)
		if l.count == 0 {
			*l = line{}
			sc.spare = l
		}
	}
	s.unpark()
	s.freeSchedule()
}

// release returns the space that was reserved for the answer to a task. The caller holds
// mu.
func (s *Socket) release(t *task) {
	s.commands.reserved -= t.answerBytes
	if t.slot {
		t.slot = false
		s.commands.slots--
		s.grantSlots()
	}
}

// park sets a command aside that must be begun again when all before it are done. Only
// its line waits for it. It takes no reserved space and no goroutine. The caller holds
// mu.
func (s *Socket) park(t *task) {
	t.begun, t.parked = Begun{}, true
	s.release(t)
	if t.line == nil {
		s.commands.free.running--
	} else {
		s.activate(t.line, false)
	}
	s.unpark()
}

// unpark resumes the first command of all if it is parked. The caller holds mu.
func (s *Socket) unpark() {
	sc := s.commands
	t := sc.first
	if t == nil || !t.parked {
		return
	}
	t.parked, t.started, t.first = false, false, true
	if t.line == nil {
		sc.free.pushFront(t)
		return
	}
	t.line.busy = false
	t.line.queue.pushFront(t)
	sc.offer(t.line)
}

// recovered is deferred around code that may be the app's. It recovers a panic, counts it
// and logs it.
func (s *Socket) recovered(where string) {
	value := recover()
	if value == nil {
		return
	}
	s.stats().panics.Add(1)
	s.cfg.Log.Error("mesh: handler panicked", "in", where, "panic", limit.PanicText(value), "stack", string(debug.Stack()))
}
