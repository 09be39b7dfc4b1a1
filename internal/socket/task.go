package socket

import (
	"context"

	"github.com/meshpresence/mesh/internal/wire"
)

// Order says how a command is ordered among those of its connection. With the zero Order
// it waits only for commands that hold.
type Order struct {
	// Line is the line in which the command waits. Commands of one line are executed in
	// the order in which they were sent, those of different lines concurrently. Empty: no
	// line.
	Line string
	// Overlaps says that the next command of the line need not wait until this one is
	// done, but only until it is begun, if that one overlaps too. Both are answered in
	// order. It has no effect without a line.
	Overlaps bool
	// Holds says that all commands that were sent later wait until this one is done.
	Holds bool
	// Latest is not 0 if a later command of the same line with the same Latest supersedes
	// this one while it waits. No other command of the line, and none that holds, may
	// come between. The later one takes the place of the waiting one, with its token, and
	// answers for it, see wire.Request.Also.
	Latest uint8
	// Beside says that the command is the app's own. Handler.Concurrent executes it, and
	// the other fields have no effect.
	Beside bool
}

// Begun is the result of Handler.Begin.
type Begun struct {
	// Rest waits for the command, and answers it. Nil: nothing is left to do.
	Rest func(ctx context.Context)
	// Spared says that the command only replaced one that waited. It costs no token.
	Spared bool
	// Again says that the outcome may depend on commands that were sent before and are
	// not done yet. When they are done, the command is begun once more. Rest is ignored.
	// Again is only for commands that do not overlap.
	Again bool
}

// taskBytes is the charge of a waiting command beside its frame: about its own size in
// memory.
const taskBytes = 256

// answerBytes is the space reserved for an answer to come. Most answers are shorter.
const answerBytes = 256

// task is a command, from its arrival until it has been answered. It is also the context
// in which the command is executed. Socket.mu guards its fields, except those of the
// goroutine that executes it.
type task struct {
	*socketContext
	req    wire.Request // does not change after the start
	order  Order
	number uint64 // in the order of arrival
	line   *line  // nil: none

	bytes, answerBytes int  // charges, see schedule
	started            bool // it does not wait any more, or is parked
	parked             bool // it is begun again when all before it are done
	first              bool // all before it are done
	slot               bool // it has an answer slot, see AwaitAnswerSlot
	done               bool

	after      *task // next in a list of tasks
	prev, next *task // in the order of arrival, of those that are not done

	// Only the goroutine that executes it uses these.
	begun   Begun
	restDue bool // it has been begun, and Rest must be called
}

// cost returns the charge of a waiting request, without the requests that it supersedes.
func cost(req *wire.Request) int { return req.Size + taskBytes }

// supersede puts a later request in the place of a waiting one. It returns the increase
// of the task's charge.
func (t *task) supersede(req wire.Request) (more int) {
	req.Also = t.req.Also
	if t.req.HasID {
		req.Also = append(req.Also, t.req.ID)
		t.answerBytes += answerBytes + len(t.req.ID)
		more = answerBytes + len(t.req.ID)
	}
	more += cost(&req) - cost(&t.req)
	t.req = req
	t.bytes += more
	return more
}

// taskKey is the key of the task among a context's values.
type taskKey struct{}

// Value implements context.Context.
func (t *task) Value(key any) any {
	if key == (taskKey{}) {
		return t
	}
	return t.socketContext.Value(key)
}

// tasks is a first-in first-out list of tasks. A task is in at most one list.
type tasks struct{ head, tail *task }

func (l *tasks) push(t *task) {
	if l.tail != nil {
		l.tail.after = t
	} else {
		l.head = t
	}
	l.tail = t
}

// pushFront puts a task before the others.
func (l *tasks) pushFront(t *task) {
	if t.after = l.head; l.head == nil {
		l.tail = t
	}
	l.head = t
}

// pop takes the first task out. The list must not be empty.
func (l *tasks) pop() *task {
	t := l.head
	if l.head = t.after; l.head == nil {
		l.tail = nil
	}
	t.after = nil
	return t
}

// pool holds tasks that wait for no others. A limited number of them run at once.
type pool struct {
	tasks
	running int
}

// admits reports whether the first task may run. A limit that is not positive means no
// limit.
func (p *pool) admits(limit int) bool {
	return p.head != nil && (limit <= 0 || p.running < limit)
}
