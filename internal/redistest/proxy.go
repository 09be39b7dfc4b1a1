package redistest

import (
	"net"
	"sync"
	"testing"
	"time"
)

// ProxyServer is a TCP proxy whose network can be made to misbehave. Its
// methods may be called from any goroutine; each takes effect for what has not
// been passed on yet, of all connections.
type ProxyServer struct {
	target   string
	listener net.Listener
	wg       sync.WaitGroup // all its goroutines

	// mu guards the fields below.
	mu      sync.Mutex
	closed  bool
	net     network
	changed chan struct{} // closed and replaced whenever net changes
	links   map[*link]struct{}
}

// network is what is wrong with the proxy's network.
type network struct {
	cut      bool
	stall    bool
	swallows Half
	delay    time.Duration // each way
}

// Half is one direction of a connection, or both.
type Half uint32

// The directions.
const (
	Requests Half = 1 << iota // what clients send
	Replies                   // what the target sends: also what it publishes

	both = Requests | Replies
)

// Proxy starts a proxy to target (host:port) on a free port of 127.0.0.1, and
// stops it when the test is over. The target need not be there yet.
func Proxy(t testing.TB, target string) *ProxyServer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("redistest: proxy: %v", err)
	}
	p := &ProxyServer{target: target, listener: l, changed: make(chan struct{}), links: map[*link]struct{}{}}
	p.wg.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// Addr returns the address to connect to instead of the target's.
func (p *ProxyServer) Addr() string { return p.listener.Addr().String() }

// Connections returns how many connections go through the proxy now.
func (p *ProxyServer) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Cut resets all connections and refuses new ones until Heal: they are reset
// as soon as they are made.
func (p *ProxyServer) Cut() {
	p.change(func(n *network) { n.cut = true })
	p.CutOnce()
}

// CutOnce resets all connections; clients may connect again.
func (p *ProxyServer) CutOnce() {
	p.mu.Lock()
	links := make([]*link, 0, len(p.links))
	for l := range p.links {
		links = append(links, l)
	}
	p.mu.Unlock()
	for _, l := range links {
		l.reset()
	}
}

// BlackHole makes the network swallow everything both ways, and tell nobody:
// connections are accepted and stay open. When it ends, a connection that lost
// something stays dead, as one that a firewall has forgotten does.
func (p *ProxyServer) BlackHole(on bool) { p.swallow(both, on) }

// DropRequests makes the network swallow what clients send: the target goes on
// publishing to who has subscribed. When it ends, a connection that lost
// something stays mute.
func (p *ProxyServer) DropRequests(on bool) { p.swallow(Requests, on) }

// DropReplies makes the network swallow what the target sends: requests are
// executed, and nobody learns of it. When it ends, a connection that lost
// something stays deaf.
func (p *ProxyServer) DropReplies(on bool) { p.swallow(Replies, on) }

func (p *ProxyServer) swallow(h Half, on bool) {
	p.change(func(n *network) {
		n.swallows &^= h
		if on {
			n.swallows |= h
		}
	})
}

// HalfOpen takes directions away from every connection that there is now: what
// goes that way is swallowed, and neither end sees anything of it. New
// connections are whole. So it is where a box in between has forgotten its
// connections, or one end has gone without a word.
func (p *ProxyServer) HalfOpen(h Half) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.halved.Or(uint32(h))
	}
}

// Stall makes the network hold everything back, and deliver it when that ends:
// also what was sent by a client that has given up and gone.
func (p *ProxyServer) Stall(on bool) { p.change(func(n *network) { n.stall = on }) }

// Delay makes everything take d longer, each way; 0 ends it.
func (p *ProxyServer) Delay(d time.Duration) { p.change(func(n *network) { n.delay = d }) }

// Heal ends whatever Cut, BlackHole, DropRequests, DropReplies, Stall and Delay
// began. What HalfOpen did to connections stays done.
func (p *ProxyServer) Heal() { p.change(func(n *network) { *n = network{} }) }

func (p *ProxyServer) change(f func(*network)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.net)
	close(p.changed)
	p.changed = make(chan struct{})
}

// state returns what is wrong now, and a channel that is closed when that
// changes.
func (p *ProxyServer) state() (network, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.net, p.changed
}

func (p *ProxyServer) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	_ = p.listener.Close() // it ends accept, whatever it says
	p.CutOnce()
	p.wg.Wait()
}

func (p *ProxyServer) accept() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			return
		}
		l := newLink(p, conn)
		if p.add(l) {
			p.wg.Go(l.serve)
		} else {
			l.reset()
		}
	}
}

func (p *ProxyServer) add(l *link) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.net.cut {
		return false
	}
	p.links[l] = struct{}{}
	return true
}

func (p *ProxyServer) remove(l *link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.links, l)
}
