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
	// maxChunks limits the reads that a direction holds while it passes nothing on. Then
	// its sender has to wait.
	maxChunks = 4096
)

// link is one connection through a proxy.
type link struct {
	proxy  *ProxyServer
	client *net.TCPConn
	ctx    context.Context // ends when the link is reset
	cancel context.CancelFunc
	halved atomic.Uint32 // the directions that HalfOpen has removed

	mu     sync.Mutex   // guards server
	server *net.TCPConn // nil: not connected
}

func newLink(p *ProxyServer, client net.Conn) *link {
	l := &link{proxy: p, client: client.(*net.TCPConn)}
	l.ctx, l.cancel = context.WithCancel(context.Background()) // the lifetime of the link
	return l
}

// serve passes data on in both directions until both have ended.
func (l *link) serve() {
	defer l.proxy.remove(l)
	defer l.reset()
	server, err := l.connect()
	if err != nil {
		if n, _ := l.proxy.state(); n.swallows == both { // the client does not even see a refusal
			<-l.ctx.Done()
		}
		return
	}
	var wg sync.WaitGroup
	for _, d := range []*direction{
		{link: l, from: l.client, to: server, half: Requests},
		{link: l, from: server, to: l.client, half: Replies},
	} {
		chunks := make(chan chunk, maxChunks)
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
	if err := l.ctx.Err(); err != nil { // reset has run before
		_ = conn.Close()
		return nil, err
	}
	l.server = conn.(*net.TCPConn)
	return l.server, nil
}

// lacks reports whether HalfOpen has removed that direction.
func (l *link) lacks(h Half) bool { return Half(l.halved.Load())&h != 0 }

// reset ends the link such that both ends see a reset. Data on its way is lost.
func (l *link) reset() {
	l.cancel()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range []*net.TCPConn{l.client, l.server} {
		if c != nil {
			_ = c.SetLinger(0) // both fail only if it is closed
			_ = c.Close()
		}
	}
}

// direction is one half of a link. Data that it has received is delivered even if its
// sender has gone since.
type direction struct {
	link     *link
	from, to *net.TCPConn
	half     Half
	dropped  bool // data was dropped, so nothing more gets through
}

// chunk is data on its way. Without data it means that the sender has closed.
type chunk struct {
	data []byte
	at   time.Time
}

// receive receives data until the sender closes.
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

// deliver passes data on, as the network allows.
func (d *direction) deliver(in <-chan chunk) {
	for c := range in {
		n, ok := d.wait(c.at)
		if !ok {
			return
		}
		if n.swallows&d.half != 0 || d.link.lacks(d.half) {
			d.dropped = true
		}
		switch {
		case d.dropped:
		case c.data == nil:
			_ = d.to.CloseWrite() // fails only if the receiver has gone
		default:
			if _, err := d.to.Write(c.data); err != nil {
				d.dropped = true // the receiver has gone
			}
		}
	}
}

// wait waits until data received at that time may be passed on, and returns the other
// faults of the network. It returns false if the link was reset.
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
