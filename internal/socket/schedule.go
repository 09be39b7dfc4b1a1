package socket

import (
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/wire"
)

// maxFree limits how many commands without a line are executed at once.
const maxFree = 16

// schedule holds the commands of a socket. It exists from the arrival of a command until
// all have been answered. An idle socket has none. Socket.mu guards it.
//
// A command first waits for its token, and for earlier commands that hold. These waits
// end in the order of arrival. Then it waits in its line, in the pool of commands without
// a line, or in the pool of the app's own commands. Its memory counts while it waits. The
// memory of the protocol's own commands counts until they are done.
type schedule struct {
	first, last *task // the protocol's own commands that are not done, in the order of arrival
	newest      uint64
	arrived     tasks  // wait for a token, or for a command that holds
	holding     *task  // the first that holds, if it has left arrived; nil: none
	holds       uint64 // number of the newest that holds

	lines  map[string]*line // those with a command
	ready  readyLines
	active int // lines that have a goroutine
	free   pool
	beside pool
	most   int   // largest number of lines so far
	spare  *line // for reuse; nil: none

	bytes    int           // of waiting commands, see Config.QueueBytes
	reserved int           // space reserved for answers to come
	space    chan struct{} // closed when bytes decreases; nil: the reader does not wait
	token    clock.Timer   // for the first of arrived
	timed    bool          // token has been used

	slots   int         // answer slots in use, see AwaitAnswerSlot
	waiting []*slotWait // for an answer slot
}

// linesKept is the largest number of lines with which a schedule is reused, because maps
// do not shrink.
const linesKept = 64

// ensureSchedule returns the schedule, and makes it if there is none. The caller holds
// mu.
func (s *Socket) ensureSchedule() *schedule {
	if s.commands == nil {
		s.commands, _ = s.group.schedules.Get().(*schedule)
	}
	if s.commands == nil {
		s.commands = &schedule{lines: make(map[string]*line)}
	}
	return s.commands
}

// freeSchedule frees the schedule if it is empty. The caller holds mu.
func (s *Socket) freeSchedule() {
	sc := s.commands
	if sc.first != nil || sc.arrived.head != nil || sc.beside.head != nil || sc.beside.running > 0 {
		return
	}
	s.commands = nil
	if sc.timed {
		s.cfg.Wheel.Cancel(&sc.token)
	}
	if s.ending != nil || sc.most > linesKept {
		return
	}
	sc.newest, sc.holds, sc.most, sc.waiting, sc.timed = 0, 0, 0, nil, false
	s.group.schedules.Put(sc)
}

// enqueue queues a command, or puts it in the place of a command that it supersedes. The
// caller holds mu.
func (s *Socket) enqueue(req wire.Request, order Order) {
	sc := s.ensureSchedule()
	sc.newest++
	order.Overlaps = order.Overlaps && order.Line != ""
	if t := sc.superseded(&order); t != nil {
		sc.bytes += t.supersede(req)
		s.stats().superseded.Add(1)
		return
	}
	t := &task{socketContext: (*socketContext)(s), req: req, order: order, number: sc.newest, bytes: cost(&req), answerBytes: answerBytes + len(req.ID)}
	sc.bytes += t.bytes
	sc.arrived.push(t)
	if !order.Beside {
		sc.list(t)
	}
	s.admit()
	if t == sc.arrived.tail && sc.holding == nil {
		s.stats().delayed.Add(1)
	}
	s.proceed(false)
}

// superseded returns the waiting command that a command with this order supersedes, or
// nil.
func (sc *schedule) superseded(order *Order) *task {
	if order.Latest == 0 {
		return nil
	}
	l := sc.lines[order.Line]
	if l == nil {
		return nil
	}
	if t := l.newest; !t.started && t.order.Latest == order.Latest && t.number > sc.holds {
		return t
	}
	return nil
}

// list adds a command of the protocol's own.
func (sc *schedule) list(t *task) {
	if t.prev = sc.last; t.prev != nil {
		t.prev.next = t
	} else {
		sc.first = t
	}
	sc.last = t
	if t.order.Holds {
		sc.holds = t.number
	}
	name := t.order.Line
	if name == "" {
		return
	}
	l := sc.lines[name]
	if l == nil {
		if l, sc.spare = sc.spare, nil; l == nil {
			l = new(line)
		}
		l.name = name
		sc.lines[name] = l
		sc.most = max(sc.most, len(sc.lines))
	}
	l.newest, t.line = t, l
	l.count++
}

// unlist removes a command of the protocol's own.
func (sc *schedule) unlist(t *task) {
	if t.prev != nil {
		t.prev.next = t.next
	} else {
		sc.first = t.next
	}
	if t.next != nil {
		t.next.prev = t.prev
	} else {
		sc.last = t.prev
	}
	t.prev, t.next, t.done = nil, nil, true
	if l := t.line; l != nil {
		if l.count--; l.count == 0 {
			delete(sc.lines, l.name)
		}
	}
}

// admit takes tokens for commands that have arrived, and moves them to their lines. The
// caller holds mu.
func (s *Socket) admit() {
	sc := s.commands
	if sc.arrived.head == nil {
		return
	}
	now := time.Now()
	for sc.arrived.head != nil && sc.holding == nil {
		if !s.commandLimit.Take(now) {
			sc.timed = true
			s.cfg.Wheel.Schedule(&sc.token, s.commandLimit.Wait(), s.onToken)
			return
		}
		switch t := sc.arrived.pop(); {
		case t.order.Beside:
			sc.beside.push(t)
		case t.line != nil:
			t.line.queue.push(t)
			sc.offer(t.line)
			sc.hold(t)
		default:
			sc.free.push(t)
			sc.hold(t)
		}
	}
}

func (sc *schedule) hold(t *task) {
	if t.order.Holds {
		sc.holding = t
	}
}

// onToken goes on when there is a token.
func (s *Socket) onToken() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.commands != nil && s.ending == nil {
		s.admit()
		s.proceed(false)
	}
}

// offer adds a line to the ready lines if it is ready.
func (sc *schedule) offer(l *line) {
	t := l.queue.head
	if t == nil || l.ready || l.busy || l.pending.head != nil && !t.order.Overlaps {
		return
	}
	sc.ready.push(l)
}

// startable takes the first command that may be started, or returns nil. It takes a
// command of the app's own only if beside is true. The caller holds mu.
func (s *Socket) startable(beside bool) *task {
	sc := s.commands
	l := sc.ready.next(s.moreLines())
	var first *task
	if l != nil {
		first = l.queue.head
	}
	if sc.free.admits(maxFree) && (first == nil || sc.free.head.number < first.number) {
		first = sc.free.head
	}
	if beside && sc.beside.admits(s.cfg.HandlerConcurrency) && (first == nil || sc.beside.head.number < first.number) {
		first = sc.beside.head
	}
	switch {
	case first == nil:
		return nil
	case first.order.Beside:
		sc.beside.pop()
		sc.beside.running++
		s.uncount(first)
	case first.line == nil:
		sc.free.pop()
		sc.free.running++
		sc.reserved += first.answerBytes
	default:
		sc.ready.remove(l)
		l.queue.pop()
		l.busy = true
		s.activate(l, true)
		sc.reserved += first.answerBytes
	}
	first.started, first.first = true, first.first || first == sc.first
	return first
}

// uncount subtracts the bytes of a task, so that the reader may go on. The caller holds
// mu.
func (s *Socket) uncount(t *task) {
	sc := s.commands
	sc.bytes -= t.bytes
	t.bytes = 0
	if sc.space != nil {
		close(sc.space)
		sc.space = nil
	}
}

// dropCommands removes the commands that have not been started, because the connection
// ends. The caller holds mu.
func (s *Socket) dropCommands() {
	sc := s.commands
	if sc == nil {
		return
	}
	for t := sc.first; t != nil; {
		next := t.next
		if !t.started || t.parked {
			sc.unlist(t)
		}
		t = next
	}
	for _, l := range sc.lines {
		l.queue, l.ready = tasks{}, false
	}
	sc.arrived, sc.free.tasks, sc.beside.tasks, sc.ready = tasks{}, tasks{}, tasks{}, readyLines{}
	if sc.space != nil {
		close(sc.space)
		sc.space = nil
	}
	s.freeSchedule()
}
