package sim

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"
)

// simLink is the network between a server and Redis, with faults.
type simLink struct {
	s   *sim
	rng *rand.Rand // guarded by mu

	mu    sync.Mutex    // guards the fields below
	cut   bool          // no data passes, and dials fail
	hung  chan struct{} // closed when the link works again; nil if it does not hang
	conns map[*simWire]struct{}
	lose  int           // number of script calls that run, but whose replies are lost with the connection
	hold  time.Duration // a proxy holds the next batch with a holdOp for this time, whatever happens to the connection
	loss  float64       // fraction of messages that are dropped, doubled or overtaken

	refuse   string  // error for all writes; "" if Redis accepts them
	holdOp   string  // a store.OpKind
	hintLoss float64 // fraction of expired events that are dropped, doubled or seconds late
}

var errSimRefused = errors.New("simulation: connection refused")

// dial fails at once if the link hangs: the Redis client holds a mutex while it
// connects, and virtual time stands still while goroutines wait for it. For the same
// reason the handshake passes without delay, and writing never blocks.
func (l *simLink) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut || l.hung != nil || l.s.ended() {
		return nil, errSimRefused
	}
	far, err := l.s.mem.Dial()
	if err != nil {
		return nil, err
	}
	client, near := net.Pipe()
	w := &simWire{l: l, near: near, far: far, sent: make(chan []byte, 4096)}
	l.conns[w] = struct{}{}
	l.s.pumps.Go(w.collect)
	l.s.pumps.Go(w.requests)
	l.s.pumps.Go(w.replies)
	return client, ctx.Err()
}

// set cuts, hangs or repairs the link, and sets the error for writes.
func (l *simLink) set(cut, hang bool, refuse string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut, l.refuse = cut, refuse
	switch {
	case hang && l.hung == nil:
		l.hung = make(chan struct{})
	case !hang && l.hung != nil:
		close(l.hung)
		l.hung = nil
	}
	if cut {
		l.reset()
	}
}

// setHold makes a proxy hold the next batch with an op of this kind.
func (l *simLink) setHold(d time.Duration, op string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hold, l.holdOp = d, op
}

// reset closes all connections, except for those with a held batch. l.mu is held.
func (l *simLink) reset() {
	for w := range l.conns {
		_ = w.near.Close()
		if !w.proxied {
			_ = w.far.Close()
		}
	}
}

func (l *simLink) flap() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reset()
}

// await waits while the link hangs. It returns false if the simulation is over.
func (l *simLink) await() bool {
	for {
		l.mu.Lock()
		hung := l.hung
		l.mu.Unlock()
		if hung == nil {
			return !l.s.ended()
		}
		select {
		case <-hung:
		case <-l.s.over:
			return false
		}
	}
}

func (l *simLink) lossy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.loss > 0
}

func (l *simLink) lag(most time.Duration) {
	l.mu.Lock()
	d := time.Duration(l.rng.Int64N(int64(most)))
	l.mu.Unlock()
	time.Sleep(d)
}

// simWire is one connection of a link.
type simWire struct {
	l         *simLink
	near, far net.Conn
	sent      chan []byte // data that the client wrote

	// Guarded by simLink.mu.
	proxied bool // a batch is held
	script  bool // the last request was a script
	asked   int  // number of requests
	ready   bool // the last request did not belong to the handshake
}

func (w *simWire) collect() {
	defer close(w.sent)
	buf := make([]byte, 256<<10)
	for {
		n, err := w.near.Read(buf)
		if n > 0 {
			w.sent <- bytes.Clone(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

func (w *simWire) requests() {
	defer w.end()
	for request := range w.sent {
		script := isScript(request)
		if !w.delay(request, script) {
			return
		}
		if answer := w.l.refused(request, script); answer != nil {
			if _, err := w.near.Write(answer); err != nil {
				return
			}
		} else if !w.write(request) {
			return
		}
	}
}

func isScript(request []byte) bool {
	return bytes.Contains(request, []byte("evalsha")) || bytes.Contains(request, []byte("eval\r"))
}

func (w *simWire) write(data []byte) bool {
	_, err := w.far.Write(data)
	return err == nil
}

// delay delays a request. It returns false if the request is lost.
func (w *simWire) delay(request []byte, script bool) bool {
	l := w.l
	l.mu.Lock()
	hold := time.Duration(0)
	if l.hold > 0 && script && bytes.Contains(request, []byte("\r\n"+l.holdOp+"\r\n")) {
		hold, l.hold, w.proxied = l.hold, 0, true
	}
	w.script = script
	w.asked++
	handshake := w.asked <= 3 && !script && !bytes.Contains(request[:min(64, len(request))], []byte("subscribe"))
	w.ready = !handshake
	l.mu.Unlock()
	if handshake {
		return true
	}
	if hold > 0 {
		l.s.note("held a write for %v", hold)
		select {
		case <-time.After(hold):
		case <-l.s.over:
			return false
		}
		l.s.note("the held write is delivered")
		return true
	}
	l.lag(2 * time.Millisecond)
	return l.await()
}

func (w *simWire) replies() {
	defer w.end()
	var buf []byte
	part := make([]byte, 64<<10)
	for {
		n, err := w.far.Read(part)
		buf = append(buf, part[:n]...)
		for {
			size := respSize(buf)
			if size == 0 {
				break
			}
			if !w.deliver(bytes.Clone(buf[:size])) {
				return
			}
			buf = buf[size:]
		}
		if err != nil {
			return
		}
	}
}

// deliver passes a reply or message on. It returns false if the connection is over.
func (w *simWire) deliver(data []byte) bool {
	l := w.l
	l.mu.Lock()
	ready := w.ready
	l.mu.Unlock()
	if ready {
		l.lag(2 * time.Millisecond)
		if !l.await() {
			return false
		}
	}
	message := isMessage(data)
	l.mu.Lock()
	lose := !message && w.script && l.lose > 0
	if lose {
		l.lose--
	}
	fate := 1.0
	if message && l.loss > 0 {
		fate = l.rng.Float64() / l.loss
	}
	late := time.Duration(1+l.rng.IntN(200)) * time.Millisecond
	if message && l.hintLoss > 0 && bytes.Contains(data, []byte("__keyevent@")) {
		fate = l.rng.Float64() / l.hintLoss
		late = time.Duration(1+l.rng.IntN(5000)) * time.Millisecond
	}
	l.mu.Unlock()
	switch {
	case lose:
		l.s.note("a reply is lost")
		return false
	case fate < 0.5: // dropped
		return true
	case fate < 0.7: // overtaken
		l.s.pumps.Go(func() {
			time.Sleep(late)
			_, _ = w.near.Write(data)
		})
		return true
	case fate < 1: // doubled
		data = append(data, data...)
	}
	_, err := w.near.Write(data)
	return err == nil
}

func (w *simWire) end() {
	w.l.mu.Lock()
	proxied := w.proxied
	delete(w.l.conns, w)
	w.l.mu.Unlock()
	_ = w.near.Close()
	if !proxied || w.l.s.ended() {
		_ = w.far.Close()
		return
	}
	// The held batch still arrives. The goroutine of the requests closes the connection
	// after that.
	w.l.mu.Lock()
	w.proxied = false
	w.l.mu.Unlock()
}

// isMessage reports whether a frame is a published message.
func isMessage(frame []byte) bool {
	return len(frame) > 4 && (frame[0] == '>' || frame[0] == '*') && bytes.HasPrefix(frame[4:], []byte("$7\r\nmessage\r\n"))
}

// respSize returns the size of the first complete value in b, or 0.
func respSize(b []byte) int {
	end := bytes.Index(b, []byte("\r\n"))
	if end < 0 {
		return 0
	}
	size := end + 2
	n, err := strconv.Atoi(string(b[1:end]))
	if err != nil || n < 0 {
		return size
	}
	switch b[0] {
	case '$', '=', '!':
		if size += n + 2; size > len(b) {
			return 0
		}
	case '%', '|':
		n *= 2
		fallthrough
	case '*', '>', '~':
		for range n {
			part := respSize(b[size:])
			if part == 0 {
				return 0
			}
			size += part
		}
	}
	return size
}
