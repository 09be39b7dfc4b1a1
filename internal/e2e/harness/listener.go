package harness

import (
	"context"
	"net"
	"sync"
)

// PipeListener is a net.Listener in memory.
type PipeListener struct {
	Pair  func() (client, server net.Conn) // makes a connection
	conns chan net.Conn
	once  sync.Once
	quit  chan struct{}
}

func NewPipeListener() *PipeListener {
	return &PipeListener{Pair: net.Pipe, conns: make(chan net.Conn), quit: make(chan struct{})}
}

func (l *PipeListener) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := l.Pair()
	select {
	case l.conns <- server:
		return client, nil
	case <-l.quit:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *PipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.quit:
		return nil, net.ErrClosed
	}
}

func (l *PipeListener) Close() error {
	l.once.Do(func() { close(l.quit) })
	return nil
}

func (l *PipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
