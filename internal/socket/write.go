package socket

import (
	"errors"
	"net"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"github.com/meshpresence/mesh/internal/wire"
)

// writeRequest is a set of frames to write before the queue. They are not in the queue.
// Of each kind at most one waits, however long the writer is stuck.
type writeRequest uint8

const (
	duePong           writeRequest = 1 << iota // WebSocket's own, answers the peer's ping
	duePing                                    // counts for missed pongs
	dueExtraPing                               // does not count
	dueLatencyRequest                          // asks for a latency response
	dueLatency                                 // has the round trip time
)

// PingNow sends a ping in addition to the regular ones. Before Run it does nothing.
func (s *Socket) PingNow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.request(dueExtraPing)
}

// request queues the frames of d before the queue, unless the connection ends. The caller
// holds mu.
func (s *Socket) request(d writeRequest) {
	if s.running && s.ending == nil {
		s.due |= d
		s.kickWriter()
	}
}

// giveUpWriting stops the writer for good.
func (s *Socket) giveUpWriting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = true
	s.dropQueue()
}

// kickWriter starts the writer if there is something to write and no writer runs. The
// caller holds mu. Once ending is set and the writer has stopped, only updates that wait
// for a pause may be left to write. finish drops them, and can then wait for the writer.
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

// toWrite reports whether there is something to write now. A close frame waits for frames
// that were queued before it. The caller holds mu.
func (s *Socket) toWrite() bool {
	return !s.broken && (s.due != 0 || s.queue.head != nil || s.ending != nil && !s.closeSent && !s.holding())
}

// job holds the frames of one write.
type job struct {
	due    writeRequest // one of them, or
	items  []*item      // frames of the queue, until they have been encoded, or
	pause  *pause       // begins when the items, the answer to a subscribe request, have been written
	end    *End         // a close frame
	pong   []byte       // with duePong
	rtt    time.Duration
	at     time.Duration // when it was begun; an answer may come before its write returns
	frames int           // number of items
	charge int           // charge of the items
	answer int           // charge of the answers among them
}

// written handles the result of writing j.
func (s *Socket) written(j *job, err error) {
	if err != nil {
		s.stats().dropped.Add(uint64(j.frames)) // assume that none arrived
		s.writeFailed(err)
	}
}

// next accounts for the job that was done and replaces it by the next one. If it returns
// false, there is none, and the writer must stop.
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
	} else if j.items = s.queue.take(j.items, s.batchSize(), s.firstAnswer()); len(j.items) == 0 {
		s.closeSent = true
		j.end = s.ending
	}
	j.pause = s.takeAnswer(j.items)
	j.frames = len(j.items)
	for _, it := range j.items {
		j.charge += int(it.charge)
		if it.answer {
			j.answer += int(it.charge)
		}
	}
	return true
}

// more accounts for the job that was done. If it returns false, nothing is left to write,
// and the writer must stop.
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

// batchSize returns the largest number of bytes to write together. It is a small part of
// the queue limit, because frames that are being written do not coalesce any more.
func (s *Socket) batchSize() int {
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
		s.answers -= j.answer
		s.flushed = s.ending != nil && s.ending.flushes()
		if p := j.pause; p != nil && s.pauseOf(p.room) == p {
			s.group.pauses.add(p)
		}
		s.grantSlots()
		s.proceed(false)
	case j.due == duePing:
		s.pingAt = j.at
	case j.end != nil && !s.done && !s.graceOver: // the peer must answer now
		s.flushed = false
		s.armCut()
	}
}

// deadline returns the deadline of a write that begins now. Zero means no limit.
func (s *Socket) deadline() time.Time {
	if s.cfg.WriteTimeout > 0 {
		return time.Now().Add(s.cfg.WriteTimeout)
	}
	return time.Time{}
}

// buffers holds buffers for encoding frames.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// putBuffer returns a buffer to the pool, unless it has become large.
func putBuffer(buf *[]byte) {
	if cap(*buf) <= 4*togetherBytes {
		buffers.Put(buf)
	}
}

// writeJob writes j to the network. It holds no lock.
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
	defer putBuffer(buf)
	if err := j.encode(buf); err != nil {
		return err
	}
	return s.writeBytes(net.Buffers{*buf})
}

// pieces returns the parts of a frame if other sockets share most of it. Joining the
// parts would take its memory for each socket. Otherwise it returns nil.
func (j *job) pieces() net.Buffers {
	if len(j.items) != 1 || j.items[0].frame == nil {
		return nil
	}
	return j.items[0].frame.Pieces()
}

// encode encodes j into buf, so that one system call can write it, because system calls
// are most of the cost of sending. It frames the messages itself, because the websocket
// package writes them one by one. It drops its references to the encoded frames, which
// may be the last ones to an older state.
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

// writeBytes writes to the network, and waits for it. If the connection was upgraded
// elsewhere, the websocket package may be writing a close frame of its own at the same
// time, because it rejected a frame. Writes of a network connection do not mix.
func (s *Socket) writeBytes(data net.Buffers) error {
	conn, deadline := s.netConn(), s.deadline()
	_ = conn.SetWriteDeadline(deadline) // an error shows at the write
	_, err := data.WriteTo(conn)
	if s.gate != nil {
		_ = conn.SetWriteDeadline(time.Time{}) // once it has passed, no flusher could write any more
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

// writeLarge writes a frame by itself through the websocket package. That package
// compresses it if the code that upgraded the connection agreed on compression. Small
// frames are never compressed. That is allowed, and there is little to gain.
func (s *Socket) writeLarge(it *item) error {
	_ = s.conn.SetWriteDeadline(s.deadline()) // never fails
	switch {
	case it.message != nil:
		return s.conn.WriteMessage(it.message.kind, it.message.data)
	case it.update == nil:
		return it.frame.Write(s.conn)
	}
	p, err := it.frame.Prepared() // other connections get it too
	if err != nil {
		return err
	}
	return s.conn.WritePreparedMessage(p)
}
