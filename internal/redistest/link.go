package redistest

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	chunkSize = 32 << 10
	// chunksHeld is how many reads a direction takes in while it passes
	// nothing on. After that its sender has to wait.
	chunksHeld = 4096
)

// link is one connection through a proxy.
type link struct {
	proxy  *ProxyServer
	client *net.TCPConn
	ctx    context.Context // done once it was reset
	cancel context.CancelFunc
	halved atomic.Uint32 // a half per direction that HalfOpen has taken away

	mu     sync.Mutex   // guards server
	server *net.TCPConn // nil: not connected
}

func newLink(p *ProxyServer, client net.Conn) *link {
	l := &link{proxy: p, client: client.(*net.TCPConn)}
	l.ctx, l.cancel = context.WithCancel(context.Background()) // a lifetime begins
	return l
}

// serve passes on both directions until both have ended.
func (l *link) serve() {
	defer l.proxy.remove(l)
	defer l.reset()
	server, err := l.connect()
	if err != nil {
		if n, _ := l.proxy.state(); n.swallows == both { // not even a refusal comes out of it
			<-l.ctx.Done()
		}
		return
	}
	var wg sync.WaitGroup
	for _, d := range []*direction{
		{link: l, from: l.client, to: server, half: Requests},
		{link: l, from: server, to: l.client, half: Replies},
	} {
		chunks := make(chan chunk, chunksHeld)
		wg.Go(func() { d.receive(chunks) })
		wg.Go(func() { d.deliver(chunks) })
	}
	wg.Wait()
}

func (l *link) connect() (*net.TCPConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(l.ctx, "tcp", l.proxy.target)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.ctx.Err(); err != nil { // reset has been here
		_ = conn.Close()
		return nil, err
	}
	l.server = conn.(*net.TCPConn)
	return l.server, nil
}

// lacks reports whether HalfOpen has taken that direction away.
func (l *link) lacks(h Half) bool { return Half(l.halved.Load())&h != 0 }

// reset ends the link such that both ends see a reset, and loses what is under
// way.
func (l *link) reset() {
	l.cancel()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range []*net.TCPConn{l.client, l.server} {
		if c != nil {
			_ = c.SetLinger(0) // either fails only where it is closed
			_ = c.Close()
		}
	}
}

// direction is one half of a link. What it has taken in is delivered even when
// its sender has gone since.
type direction struct {
	link     *link
	from, to *net.TCPConn
	half     Half
	lost     bool // something was swallowed: nothing more gets through
}

// chunk is something on its way. No data: the sender has closed.
type chunk struct {
	data []byte
	at   time.Time
}

// receive takes in what is sent until the sender closes.
func (d *direction) receive(out chan<- chunk) {
	defer close(out)
	put := func(data []byte) bool {
		select {
		case out <- chunk{data: data, at: time.Now()}:
			return true
		case <-d.link.ctx.Done():
			return false
		}
	}
	for {
		buf := make([]byte, chunkSize)
		n, err := d.from.Read(buf)
		if n > 0 && !put(buf[:n]) {
			return
		}
		if err != nil {
			put(nil)
			return
		}
	}
}

// deliver passes on what was taken in, as the network lets it.
func (d *direction) deliver(in <-chan chunk) {
	for c := range in {
		n, ok := d.wait(c.at)
		if !ok {
			return
		}
		if n.swallows&d.half != 0 || d.link.lacks(d.half) {
			d.lost = true
		}
		switch {
		case d.lost:
		case c.data == nil:
			_ = d.to.CloseWrite() // fails only where the receiver has gone
		default:
			if _, err := d.to.Write(c.data); err != nil {
				d.lost = true // the receiver has gone
			}
		}
	}
}

// wait waits until what was taken in then may go on, and returns what else is
// wrong with the network. It reports false if the link was reset.
func (d *direction) wait(at time.Time) (network, bool) {
	for {
		n, changed := d.link.proxy.state()
		left := time.Until(at.Add(n.delay))
		if !n.stall && left <= 0 {
			return n, d.link.ctx.Err() == nil
		}
		var due <-chan time.Time
		if !n.stall {
			due = time.After(left)
		}
		select {
		case <-due:
		case <-changed:
		case <-d.link.ctx.Done():
			return n, false
		}
	}
}
