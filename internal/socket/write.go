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
		s.stats().coalesced.Add(1)
	}
	s.bytes.Add(int64(it.charge))
	if limit > 0 && s.queued() > limit {
		removed, freed := s.queue.coalesce()
		s.bytes.Add(-int64(freed))
		s.stats().coalesced.Add(uint64(removed))
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
	s.stats().dropped.Add(uint64(s.queue.clear()))
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
	if !s.running || s.writing || !s.toWrite() {
		return
	}
	s.writing = true
	if s.gate != nil && s.gate.raw != nil {
		s.writer.Add()
		s.group.flushers.add(s)
	} else {
		s.writer.Go(func() { s.write(new(job)) })
	}
}

// toWrite tells whether there is something to write. The caller holds mu.
func (s *Socket) toWrite() bool {
	return !s.broken && (s.due != 0 || s.queue.head != nil || s.ending != nil && !s.closeSent)
}

// job is what is written at once.
type job struct {
	due    due     // one of them, or
	items  []*item // frames of the queue, until they have been encoded, or
	end    *End    // a close frame
	pong   []byte  // with duePong
	rtt    time.Duration
	at     time.Duration // when it was begun: an answer may come before its writing returns
	frames int           // how many items there were
	charge int           // and what was charged for them
}

// written notes how the writing of j went.
func (s *Socket) written(j *job, err error) {
	if err != nil {
		s.stats().dropped.Add(uint64(j.frames)) // as far as anybody knows
		s.writeFailed(err)
	}
}

// next accounts for the job that was done and puts the next into its place;
// false: there is none, and the writer has stopped.
func (s *Socket) next(j *job) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.doneWith(j) {
		return false
	}
	s.writingAt = s.offset(time.Now())
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
	j.frames = len(j.items)
	for _, it := range j.items {
		j.charge += it.charge
	}
	return true
}

// more accounts for the job that was done; false: there is nothing left to
// write, and the writer has stopped.
func (s *Socket) more(j *job) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.doneWith(j)
}

// doneWith is more for callers that hold mu.
func (s *Socket) doneWith(j *job) bool {
	s.account(j)
	clear(j.items)
	*j = job{items: j.items[:0]}
	s.writing, s.writingAt = s.toWrite(), 0
	return s.writing
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
	case j.frames > 0:
		s.bytes.Add(-int64(j.charge))
		s.flushed = s.ending != nil && s.ending.flushes()
		s.kickWorker()
	case j.due == duePing:
		s.pingAt = j.at
	case j.end != nil && !s.done && !s.hurried: // the peer's turn
		s.flushed = false
		s.armCut()
	}
}

// deadline returns until when what is being written now may take; zero: there
// is no limit.
func (s *Socket) deadline() time.Time {
	if s.cfg.WriteTimeout > 0 {
		return time.Now().Add(s.cfg.WriteTimeout)
	}
	return time.Time{}
}

// buffers are those in which frames are put together.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// release gives a buffer back, unless it has become large.
func release(buf *[]byte) {
	if cap(*buf) <= 4*togetherBytes {
		buffers.Put(buf)
	}
}

// writeJob writes j to the network. No lock is held.
func (s *Socket) writeJob(j *job) error {
	if s.gate == nil {
		switch {
		case len(j.items) == 1 && j.items[0].large():
			return s.writeLarge(j.items[0])
		case j.end != nil: // unless the websocket package has sent one
			return s.conn.WriteControl(websocket.CloseMessage, j.end.closeMessage(), s.deadline())
		}
	}
	if pieces := j.pieces(); pieces != nil {
		return s.writeBytes(pieces)
	}
	buf := buffers.Get().(*[]byte)
	defer release(buf)
	if err := j.encode(buf); err != nil {
		return err
	}
	return s.writeBytes(net.Buffers{*buf})
}

// pieces returns what is to go over the network where most of it is shared with
// other sockets: to put it together would take its memory for each of them. Nil:
// it is not.
func (j *job) pieces() net.Buffers {
	if len(j.items) != 1 || j.items[0].frame == nil {
		return nil
	}
	return j.items[0].frame.Pieces()
}

// encode puts into buf what is to go over the network, with one call of the
// system: for most of what is sent that call is what sending costs. It is framed
// here and goes past the websocket package, which writes one by one. What was
// encoded is let go of: the frames may be the last of an older state.
func (j *job) encode(buf *[]byte) error {
	dst := (*buf)[:0]
	switch {
	case len(j.items) > 0:
		for _, it := range j.items {
			dst = it.append(dst)
		}
		clear(j.items)
		j.items = j.items[:0]
	case j.end != nil:
		dst = wire.AppendMessage(dst, websocket.CloseMessage, j.end.closeMessage())
	case j.due == duePong:
		dst = wire.AppendMessage(dst, websocket.PongMessage, j.pong)
	case j.due == dueLatencyRequest:
		dst = wire.LatencyRequest().AppendMessage(dst)
	case j.due == dueLatency:
		f, err := wire.Push(wire.PushLatency, j.rtt.Milliseconds())
		if err != nil {
			return err
		}
		dst = f.AppendMessage(dst)
	default:
		dst = wire.Ping().AppendMessage(dst)
	}
	*buf = dst
	return nil
}

// writeBytes writes to the network, and waits for it. Where the connection was
// upgraded by somebody else, the websocket package may be writing a close frame
// of its own just then, when it meets a frame that it refuses: writes of a
// network connection do not mix.
func (s *Socket) writeBytes(data net.Buffers) error {
	conn, deadline := s.netConn(), s.deadline()
	_ = conn.SetWriteDeadline(deadline) // an error shows at the write
	_, err := data.WriteTo(conn)
	if s.gate != nil {
		_ = conn.SetWriteDeadline(time.Time{}) // once it is over, no flusher could write any more
		return err
	}
	if network := net.Error(nil); errors.As(err, &network) && network.Timeout() && time.Now().Before(deadline) {
		// The websocket package has set a deadline of its own.
		return websocket.ErrCloseSent
	}
	return err
}

// netConn returns the network connection itself.
func (s *Socket) netConn() net.Conn {
	if s.gate != nil {
		return s.gate.Conn
	}
	return s.conn.NetConn()
}

// writeLarge writes a frame by itself through the websocket package, which
// compresses it where that was agreed on, by whoever upgraded the connection.
// Small frames are never compressed: that is each sender's choice, and there is
// little to gain.
func (s *Socket) writeLarge(it *item) error {
	_ = s.conn.SetWriteDeadline(s.deadline()) // never fails
	switch {
	case it.foreign != nil:
		return s.conn.WriteMessage(it.foreign.kind, it.foreign.data)
	case it.update == nil:
		return it.frame.Write(s.conn)
	}
	p, err := it.frame.Prepared() // other connections are sent it too
	if err != nil {
		return err
	}
	return s.conn.WritePreparedMessage(p)
}
