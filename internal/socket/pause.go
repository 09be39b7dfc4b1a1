package socket

import (
	"context"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/wire"
)

// updatePause is the time between the writing of the answer to a subscribe request and
// the first update of its room. The stock client sets up its handler for updates only
// when the promise of the answer has been resolved. Under Node it drops updates that
// arrive together with the answer.
const updatePause = 5 * time.Millisecond

// pause delays the updates of one room. It lasts from the queueing of the answer to a
// subscribe request until updatePause after the answer was written. The socket's mu
// guards its fields, except as noted.
type pause struct {
	sock   *Socket // set once
	room   string  // set once
	answer item
	held   queue
	over   chan struct{} // closed at the end; nil: no call waits for it
	until  time.Time     // guarded by the pauseLine
	next   *pause        // in pauses until the answer is written; then in the pauseLine, guarded by it
}

// pauses holds the pauses of one socket.
type pauses struct {
	byRoom map[string]*pause
	// head and tail are the list of pauses whose answers have not been written, in the
	// order of the queue. A pause that has ended early is still in it.
	head, tail *pause
}

// SendSubscribed queues the answer to a subscribe request for a room, like Send. The
// answer is written by itself. Updates of the room that are queued after it wait until
// updatePause after that write. Updates that still wait behind an earlier answer for the
// room are dropped, because f includes them.
func (s *Socket) SendSubscribed(room string, f *wire.Frame) error {
	p := &pause{sock: s, room: room, answer: item{frame: f, answer: true}}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return s.ending
	}
	s.dropHeld(s.pauseOf(room))
	if s.pauses == nil {
		s.pauses = &pauses{byRoom: make(map[string]*pause, 1)}
	}
	s.pauses.byRoom[room] = p
	if s.pauses.tail != nil {
		s.pauses.tail.next = p
	} else {
		s.pauses.head = p
	}
	s.pauses.tail = p
	return s.pushLocked(&s.queue, &p.answer)
}

// Unsubscribed drops the updates of a room that still wait for the end of the pause after
// SendSubscribed.
func (s *Socket) Unsubscribed(room string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return // frames queued before the end are still written
	}
	s.dropHeld(s.pauseOf(room))
	s.grantSlots()
	s.proceed(false)
}

// pauseOf returns a room's pause, or nil if there is none. The caller holds mu.
func (s *Socket) pauseOf(room string) *pause {
	if s.pauses == nil {
		return nil
	}
	return s.pauses.byRoom[room]
}

// queueFor returns the queue for frames of a room. An empty room means no room. The
// caller holds mu.
func (s *Socket) queueFor(room string) *queue {
	if p := s.pauseOf(room); p != nil && room != "" {
		return &p.held
	}
	return &s.queue
}

// holding reports whether any update waits for the end of a pause. The caller holds mu.
func (s *Socket) holding() bool {
	if s.pauses == nil {
		return false
	}
	for _, p := range s.pauses.byRoom {
		if p.held.head != nil {
			return true
		}
	}
	return false
}

// endPause removes a pause. It returns false if the pause has ended before. The caller
// holds mu.
func (s *Socket) endPause(p *pause) bool {
	if p == nil || s.pauseOf(p.room) != p {
		return false
	}
	delete(s.pauses.byRoom, p.room)
	if p.over != nil {
		close(p.over)
	}
	s.tidyPauses()
	return true
}

// AwaitUpdates waits until no update of a room waits for the end of a pause after
// SendSubscribed, and none will unless SendSubscribed is called again. A frame that is
// queued then comes behind the updates that were queued before it. The error is that of
// ctx.
func (s *Socket) AwaitUpdates(ctx context.Context, room string) error {
	for {
		over := s.pauseEnd(room)
		if over == nil {
			return nil
		}
		select {
		case <-over:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// pauseEnd returns a channel that is closed at the end of a room's pause, or nil if there
// is no pause.
func (s *Socket) pauseEnd(room string) <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pauseOf(room)
	if p == nil || s.ending != nil {
		return nil
	}
	if p.over == nil {
		p.over = make(chan struct{})
	}
	return p.over
}

// tidyPauses frees the memory if there are no pauses left. The caller holds mu.
func (s *Socket) tidyPauses() {
	if len(s.pauses.byRoom) == 0 && s.pauses.head == nil {
		s.pauses = nil
	}
}

// dropHeld ends a pause early, if p is not nil, and drops its updates. It returns their
// number. The caller holds mu.
func (s *Socket) dropHeld(p *pause) (dropped int) {
	if !s.endPause(p) {
		return 0
	}
	for it := p.held.head; it != nil; it = it.next {
		s.bytes.Add(-int64(it.charge))
	}
	return p.held.clear()
}

// dropAllHeld is dropHeld for all rooms.
func (s *Socket) dropAllHeld() (dropped int) {
	if s.pauses == nil {
		return 0
	}
	for _, p := range s.pauses.byRoom {
		dropped += s.dropHeld(p)
	}
	return dropped
}

// resume ends a pause and queues its updates.
func (s *Socket) resume(p *pause) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.endPause(p) {
		return
	}
	for it := p.held.pop(); it != nil; it = p.held.pop() {
		s.append(&s.queue, it)
	}
	s.kickWriter()
}

// firstAnswer returns the next item that must be written by itself because it answers a
// subscribe request, or nil. The caller holds mu.
func (s *Socket) firstAnswer() *item {
	if s.pauses == nil || s.pauses.head == nil {
		return nil
	}
	return &s.pauses.head.answer
}

// takeAnswer returns the pause that begins when items have been written, or nil. The
// caller holds mu.
func (s *Socket) takeAnswer(items []*item) *pause {
	if len(items) != 1 || items[0] != s.firstAnswer() {
		return nil
	}
	p := s.pauses.head
	if s.pauses.head, p.next = p.next, nil; s.pauses.head == nil {
		s.pauses.tail = nil
	}
	s.tidyPauses()
	return p
}

// pauseLine ends the pauses of a group's sockets. All pauses are equally long, so they
// end in the order in which they began, and one timer is enough for all of them.
type pauseLine struct {
	lasts time.Duration

	mu         sync.Mutex // guards the fields below, and until and next of the queued pauses
	head, tail *pause
	timer      *time.Timer // nil: never needed
	armed      bool        // the timer runs, or its function does

	running sync.WaitGroup
}

// timerStep is the shortest time between two runs of the pauseLine, so that with many
// subscriptions one run ends many pauses.
const timerStep = time.Millisecond

// add ends a pause after its duration from now.
func (l *pauseLine) add(p *pause) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p.until = time.Now().Add(l.lasts)
	if l.tail != nil {
		l.tail.next = p
	} else {
		l.head = p
	}
	l.tail = p
	if !l.armed {
		l.armed = true
		l.running.Add(1) // run is done, or arms the timer again
		l.arm(l.lasts)
	}
}

// arm schedules run after d. The caller holds mu.
func (l *pauseLine) arm(d time.Duration) {
	if l.timer == nil {
		l.timer = time.AfterFunc(d, l.run)
	} else {
		l.timer.Reset(d)
	}
}

// run ends the pauses that are over.
func (l *pauseLine) run() {
	for p := l.next(); p != nil; p = l.next() {
		p.sock.resume(p)
	}
}

// next takes the next pause that is over out of the queue. It returns nil if there is
// none yet, and then arms the timer again if the queue is not empty.
func (l *pauseLine) next() *pause {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.head
	if p == nil {
		l.armed = false
		l.running.Done()
		return nil
	}
	if left := time.Until(p.until); left > 0 {
		l.arm(max(left, timerStep))
		return nil
	}
	if l.head, p.next = p.next, nil; l.head == nil {
		l.tail = nil
	}
	return p
}
