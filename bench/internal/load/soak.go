package load

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// SoakConfig is clients that come and go, for a long time, and check what they
// are told. Rates are per second, of all of them together.
type SoakConfig struct {
	Redis          string // address
	Prefix         string // of the keys of members of rooms
	Addrs          []string
	Connections    int
	Rooms          []string
	Watchers       float64 // share of the connections that watch a room
	DialsPerSecond float64
	Paused         bool // begin as Pause does

	Moves  float64 // leave a room, join another
	States float64
	Turns  float64 // watch another room
	Drops  float64 // connections that break, and come back
	Deaths float64 // clients that fall silent, and come back when they are closed
}

// SoakCounts is what has happened so far.
type SoakCounts struct {
	Commands, Events, Ended, DialsFailed, Refused, Violations int64
	Examples                                                  []string // of violations and refusals since the last look, the first few
}

// Soak is such clients at work.
type Soak struct {
	cfg    SoakConfig
	actors []*actor
	redis  *redis.Client
	life   context.Context
	stop   context.CancelFunc
	work   sync.WaitGroup
	paused atomic.Bool
	counts struct{ Commands, Events, Ended, DialsFailed, Refused, Violations atomic.Int64 }

	mu       sync.Mutex // guards the fields below
	addrs    []string
	on       map[string]int // connections by server
	nextDial time.Time
	examples []string // since the last look
	kept     int      // so far
}

// maxExamples bounds what is told in words.
const maxExamples = 20

// StartSoak begins.
func StartSoak(cfg SoakConfig) *Soak {
	s := &Soak{cfg: cfg, addrs: cfg.Addrs, on: map[string]int{}, redis: redis.NewClient(&redis.Options{Addr: cfg.Redis})}
	s.life, s.stop = context.WithCancel(context.Background()) // until Stop
	s.paused.Store(cfg.Paused)
	for i := range cfg.Connections {
		a := &actor{s: s, room: s.room()}
		if float64(i) < cfg.Watchers*float64(cfg.Connections) {
			a.watch = s.room()
		}
		s.actors = append(s.actors, a)
		s.work.Go(a.live)
	}
	s.work.Go(s.drive)
	return s
}

// SetAddrs says which servers take connections from now on.
func (s *Soak) SetAddrs(addrs []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addrs = addrs
}

// pick chooses the server with the fewest connections from here, as a load
// balancer does, and counts one more.
func (s *Soak) pick() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	best := slices.MinFunc(s.addrs, func(x, y string) int { return cmp.Compare(s.on[x], s.on[y]) })
	s.on[best]++
	return best
}

func (s *Soak) gone(addr string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.on[addr]--
}

func (s *Soak) room() string { return s.cfg.Rooms[rand.IntN(len(s.cfg.Rooms))] }

// turnToDial waits for a place in the row of those who connect.
func (s *Soak) turnToDial() bool {
	s.mu.Lock()
	now := time.Now()
	if s.nextDial.Before(now) {
		s.nextDial = now
	}
	wait := s.nextDial.Sub(now)
	s.nextDial = s.nextDial.Add(time.Duration(1e9 / s.cfg.DialsPerSecond))
	s.mu.Unlock()
	return s.sleep(wait)
}

// backoff is how long a client waits before it comes back.
func (s *Soak) backoff() time.Duration { return 500*time.Millisecond + rand.N(2*time.Second) }

// sleep waits, and reports whether the soak goes on.
func (s *Soak) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-s.life.Done():
	}
	return s.life.Err() == nil
}

// drive has actors do something, at the rates wanted.
func (s *Soak) drive() {
	const step = 20 * time.Millisecond
	acts := []struct {
		rate float64
		do   act
		due  float64
	}{
		{rate: s.cfg.Moves, do: (*actor).move}, {rate: s.cfg.States, do: (*actor).state}, {rate: s.cfg.Turns, do: (*actor).turn},
		{rate: s.cfg.Drops, do: (*actor).drop}, {rate: s.cfg.Deaths, do: (*actor).die},
	}
	looked := time.Now()
	for s.sleep(step) {
		if now := time.Now(); now.Sub(looked) > time.Second {
			looked = now
			s.overdue(now)
		}
		if s.paused.Load() {
			continue
		}
		for i := range acts {
			for acts[i].due += acts[i].rate * step.Seconds(); acts[i].due >= 1; acts[i].due-- {
				s.someone(acts[i].do)
			}
		}
	}
}

// someone has an actor that is free do something.
func (s *Soak) someone(do act) {
	for range 20 {
		a := s.actors[rand.IntN(len(s.actors))]
		a.mu.Lock()
		free := a.idleLocked()
		if free {
			do(a)
		}
		a.mu.Unlock()
		if free {
			return
		}
	}
}

// overdue looks for sockets that the server should have closed.
func (s *Soak) overdue(now time.Time) {
	for _, a := range s.actors {
		a.mu.Lock()
		if a.c != nil && !a.silent.IsZero() && now.Sub(a.silent) > overdueAfter {
			s.violation(a, "silent for %v and not closed", now.Sub(a.silent))
			_ = a.c.Close()
		}
		a.mu.Unlock()
	}
}

func (s *Soak) violation(a *actor, format string, args ...any) {
	s.counts.Violations.Add(1)
	s.example(fmt.Sprintf("%s: ", a.id) + fmt.Sprintf(format, args...))
}

func (s *Soak) refused(frame []byte) {
	s.counts.Refused.Add(1)
	s.example(fmt.Sprintf("refused: %.300s", frame))
}

func (s *Soak) example(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.kept++; s.kept <= maxExamples {
		s.examples = append(s.examples, text)
	}
}

// Counts returns what has happened so far.
func (s *Soak) Counts() SoakCounts {
	s.mu.Lock()
	examples := s.examples
	s.examples = nil
	s.mu.Unlock()
	return SoakCounts{
		Commands: s.counts.Commands.Load(), Events: s.counts.Events.Load(), Ended: s.counts.Ended.Load(),
		DialsFailed: s.counts.DialsFailed.Load(), Refused: s.counts.Refused.Load(), Violations: s.counts.Violations.Load(),
		Examples: examples,
	}
}

// Settle waits until every actor is connected and has its answers, and returns
// how many are not.
func (s *Soak) Settle(within time.Duration) (waiting int) {
	for end := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		waiting = 0
		for _, a := range s.actors {
			a.mu.Lock()
			if !a.idleLocked() && (a.c == nil || a.silent.IsZero()) || a.watch != "" && a.ledger == nil {
				waiting++
			}
			a.mu.Unlock()
		}
		if waiting == 0 || time.Now().After(end) {
			return waiting
		}
	}
}

// Pause has actors do nothing more of their own accord, or go on. They still
// come back when they have lost their connection.
func (s *Soak) Pause(paused bool) { s.paused.Store(paused) }

// Stop ends the soak and closes all connections.
func (s *Soak) Stop() {
	s.stop()
	for _, a := range s.actors {
		a.mu.Lock()
		if a.c != nil {
			_ = a.c.Close()
		}
		a.mu.Unlock()
	}
	s.work.Wait()
	_ = s.redis.Close()
}
