package redistest

import (
	"net"
	"sync"
	"testing"
	"time"
)

// ProxyServer is a TCP proxy whose network can be made to fail. Its methods are safe for
// concurrent use. They affect the data of all connections that has not been passed on
// yet.
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

// network holds the faults of the proxy's network.
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
	Requests Half = 1 << iota // data from clients
	Replies                   // data from the target, including published messages

	both = Requests | Replies
)

// Proxy starts a proxy to target (host:port) on a free port of 127.0.0.1, and stops it
// when the test is over. The target need not run yet.
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

// Connections returns the number of connections through the proxy.
func (p *ProxyServer) Connections() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.links)
}

// Cut resets all connections and refuses new ones until Heal: they are reset at once.
func (p *ProxyServer) Cut() {
	p.change(func(n *network) { n.cut = true })
	p.CutOnce()
}

// CutOnce resets all connections. Clients may connect again.
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

// BlackHole makes the network drop everything both ways, without an error. Connections
// are accepted and stay open. When it ends, a connection that lost data stays dead, like
// one that a firewall has forgotten.
func (p *ProxyServer) BlackHole(on bool) { p.swallow(both, on) }

// DropRequests makes the network drop data from clients. The target still publishes to
// subscribers. When it ends, a connection that lost data still drops all data from its
// client.
func (p *ProxyServer) DropRequests(on bool) { p.swallow(Requests, on) }

// DropReplies makes the network drop data from the target. Requests are executed, but
// their answers are lost. When it ends, a connection that lost data still drops all data
// from the target.
func (p *ProxyServer) DropReplies(on bool) { p.swallow(Replies, on) }

func (p *ProxyServer) swallow(h Half, on bool) {
	p.change(func(n *network) {
		n.swallows &^= h
		if on {
			n.swallows |= h
		}
	})
}

// HalfOpen removes directions from every existing connection: data in that direction is
// dropped, and neither end gets an error. New connections are not affected. This happens
// if a device on the way has forgotten its connections, or one end has vanished.
func (p *ProxyServer) HalfOpen(h Half) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		l.halved.Or(uint32(h))
	}
}

// Stall makes the network hold all data back. When it ends, the data is delivered,
// including data of clients that have disconnected.
func (p *ProxyServer) Stall(on bool) { p.change(func(n *network) { n.stall = on }) }

// Delay makes all data take d longer, each way. Zero ends it.
func (p *ProxyServer) Delay(d time.Duration) { p.change(func(n *network) { n.delay = d }) }

// Heal ends the effects of Cut, BlackHole, DropRequests, DropReplies, Stall and Delay.
// The effect of HalfOpen on connections stays.
func (p *ProxyServer) Heal() { p.change(func(n *network) { *n = network{} }) }

func (p *ProxyServer) change(f func(*network)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.net)
	close(p.changed)
	p.changed = make(chan struct{})
}

// state returns the current faults, and a channel that is closed when they change.
func (p *ProxyServer) state() (network, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.net, p.changed
}

func (p *ProxyServer) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	_ = p.listener.Close() // it ends accept, even with an error
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
