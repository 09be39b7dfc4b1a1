package lease

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// reregistration is one call of OnReregistered.
type reregistration struct {
	old, new string
	stalled  bool
	at       time.Time
}

// server is one Lease with its link and a record of its callbacks.
type server struct {
	*Lease
	link
	t *testing.T

	seen            sync.Mutex
	deaf            bool // its listener drops echoes
	watching        bool
	resets          int
	reregistrations []reregistration
	renewed         []Renewed
}

const ttl = 10 * time.Second

// newServer returns a server with the incarnations name1, name2, ….
func newServer(t *testing.T, r *redis, name string, change ...func(*Config)) *server {
	t.Helper()
	s := &server{link: link{r: r, latency: 2 * time.Millisecond}, t: t}
	n := 0
	cfg := Config{
		Store: &s.link, TTL: ttl,
		NewIncarnation: func() string { n++; inc := fmt.Sprint(name, n); s.listen(inc); return inc },
		Channel:        func(inc string) string { return inc },
		Watching:       func() bool { s.freeze(); s.seen.Lock(); defer s.seen.Unlock(); return s.watching },
		OnRenew:        func(a Renewed) { s.seen.Lock(); defer s.seen.Unlock(); s.renewed = append(s.renewed, a) },
		OnNoEcho:       func() { s.seen.Lock(); defer s.seen.Unlock(); s.resets++ },
		OnReregistered: func(oldInc, newInc string, stalled bool) {
			s.seen.Lock()
			defer s.seen.Unlock()
			s.reregistrations = append(s.reregistrations, reregistration{oldInc, newInc, stalled, time.Now()})
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	s.Lease = New(cfg)
	return s
}

// listen delivers the echoes of inc unless the server is deaf.
func (s *server) listen(inc string) {
	s.r.do(func() {
		s.r.hear[inc] = func(echo string) {
			s.seen.Lock()
			deaf := s.deaf
			s.seen.Unlock()
			if !deaf {
				s.EchoReceived(echo)
			}
		}
	})
}

// start starts a server. The test has to stop it.
func (s *server) start() *server {
	s.t.Helper()
	if err := s.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	return s
}

// kill stops a server without resigning.
func (s *server) kill() {
	s.t.Helper()
	if err := s.Stop(context.WithoutCancel(s.t.Context())); err != nil {
		s.t.Fatal(err)
	}
}

// view runs f with the records locked.
func (s *server) view(f func()) { s.seen.Lock(); defer s.seen.Unlock(); f() }
