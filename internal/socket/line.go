package socket

// line holds commands that are executed in order.
type line struct {
	name    string
	newest  *task // of those not done
	count   int   // of those not done
	queue   tasks // may be started as soon as those before them allow it
	pending tasks // begun and not answered; the first one is being awaited

	busy   bool // a command is being begun or executed, or is parked
	active bool // a goroutine works on it
	ready  bool // it is in a list of schedule.ready

	before, behind *line // in that list
}

// lines is a first-in first-out list of lines.
type lines struct{ head, tail *line }

func (r *lines) push(l *line) {
	l.ready = true
	if l.before = r.tail; l.before != nil {
		l.before.behind = l
	} else {
		r.head = l
	}
	r.tail = l
}

func (r *lines) remove(l *line) {
	l.ready = false
	if l.before != nil {
		l.before.behind = l.behind
	} else {
		r.head = l.behind
	}
	if l.behind != nil {
		l.behind.before = l.before
	} else {
		r.tail = l.before
	}
	l.before, l.behind = nil, nil
}

// readyLines holds the lines with a command that may be started.
type readyLines struct {
	fresh lines // no goroutine works on them
	going lines // a goroutine works on them
}

func (r *readyLines) of(l *line) *lines {
	if l.active {
		return &r.going
	}
	return &r.fresh
}

func (r *readyLines) push(l *line)   { r.of(l).push(l) }
func (r *readyLines) remove(l *line) { r.of(l).remove(l) }

// next returns the next line, or nil if there is none. more says that a line without a
// goroutine may get one.
func (r *readyLines) next(more bool) *line {
	l, f := r.going.head, r.fresh.head
	if f != nil && more && (l == nil || f.queue.head.number < l.queue.head.number) {
		return f
	}
	return l
}

// minLines is the number of lines of a socket that may always be worked on at once.
// maxExtraLines limits the lines of all sockets of a group beyond minLines. Each of them
// takes a goroutine, and all clients may reconnect at the same time while Redis or a
// guard is slow.
const (
	minLines      = 4
	maxExtraLines = 16384
)

// moreLines reports whether one more line may be worked on. If only the lines of other
// sockets prevent it, this socket goes on when one of its own lines is done. The caller
// holds mu.
func (s *Socket) moreLines() bool {
	active := s.commands.active
	return active < s.cfg.LinesAtOnce && (active < minLines || s.group.lines.Load() < s.group.extraLines)
}

// activate notes whether a goroutine works on a line. The caller holds mu.
func (s *Socket) activate(l *line, active bool) {
	sc := s.commands
	if l.active == active {
		return
	}
	ready := l.ready
	if ready {
		sc.ready.remove(l)
	}
	l.active = active
	if ready {
		sc.ready.push(l)
	}
	if active {
		sc.active++
	}
	if sc.active > minLines {
		s.group.countLine(active)
	}
	if !active {
		sc.active--
	}
}

// countLine counts a line beyond minLines that begins or ends to be worked on.
func (g *Group) countLine(begins bool) {
	if begins {
		g.lines.Add(1)
	} else {
		g.lines.Add(-1)
	}
}
