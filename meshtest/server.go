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
	// deadTime is what the shutdown of a killed server gets: it cannot reach
	// its Redis, so that waiting for it is no use.
	deadTime = 250 * time.Millisecond
)

// Lifecycle is what has to be started before it serves and shut down after:
// a [github.com/meshpresence/mesh.Server], or whatever type of the app has
// these two methods.
type Lifecycle interface {
	Start(ctx context.Context) error
	Shutdown(ctx context.Context) error
}

// Server serves a handler over connections in memory: no port is opened, and
// it works in a synctest bubble. Its methods may be called from any goroutine,
// but see [Client] for what fails a test.
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

// StartServer starts a server and serves it to clients in memory. When the
// test is over it is shut down, and what goes wrong then fails the test: heal
// the Redis before, if it was cut or hung.
//
// h is what the app mounts: a *mesh.Server alone, or a mux with the app's
// middleware and a *mesh.Server at some path. If h has the methods of
// [Lifecycle], as a *mesh.Server has, they are called; and so are those of
// parts, in this order and backwards to stop. What is in neither the test
// starts and shuts down by itself. To start what runs already does nothing.
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

// NewServer is [StartServer] without a test: for an Example, or a main. Call
// [Server.Close] when done. An error says which part did not start; those
// that did are shut down then.
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
	go func() { // ends with the listener, which Close closes; awaited there
		defer close(s.served)
		_ = s.http.Serve(s.network) // always an error, and always that one
	}()
	return s, nil
}

// start starts the parts. Where one fails it stops those before it.
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

// counted is h with its calls counted, so that Close can wait for them.
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
			s.rest()
		}()
		h.ServeHTTP(w, r)
	})
}

// rest tells Close when the last handler has returned. s.mu is held.
func (s *Server) rest() {
	if s.closing && s.running == 0 {
		close(s.idle)
	}
}

// URL returns "http://" and a host that only [Server.HTTPClient] can reach:
// paths are to be appended.
func (s *Server) URL() string { return "http://" + host }

// HTTPClient returns a client for plain requests to the same handler: to sign
// in and get a cookie, say, before [Server.Connect]. It reaches nothing else.
func (s *Server) HTTPClient() *http.Client { return s.web }

// Kill makes the server dead for everybody else, as kill -9 or a power cut
// does: first the connections of its Redis clients are cut (see
// [Redis.CutClient]), so that it can tell nobody, then those of its own
// clients, without a close frame. Nobody gets through to it any more. Its
// entries leave when the others find that its lease has run out: at the latest
// LeaseTTL + 1 s after its last renewal, 11 s by default.
//
//	server.Kill(redis, client) // client is what mesh.Options.Redis was given
//
// In the process the server goes on running, without anybody to speak to: its
// hooks are still called, and it is stopped at the end. Do not heal its
// clients. One that other servers use too is cut for all of them. A client
// that r did not make fails the test.
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

// Close shuts the parts down, which closes their WebSockets with code 1012,
// then breaks what connections are left, and waits until nothing of the server
// runs any more. An error says what did not end in time, or could not. Closing
// again waits for the first time and returns the same. [StartServer] calls it
// when the test is over.
func (s *Server) Close() error {
	s.mu.Lock()
	again, killed := s.closing, s.killed
	if !again {
		s.closing = true
		s.rest()
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
		// It cannot reach Redis and says so; the second time only waits.
		_ = shutdown(s.parts, deadTime)
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

// noTest stands in for a test where there is none.
type noTest struct{}

// Helper implements [TB].
func (noTest) Helper() {}

// Cleanup implements [TB]. What there is to clean up, Server.Close does.
func (noTest) Cleanup(func()) {}

// Fatalf implements [TB].
func (noTest) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
