package harness

import (
	"context"
	"net/http"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/store"
)

// Told checks that the connection was closed because the server restarts. In real time,
// a peer that was too slow to answer the close frame may have been cut off instead.
func (p *Peer) Told(t *testing.T) {
	t.Helper()
	if code := p.Closed(5 * time.Second); p.W.Virtual {
		assert.Equal(t, websocket.CloseServiceRestart, code)
	}
}

func (s *Server) DialAll(n int, rooms ...string) []*Peer {
	s.W.T.Helper()
	peers := make([]*Peer, n)
	for i := range peers {
		peers[i] = s.Dial()
		for _, room := range rooms {
			peers[i].Join(room)
		}
	}
	return peers
}

// LeftTogether checks the number of batches of a server whose writes take a moment of
// virtual time: operations of one instant are written in the same batch. In real time
// the grouping depends on the machine.
func (w *World) LeftTogether(batches uint64, ops int) {
	w.T.Helper()
	if w.Virtual {
		assert.LessOrEqual(w.T, batches, uint64(4*ops/store.MaxOps+4), "the operations are not batched")
	}
}

// Server is a mesh.Server behind an HTTP server in memory.
type Server struct {
	*mesh.Server
	W        *World
	Listener *PipeListener
	Query    string // query of the URL that peers dial, with the question mark
	HTTP     *http.Server
	Done     chan struct{}
	Stop     sync.Once
}

// Server starts a server, and shuts it down at the end of the test. setup changes the
// options.
func (w *World) Server(setup ...func(*mesh.Options)) *Server {
	w.T.Helper()
	opts := w.Options()
	opts.LatencyInterval = -1
	for _, f := range setup {
		f(&opts)
	}
	srv, err := mesh.NewServer(opts)
	require.NoError(w.T, err)
	require.NoError(w.T, srv.Start(w.T.Context()))
	s := &Server{Server: srv, W: w, Listener: NewPipeListener(), HTTP: &http.Server{Handler: srv}, Done: make(chan struct{})}
	go func() {
		defer close(s.Done)
		_ = s.HTTP.Serve(s.Listener)
	}()
	w.T.Cleanup(func() { s.End() })
	return s
}

// Level2 makes peers that are dialled later speak level 2 of the protocol.
func (s *Server) Level2() *Server {
	s.Query = "?mesh-level=2"
	return s
}

// Tracked is Server with a rule for every room.
func (w *World) Tracked(setup ...func(*mesh.Options)) *Server {
	w.T.Helper()
	s := w.Server(setup...)
	s.Track(".*", mesh.PresenceOptions{})
	return s
}

func (s *Server) Track(expr string, opts mesh.PresenceOptions) {
	s.W.T.Helper()
	require.NoError(s.W.T, s.TrackPresence(mesh.Regexp(regexp.MustCompile(expr)), opts))
}

func (s *Server) End() {
	s.Stop.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), s.W.Unhurried(30*time.Second))
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			s.W.T.Errorf("shutdown: %v", err)
		}
		_ = s.HTTP.Close()
		<-s.Done
	})
}

// Manager starts a PresenceManager without WebSockets, and shuts it down at the end of
// the test.
func (w *World) Manager(setup ...func(*mesh.Options)) *mesh.PresenceManager {
	w.T.Helper()
	opts := w.Options()
	for _, f := range setup {
		f(&opts)
	}
	p, err := mesh.NewPresenceManager(opts)
	require.NoError(w.T, err)
	w.T.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := p.Shutdown(ctx); err != nil {
			w.T.Errorf("shutdown: %v", err)
		}
	})
	require.NoError(w.T, p.Start(w.T.Context()))
	return p
}
