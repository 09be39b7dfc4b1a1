package harness

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
)

// Lifeline is the network of one server's Redis client. For other servers, cutting it
// has the same effect as killing the server.
type Lifeline struct {
	dial func(ctx context.Context, network, addr string) (net.Conn, error)

	mu    sync.Mutex // guards the fields below
	down  bool
	conns []net.Conn
}

// Mortal starts a server whose connection to Redis can be cut. It is repaired before
// the server is shut down.
func (w *World) Mortal(setup ...func(*mesh.Options)) (*Server, *Lifeline) {
	w.T.Helper()
	l := &Lifeline{dial: (&net.Dialer{}).DialContext}
	c := w.clientOver(l)
	s := w.Server(append([]func(*mesh.Options){func(o *mesh.Options) { o.Redis = c }}, setup...)...)
	w.T.Cleanup(l.Mend)
	return s, l
}

// clientOver returns a client that uses a lifeline.
func (w *World) clientOver(l *Lifeline) redis.UniversalClient {
	w.T.Helper()
	if w.Cluster != nil {
		return w.Cluster.Client(w.T, func(o *redis.ClusterOptions) { o.Dialer = l.connect })
	}
	opts := &redis.Options{}
	if w.Virtual {
		opts = w.Mem.Options()
		l.dial = opts.Dialer
	} else {
		opts.Addr = w.Real.Addr()
	}
	opts.Dialer = l.connect
	c := redis.NewClient(opts)
	w.T.Cleanup(func() { _ = c.Close() })
	return c
}

func (l *Lifeline) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return nil, net.ErrClosed
	}
	c, err := l.dial(ctx, network, addr)
	if err == nil {
		l.conns = append(l.conns, c)
	}
	return c, err
}

func (l *Lifeline) Cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	for _, c := range l.conns {
		_ = c.Close()
	}
	l.conns = nil
}

func (l *Lifeline) Mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = false
}

// Present returns the ids of the members of a room in Redis.
func (s *Server) Present(room string) []string {
	s.W.T.Helper()
	ids, err := s.Presence().PresentConnections(s.W.T.Context(), room)
	require.NoError(s.W.T, err)
	return ids
}

// FallSilent makes a peer send one last frame. It returns the time before and after
// that frame.
func (p *Peer) FallSilent() (before, after time.Time) {
	p.T.Helper()
	p.Mute()
	p.W.Sleep(20 * time.Millisecond) // for a pong in flight
	before = time.Now()
	p.Call("mesh/noop", nil)
	return before, time.Now()
}
