package socket

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// due is a set of frames that are to be written before the queue. They are no
// part of it: of each there is at most one, however long the writer is stuck.
type due uint8

const (
	duePong           due = 1 << iota // WebSocket's own, answers the peer's
	duePing                           // counts for missed pongs
	dueExtraPing                      // does not
	dueLatencyRequest                 // asks for a latency response
	dueLatency                        // tells the round trip
)

// Send queues a frame. It returns an error that wraps [ErrClosed] if the
// connection ends, or if this frame made it end because too much waits
// already.
func (s *Socket) Send(f *wire.Frame) error {
	return s.push(&item{frame: f})
}

// SendUpdate queues an update as Send does. Where too much waits, of several
// states of one member in one room only the last remains, in its own place.
func (s *Socket) SendUpdate(u *wire.Update) error {
	return s.push(&item{frame: u.Frame(), update: u})
}

// SendMessage queues a text or binary message that is not Mesh's, as Send does
// a frame. data is the socket's from then on.
func (s *Socket) SendMessage(messageType int, data []byte) error {
	return s.push(&item{foreign: &foreign{kind: messageType, data: data}})
}

// PingNow sends a ping beside the regular ones. Before Run it does nothing.
func (s *Socket) PingNow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.request(dueExtraPing)
}

// request has the frames of d written, before the queue, unless the connection
// ends. The caller holds mu.
func (s *Socket) request(d due) {
	if s.running && s.ending == nil {
		s.due |= d
		s.kickWriter()
	}
}

// push queues it, or ends the connection if that is too much.
func (s *Socket) push(it *item) error {
	it.charge = it.size()
	limit := s.cfg.QueueBytes
	if limit > 0 {
		it.charge = min(it.charge, max(limit/2, 1))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending != nil {
		return s.ending
	}
	if replaced := s.queue.push(it); replaced != nil {
		s.bytes.Add(-int64(replaced.charge))
		s.stats.coalesced.Add(1)
	}
	s.bytes.Add(int64(it.charge))
	if limit > 0 && s.queued() > limit {
		removed, freed := s.queue.coalesce()
		s.bytes.Add(-int64(freed))
		s.stats.coalesced.Add(uint64(removed))
	}
	if limit > 0 && s.queued() > limit {
		s.endLocked(&End{Cause: CauseSlow, Code: websocket.CloseTryAgainLater, Reason: "connection is too slow"})
		return s.ending
	}
	s.kickWriter()
	return nil
}

// dropQueue throws away what waits to be written. The caller holds mu.
func (s *Socket) dropQueue() {
	for it := s.queue.head; it != nil; it = it.next {
		s.bytes.Add(-int64(it.charge))
	}
	s.stats.dropped.Add(uint64(s.queue.clear()))
}

// giveUpWriting has the writer write no more.
func (s *Socket) giveUpWriting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = true
	s.dropQueue()
}

// kickWriter starts the writer if there is something to write and none is at
// it. The caller holds mu. Once ending is set and the writer has stopped there
// is nothing to write any more, so finish can wait for it.
func (s *Socket) kickWriter() {
	if s.running && !s.writing && s.toWrite() {
		s.writing = true
		s.writer.Go(s.write)
	}
}

// toWrite tells whether there is something to write. The caller holds mu.
func (s *Socket) toWrite() bool {
	return !s.broken && (s.due != 0 || s.queue.head != nil || s.ending != nil && !s.closeSent)
}

// job is what is written at once.
type job struct {
	due   due     // one of them, or
	items []*item // frames of the queue, or
	end   *End    // a close frame
	pong  []byte  // with duePong
	rtt   time.Duration
	at    time.Duration // when it was begun: an answer may come before its writing returns
}

// write writes until there is nothing left to.
func (s *Socket) write() {
	var j job
	for s.next(&j) {
		if err := s.writeJob(&j); err != nil {
			s.stats.dropped.Add(uint64(len(j.items))) // as far as anybody knows
			s.writeFailed(err)
		}
	}
}

// next accounts for the job that was done and puts the next into its place;
// false: there is none, and the writer has stopped.
func (s *Socket) next(j *job) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.account(j)
	clear(j.items)
	*j = job{items: j.items[:0]}
	if !s.toWrite() {
		s.writing = false
		return false
	}
	if j.due = s.due & -s.due; j.due != 0 {
		s.due &^= j.due
		j.pong, j.rtt, j.at = s.pong, s.latency, s.offset(time.Now())
		if j.due == dueLatencyRequest && s.latencyAt == 0 {
			s.latencyAt = j.at
		}
		if j.due == duePing {
			s.due &^= dueExtraPing
		}
		if j.due == duePong {
			s.pong = nil
		}
	} else if j.items = s.queue.take(j.items, s.together()); len(j.items) == 0 {
		s.closeSent = true
		j.end = s.ending
	}
	return true
}

// together returns how much may be written together: a small part of what may
// wait, since what is being written does not coalesce any more.
func (s *Socket) together() int {
	if s.cfg.QueueBytes > 0 {
		return min(togetherBytes, s.cfg.QueueBytes/8)
	}
	return togetherBytes
}

// account notes that j was done. The caller holds mu.
func (s *Socket) account(j *job) {
	switch {
	case len(j.items) > 0:
		charged := 0
		for _, it := range j.items {
			charged += it.charge
		}
		s.bytes.Add(-int64(charged))
		s.flushed = s.ending != nil && s.ending.flushes()
		s.kickWorker()
	case j.due == duePing:
		s.pingAt = j.at
	case j.end != nil && !s.done && !s.hurried: // the peer's turn
		s.flushed = false
		s.cfg.Wheel.Schedule(&s.cut, grace, s.onCut)
	}
}

// writeJob writes j to the network. No lock is held.
func (s *Socket) writeJob(j *job) error {
	deadline := time.Time{}
	if s.cfg.WriteTimeout > 0 {
		deadline = time.Now().Add(s.cfg.WriteTimeout)
	}
	_ = s.conn.SetWriteDeadline(deadline) // never fails
	switch {
	case len(j.items) == 1 && j.items[0].large():
		return s.writeLarge(j.items[0])
	case len(j.items) > 0:
		return s.writeTogether(j.items, deadline)
	case j.end != nil:
		return s.conn.WriteControl(websocket.CloseMessage, j.end.closeMessage(), deadline)
	case j.due == duePong:
		return s.conn.WriteControl(websocket.PongMessage, j.pong, deadline)
	case j.due == dueLatencyRequest:
		return s.writeShared(wire.LatencyRequest())
	case j.due == dueLatency:
		f, err := wire.Push(wire.PushLatency, j.rtt.Milliseconds())
		if err != nil {
			return err
		}
		return s.conn.WriteMessage(websocket.TextMessage, f.Bytes())
	default:
		return s.writeShared(wire.Ping())
	}
}

// writeLarge writes a frame by itself, compressed where that was agreed on.
func (s *Socket) writeLarge(it *item) error {
	switch {
	case it.foreign != nil:
		return s.conn.WriteMessage(it.foreign.kind, it.foreign.data)
	case it.update != nil:
		return s.writeShared(it.frame)
	default:
		return it.frame.Write(s.conn)
	}
}

// buffers are those in which frames are put together.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// writeTogether writes frames with one call of the system: for most of what is
// sent that call is what sending costs. They go past the websocket package,
// which writes one by one; nothing else of it is under way then, but for a
// close frame of its own when it meets a frame that it refuses, and writes of a
// network connection do not mix. Small frames are never compressed: that is
// each sender's choice, and there is little to gain.
func (s *Socket) writeTogether(items []*item, deadline time.Time) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	*buf = (*buf)[:0]
	for _, it := range items {
		*buf = it.append(*buf)
	}
	conn := s.conn.NetConn()
	_ = conn.SetWriteDeadline(deadline) // an error shows at the write
	_, err := conn.Write(*buf)
	return err
}

// writeShared writes a frame that other connections are sent too.
func (s *Socket) writeShared(f *wire.Frame) error {
	p, err := f.Prepared()
	if err != nil {
		return err
	}
	return s.conn.WritePreparedMessage(p)
}

// writeFailed ends the connection after an error of writing. The reader is
// made to return too, unless it is the reader that has sent a close frame: the
// websocket package does that when it meets a frame that it refuses, and Run
// then says why.
func (s *Socket) writeFailed(err error) {
	s.giveUpWriting()
	if errors.Is(err, websocket.ErrCloseSent) {
		return
	}
	cause := CauseBroken
	var network net.Error
	if errors.As(err, &network) && network.Timeout() {
		cause = CauseStuck
	}
	s.end(&End{Cause: cause, Err: err})
	s.sever()
}
