package socket

import (
	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// Send queues a frame. If too much waits, only the last of several frames with numbers of
// one room remains. It returns an error that wraps [ErrClosed] if the connection ends,
// or if this frame ended it because too much waits already.
func (s *Socket) Send(f *wire.Frame) error {
	return s.push(&item{frame: f}, "")
}

// Answer queues the answer to a command, like Send, but never ends the connection. The
// number of commands that run at once limits the answers. Of the waiting bytes, answers
// count at most half of the queue.
func (s *Socket) Answer(f *wire.Frame) error {
	return s.push(&item{frame: f, answer: true}, "")
}

// SendUpdate queues an update, like Send. If too much waits, only the last of several
// states of one member in one room remains, at its own position.
func (s *Socket) SendUpdate(u *wire.Update) error {
	return s.push(&item{frame: u.Frame(), update: u}, u.RoomName)
}

// SendMessage queues a text or binary message that is not of the Mesh protocol, like
// Send. The socket owns data from then on.
func (s *Socket) SendMessage(messageType int, data []byte) error {
	return s.push(&item{message: &rawMessage{kind: messageType, data: data}}, "")
}

// push queues an item of a room ("": none), behind earlier items of the same room. It
// ends the connection if too much waits.
func (s *Socket) push(it *item, room string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return s.ending
	}
	return s.pushLocked(s.queueFor(room), it)
}

// pushLocked is push for callers that hold mu and know the queue. The connection must not
// have ended.
func (s *Socket) pushLocked(q *queue, it *item) error {
	most := 0
	if s.cfg.QueueBytes > 0 {
		most = s.half()
	}
	it.setCharge(most)
	s.append(q, it)
	s.bytes.Add(int64(it.charge))
	if it.answer {
		s.answers += int(it.charge)
	}
	if s.tooMuch() {
		s.coalesce()
	}
	if !it.answer && s.tooMuch() {
		s.endLocked(&End{Cause: CauseSlow, Code: websocket.CloseTryAgainLater, Reason: "connection is too slow"})
		return s.ending
	}
	s.kickWriter()
	return nil
}

// tooMuch reports whether more waits than allowed. The caller holds mu.
func (s *Socket) tooMuch() bool {
	limit := s.cfg.QueueBytes
	return limit > 0 && s.queued()-max(s.answers-s.half(), 0) > limit
}

// append appends an item to a queue. The caller holds mu and counts its bytes.
func (s *Socket) append(q *queue, it *item) {
	if replaced := q.push(it); replaced != nil {
		s.bytes.Add(-int64(replaced.charge))
		s.stats().coalesced.Add(1)
	}
}

// coalesce removes replaced states and numbers from all queues. The caller holds mu.
func (s *Socket) coalesce() {
	removed, freed := s.queue.coalesce()
	if s.pauses != nil {
		for _, p := range s.pauses.byRoom {
			r, f := p.held.coalesce()
			removed, freed = removed+r, freed+f
		}
	}
	s.bytes.Add(-int64(freed))
	s.stats().coalesced.Add(uint64(removed))
}

// dropQueue discards everything that waits to be written. The caller holds mu.
func (s *Socket) dropQueue() {
	s.stats().dropped.Add(uint64(s.dropAllHeld()))
	s.pauses = nil
	for it := s.queue.head; it != nil; it = it.next {
		s.bytes.Add(-int64(it.charge))
		if it.answer {
			s.answers -= int(it.charge)
		}
	}
	s.stats().dropped.Add(uint64(s.queue.clear()))
}
