package meshtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// startTime limits the start of a part of a server.
	startTime = 30 * time.Second
	// stopTime limits the shutdown of a part, and the wait for handlers.
	stopTime = 10 * time.Second
	// killedStopTime limits the shutdown of a killed server. It cannot reach its Redis, so
	// waiting is of no use.
	killedStopTime = 250 * time.Millisecond
)

// Lifecycle is a part that must be started before it serves and shut down afterwards: a
// [github.com/meshpresence/mesh.Server], or any type of the app with these two methods.
type Lifecycle interface {
	Start(ctx context.Context) error
	Shutdown(ctx context.Context) error
}

// Server serves a handler over connections in memory. It opens no port and works in a
// synctest bubble. Its methods are safe for concurrent use. See [Client] for methods that
// fail a test.
type Server struct {
	tb      TB
	parts   []Lifecycle
	network *network
	http    *http.Server
	web     *http.Client
	served  chan struct{} // closed when http.Serve has returned
	done    chan struct{} // closed when Close has finished
	err     error         // of Close; set before done is closed

	mu      sync.Mutex // guards the fields below
	closing bool
	killed  bool
	running int           // calls of the handler
	idle    chan struct{} // closed when running becomes 0 after closing
	clients map[*Client]struct{}
}

// StartServer starts a server and serves it to clients in memory. The server is shut down
// when the test is over. An error in the shutdown fails the test, so heal the Redis
// before if it was cut or hung.
//
// h is the handler that the app mounts: a *mesh.Server alone, or a mux with the app's
// middleware and a *mesh.Server at some path. If h has the methods of [Lifecycle], as a
// *mesh.Server has, StartServer calls them. It starts h and the parts in this order and
// stops them in reverse. The test must start and shut down any other part by itself.
// Starting a running server again does nothing.
//
//	server := meshtest.StartServer(t, srv)
//	server := meshtest.StartServer(t, mux, srv) // srv is mounted at mux's "/ws"
func StartServer(t TB, h http.Handler, parts ...Lifecycle) *Server {
	t.Helper()
	s, err := newServer(t, h, parts)
	if err != nil {
		t.Fatalf("%v", err)
		return nil
	}
	t.Cleanup(func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatalf("%v", err)
		}
	})
	return s
}

// NewServer is [StartServer] without a test, for an Example or a main. Call
// [Server.Close] when done. If a part does not start, the error says which one, and the
// parts before it are shut down.
func NewServer(h http.Handler, parts ...Lifecycle) (*Server, error) {
	return newServer(noTest{}, h, parts)
}

func newServer(t TB, h http.Handler, parts []Lifecycle) (*Server, error) {
	if h == nil {
		return nil, errors.New("meshtest: a server without a handler")
	}
	if first, ok := h.(Lifecycle); ok {
		parts = append([]Lifecycle{first}, parts...)
	}
	s := &Server{
		tb: t, parts: parts, network: newNetwork(),
		served: make(chan struct{}), done: make(chan struct{}),
		idle: make(chan struct{}), clients: make(map[*Client]struct{}),
	}
	if err := s.start(); err != nil {
		return nil, err
	}
	s.http = &http.Server{Handler: s.counted(h), ReadHeaderTimeout: stopTime}
	s.web = &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			c, err := s.network.dial(ctx)
			if err != nil {
				return nil, err // not a nil *memConn in a net.Conn
			}
			return c, nil
		},
	}}
	go func() { // ends when Close closes the listener; Close waits for it
		defer close(s.served)
		_ = s.http.Serve(s.network) // always returns an error, after Close
	}()
	return s, nil
}

// start starts the parts. If one fails, it stops that one and those before it.
func (s *Server) start() error {
	for i, p := range s.parts {
		ctx, cancel := context.WithTimeout(context.Background(), startTime)
		err := p.Start(ctx)
		cancel()
		if err != nil {
			return errors.Join(fmt.Errorf("meshtest: start %T: %w", p, err), shutdown(s.parts[:i+1], stopTime))
		}
	}
	return nil
}

// shutdown stops parts, the last one first.
func shutdown(parts []Lifecycle, within time.Duration) error {
	var errs []error
	for _, p := range slices.Backward(parts) {
		ctx, cancel := context.WithTimeout(context.Background(), within)
		err := p.Shutdown(ctx)
		cancel()
		if err != nil {
			hint := ""
			if errors.Is(err, context.DeadlineExceeded) {
				hint = " (a Redis that was cut or hung must be back by then)"
			}
			errs = append(errs, fmt.Errorf("meshtest: shut down %T%s: %w", p, hint, err))
		}
	}
	return errors.Join(errs...)
}

// counted returns h with its calls counted, so that Close can wait for them.
func (s *Server) counted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		if s.closing {
			s.mu.Unlock()
			http.Error(w, "closing", http.StatusServiceUnavailable)
			return
		}
		s.running++
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.running--
			s.closeIfIdle()
		}()
		h.ServeHTTP(w, r)
	})
}

// closeIfIdle closes idle when the last handler has returned. s.mu is held.
func (s *Server) closeIfIdle() {
	if s.closing && s.running == 0 {
		close(s.idle)
	}
}

// URL returns "http://" and a host that only [Server.HTTPClient] can reach. Append the
// path.
func (s *Server) URL() string { return "http://" + host }

// HTTPClient returns a client for plain requests to the same handler, for example to sign
// in and get a cookie before [Server.Connect]. It reaches no other host.
func (s *Server) HTTPClient() *http.Client { return s.web }

// Kill makes the server look dead to all others, as kill -9 or a power cut does. First it
// cuts the connections of the server's Redis clients (see [Redis.CutClient]), so that the
// server can publish nothing. Then it cuts those of its own clients, without a close
// frame. No new connection reaches the server. Its entries end when the other servers
// find that its lease has run out: at most LeaseTTL + 1 s after its last renewal, 11 s by
// default.
//
//	server.Kill(redis, client) // client is the one in mesh.Options.Redis
//
// In the process the server still runs, without connections: its hooks are still called,
// and it is stopped at the end. Do not heal its clients. If other servers use one of the
// clients, it is cut for all of them. A client that r did not make fails the test.
func (s *Server) Kill(r *Redis, clients ...*redis.Client) {
	s.tb.Helper()
	for _, c := range clients {
		if err := r.CutClient(c); err != nil {
			s.tb.Fatalf("%v", err)
			return
		}
	}
	s.mu.Lock()
	s.killed = true
	s.mu.Unlock()
	s.network.fail()
}

// drainer is a part that can send its clients away, as a [github.com/meshpresence/mesh.Server].
type drainer interface {
	Drain(ctx context.Context, spread time.Duration) error
}

// Drain sends the clients away, spread over a time, as before a deploy. It calls Drain of
// each part that has it, in the order in which [Server.Close] stops the parts, and returns
// their errors. It returns [ErrOption] if no part has it. Close the server afterwards.
func (s *Server) Drain(ctx context.Context, spread time.Duration) error {
	var failed []error
	found := false
	for _, part := range slices.Backward(s.parts) {
		if d, ok := part.(drainer); ok {
			found = true
			failed = append(failed, d.Drain(ctx, spread))
		}
	}
	if !found {
		return fmt.Errorf("%w: Drain: no part of the server has that method", ErrOption)
	}
	return errors.Join(failed...)
}

// Close shuts the parts down, which closes their WebSockets with code 1012. Then it
// breaks the remaining connections and waits until no goroutine of the server runs any
// more. The error says which part failed or did not end in time. Another Close waits for
// the first one and returns the same error. After [StartServer] it is called when the
// test is over.
func (s *Server) Close() error {
	s.mu.Lock()
	again, killed := s.closing, s.killed
	if !again {
		s.closing = true
		s.closeIfIdle()
	}
	s.mu.Unlock()
	if !again {
		s.err = s.close(killed)
		close(s.done)
	}
	<-s.done
	return s.err
}

func (s *Server) close(killed bool) error {
	var err error
	if killed {
		// The first shutdown cannot reach Redis and fails. The second one only waits.
		_ = shutdown(s.parts, killedStopTime)
		_ = shutdown(s.parts, stopTime)
	} else {
		err = shutdown(s.parts, stopTime)
	}
	s.mu.Lock()
	clients := slices.Collect(maps.Keys(s.clients))
	s.mu.Unlock()
	for _, c := range clients {
		c.Close()
	}
	s.web.CloseIdleConnections()
	err = errors.Join(err, s.http.Close())
	<-s.served
	s.network.drop()
	select {
	case <-s.idle:
	case <-time.After(stopTime):
		err = errors.Join(err, errors.New("meshtest: handlers are still running after their connections broke"))
	}
	return err
}

// noTest is the TB of a server without a test.
type noTest struct{}

// Helper implements [TB].
func (noTest) Helper() {}

// Cleanup implements [TB]. Server.Close does the cleanup.
func (noTest) Cleanup(func()) {}

// Fatalf implements [TB].
func (noTest) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
