package lease

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// rebirth is one call of OnReborn.
type rebirth struct {
	old, new string
	stalled  bool
	at       time.Time
}

// server is one Lease with its link and what its callbacks were told.
type server struct {
	*Lease
	link
	t *testing.T

	seen    sync.Mutex
	deaf    bool // its listener drops beats
	busy    bool
	deafs   int
	births  []rebirth
	buried  map[string]int
	renewed []Renewed
}

const ttl = 10 * time.Second

// newServer makes a server called name: its incarnations are name1, name2, …
func newServer(t *testing.T, r *redis, name string, change ...func(*Config)) *server {
	t.Helper()
	s := &server{link: link{r: r, latency: 2 * time.Millisecond}, t: t, buried: map[string]int{}}
	n := 0
	cfg := Config{
		Store: &s.link, TTL: ttl,
		NewIncarnation: func() string { n++; inc := fmt.Sprint(name, n); s.listen(inc); return inc },
		Control:        func(inc string) string { return inc },
		Busy:           func() bool { s.freeze(); s.seen.Lock(); defer s.seen.Unlock(); return s.busy },
		OnRenew:        func(a Renewed) { s.seen.Lock(); defer s.seen.Unlock(); s.renewed = append(s.renewed, a) },
		OnDeaf:         func() { s.seen.Lock(); defer s.seen.Unlock(); s.deafs++ },
		OnBuried:       func(inc string, n int) { s.seen.Lock(); defer s.seen.Unlock(); s.buried[inc] += n },
		OnReborn: func(old, new string, stalled bool) {
			s.seen.Lock()
			defer s.seen.Unlock()
			s.births = append(s.births, rebirth{old, new, stalled, time.Now()})
		},
	}
	for _, f := range change {
		f(&cfg)
	}
	s.Lease = New(cfg)
	return s
}

// listen delivers the beats of inc unless the server is deaf.
func (s *server) listen(inc string) {
	s.r.do(func() {
		s.r.hear[inc] = func(beat string) {
			s.seen.Lock()
			deaf := s.deaf
			s.seen.Unlock()
			if !deaf {
				s.Heard(beat)
			}
		}
	})
}

// start starts a server that the test stops at its end.
func (s *server) start() *server {
	s.t.Helper()
	if err := s.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	return s
}

// kill ends a server without a word.
func (s *server) kill() {
	s.t.Helper()
	if err := s.Stop(context.WithoutCancel(s.t.Context())); err != nil {
		s.t.Fatal(err)
	}
}

// view runs f with the callbacks' records locked.
func (s *server) view(f func()) { s.seen.Lock(); defer s.seen.Unlock(); f() }
