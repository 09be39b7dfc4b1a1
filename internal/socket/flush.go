package socket

import (
	"net"
	"runtime"
	"sync"
)

// flushers write what is queued on the sockets of a group, in turn: a few
// goroutines that exist only while there is something to write. A socket that
// takes what it is given without waiting is written to by them; what would have
// to wait is handed to a writer of the socket's own, so that a slow peer holds up
// nobody. One state told to a thousand sockets so costs no thousand goroutines,
// and what comes while all flushers are busy goes out with the rest.
type flushers struct {
	mu         sync.Mutex // guards the fields below, and behind of the sockets in line
	head, tail *Socket
	n          int // goroutines

	running sync.WaitGroup
}

// add puts a socket in line. Its writing is set, and its writer counted.
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

// next takes the first socket of the line; false: there is none, and the
// flusher has stopped.
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

// flusher is what one of the goroutines works with.
type flusher struct {
	try *attempt
	job job
	buf *[]byte
}

var flusherPool = sync.Pool{New: func() any {
	return &flusher{try: newAttempt()}
}}

// run writes until there is nothing left to.
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
	release(fl.buf)
	fl.buf = nil
	flusherPool.Put(fl)
}

// flush writes once to a socket, without waiting, and puts it in line again if
// there is more.
func (s *Socket) flush(f *flusher) {
	if !s.next(&f.job) {
		s.writer.Done()
		return
	}
	if pieces := f.job.pieces(); pieces != nil { // long: it would have to wait
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
				defer release(buf)
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

// writeAlone has a writer of the socket's own write what the network does not
// take at once, and then the rest of the queue. It is the writer that was
// counted.
func (s *Socket) writeAlone(f *flusher, write func() error) {
	j := f.job
	f.job = job{}
	go func() { // counted: finish waits for it
		defer s.writer.Done()
		s.written(&j, write())
		s.write(&j)
	}()
}
