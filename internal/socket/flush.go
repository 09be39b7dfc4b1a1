package socket

import (
	"net"
	"runtime"
	"sync"
)

// flushers write the queues of the sockets of a group, one socket after the other. They
// are a few goroutines that exist only while there is something to write. They write only
// as much as the network accepts without waiting. If a write would have to wait, a writer
// of the socket's own does it, so that a slow peer does not delay the others. So one
// state for a thousand sockets needs no thousand goroutines. Frames that come while all
// flushers are busy are written together.
type flushers struct {
	mu         sync.Mutex // guards the fields below, and behind of the queued sockets
	head, tail *Socket
	n          int // number of goroutines

	running sync.WaitGroup
}

// add queues a socket. The caller has set its writing and counted its writer.
func (f *flushers) add(s *Socket) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.tail != nil {
		f.tail.behind = s
	} else {
		f.head = s
	}
	f.tail = s
	if f.n < runtime.GOMAXPROCS(0) {
		f.n++
		f.running.Go(f.run)
	}
}

// next takes the first socket of the queue. If it returns false, the queue is empty and
// the flusher must stop.
func (f *flushers) next() (*Socket, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.head
	if s == nil {
		f.n--
		return nil, false
	}
	f.head, s.behind = s.behind, nil
	if f.head == nil {
		f.tail = nil
	}
	return s, true
}

// flusher holds the buffers of one of the goroutines.
type flusher struct {
	try *attempt
	job job
	buf *[]byte
}

var flusherPool = sync.Pool{New: func() any {
	return &flusher{try: newAttempt()}
}}

// run writes until the queue is empty.
func (f *flushers) run() {
	fl := flusherPool.Get().(*flusher)
	fl.buf = buffers.Get().(*[]byte)
	for {
		s, ok := f.next()
		if !ok {
			break
		}
		s.flush(fl)
	}
	putBuffer(fl.buf)
	fl.buf = nil
	flusherPool.Put(fl)
}

// flush writes once to a socket, without waiting, and queues it again if there is more.
func (s *Socket) flush(f *flusher) {
	if !s.next(&f.job) {
		s.writer.Done()
		return
	}
	if pieces := f.job.pieces(); pieces != nil { // too long to write without waiting
		s.writeAlone(f, func() error { return s.writeBytes(pieces) })
		return
	}
	err := f.job.encode(f.buf)
	if err == nil {
		var n int
		if n, err = f.try.try(s.gate.raw, *f.buf); err == nil && n < len(*f.buf) {
			buf := f.buf
			f.buf = buffers.Get().(*[]byte)
			s.writeAlone(f, func() error {
				defer putBuffer(buf)
				return s.writeBytes(net.Buffers{(*buf)[n:]})
			})
			return
		}
	}
	if err != nil {
		s.stats().dropped.Add(uint64(f.job.frames))
		s.writeFailed(err)
	}
	if s.more(&f.job) {
		s.group.flushers.add(s)
	} else {
		s.writer.Done()
	}
}

// writeAlone starts a writer of the socket's own for data that the network does not
// accept at once, and for the rest of the queue. It takes over the count of the writer.
func (s *Socket) writeAlone(f *flusher, write func() error) {
	j := f.job
	f.job = job{}
	go func() { // counted: finish waits for it
		defer s.writer.Done()
		s.written(&j, write())
		s.write(&j)
	}()
}
