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

	"github.com/meshpresence/mesh/internal/wait"
)

// SoakConfig describes clients that connect and disconnect for a long time, and check
// their updates. Rates are per second, of all clients together.
type SoakConfig struct {
	Redis          string // address
	Prefix         string // of the keys of members of rooms
	Addrs          []string
	Connections    int
	Rooms          []string
	Watchers       float64 // share of the connections that watch a room
	DialsPerSecond float64
	Paused         bool // begin paused

	Moves  float64 // leave a room, join another
	States float64
	Turns  float64 // watch another room
	Drops  float64 // connections that break, and reconnect
	Deaths float64 // clients that become silent, and reconnect when their connection is closed
}

// SoakCounts holds the counters so far.
type SoakCounts struct {
	Commands, Events, Ended, DialsFailed, Refused, Violations int64
	Examples                                                  []string // of violations and refusals since the last call, the first few
}

// Soak is a group of such clients.
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
	examples []string // since the last call
	kept     int      // so far
}

// maxExamples limits the number of examples.
const maxExamples = 20

// StartSoak starts the clients.
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

// SetAddrs sets the servers that get connections from now on.
func (s *Soak) SetAddrs(addrs []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addrs = addrs
}

// pick chooses the server with the fewest connections from here, like a load balancer,
// and counts one more.
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

// turnToDial waits for the next time to dial.
func (s *Soak) turnToDial() bool {
	s.mu.Lock()
	now := time.Now()
	if s.nextDial.Before(now) {
		s.nextDial = now
	}
	pause := s.nextDial.Sub(now)
	s.nextDial = s.nextDial.Add(time.Duration(1e9 / s.cfg.DialsPerSecond))
	s.mu.Unlock()
	return s.sleep(pause)
}

// backoff returns the time that a client waits before it reconnects.
func (s *Soak) backoff() time.Duration { return 500*time.Millisecond + rand.N(2*time.Second) }

// sleep waits for d, and reports whether the soak goes on.
func (s *Soak) sleep(d time.Duration) bool {
	return wait.For(s.life, d) == nil
}

// drive makes actors act, at the configured rates.
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

// someone makes a free actor act.
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

// Counts returns the counters so far.
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

// Settle waits until every actor is connected and has its answers. It returns the number
// of actors that are not.
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

// Pause stops the actors from acting, or lets them go on. They still reconnect if they
// have lost their connection.
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
