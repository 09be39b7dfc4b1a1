package meshtest

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
)

// host is the host in URLs. No port is open there.
const host = "127.0.0.1"

// firstPort is the first of the ports that clients seem to come from.
const firstPort = 49152

// network is a [net.Listener] in memory, with the function that dials it.
type network struct {
	arrivals chan net.Conn
	quit     chan struct{} // closed by Close

	mu     sync.Mutex // guards the fields below
	closed bool
	down   bool // refuses connections, like a host that does not run
	port   int
	conns  map[*memConn]struct{} // the server's ends
}

func newNetwork() *network {
	return &network{
		arrivals: make(chan net.Conn),
		quit:     make(chan struct{}),
		port:     firstPort,
		conns:    make(map[*memConn]struct{}),
	}
}

// dial connects. It waits for Accept until ctx ends.
func (n *network) dial(ctx context.Context) (*memConn, error) {
	near, far, err := n.connect()
	if err != nil {
		return nil, err
	}
	select {
	case n.arrivals <- far:
		return near, nil
	case <-n.quit:
		err = refused()
	case <-ctx.Done():
		err = ctx.Err()
	}
	far.abort()
	return nil, err
}

// connect makes a connection and registers it for drop.
func (n *network) connect() (near, far *memConn, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.down {
		return nil, nil, refused()
	}
	ip := net.IPv4(127, 0, 0, 1)
	near, far = socketPipe(&net.TCPAddr{IP: ip, Port: n.port}, &net.TCPAddr{IP: ip, Port: 80})
	if n.port++; n.port > 65535 {
		n.port = firstPort
	}
	far.onClose = func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.conns, far)
	}
	n.conns[far] = struct{}{}
	return near, far, nil
}

// fail refuses new connections from now on and breaks the existing ones.
func (n *network) fail() {
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	n.drop()
}

// drop breaks all connections, as a reset does.
func (n *network) drop() {
	n.mu.Lock()
	conns := slices.Collect(maps.Keys(n.conns))
	n.mu.Unlock()
	for _, c := range conns {
		c.abort()
	}
}

// Accept implements [net.Listener].
func (n *network) Accept() (net.Conn, error) {
	select {
	case c := <-n.arrivals:
		return c, nil
	case <-n.quit:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener]. Connections stay.
func (n *network) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.closed {
		n.closed = true
		close(n.quit)
	}
	return nil
}

// Addr implements [net.Listener].
func (n *network) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 80} }
