package sim

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/meshpresence/mesh"
	"github.com/meshpresence/mesh/internal/e2e/harness"
	"github.com/meshpresence/mesh/internal/testhook"
)

// Redis that takes no writes for a moment, and answers everything else.

var simNoWrites = []string{
	"NOREPLICAS Not enough good replicas to write.", "READONLY You can't write against a read only replica.",
	"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
	"CLUSTERDOWN The cluster is down",
}

// refuseWrites has Redis refuse all writes for a moment: too short for the
// servers' patience, and long enough for keys with a short TTL to run out. Sometimes it
// takes them for an instant in between.
func (s *sim) refuseWrites() bool {
	if time.Now().Before(s.takes) {
		return false
	}
	return s.refuse(s.between(0.5, 3))
}

// refuseBetween refuses writes if all servers may judge and the next renewal of
// any is far enough away for keys to run out before: so they may judge still.
func (s *sim) refuseBetween() bool {
	s.mu.Lock()
	nodes := s.living()
	s.mu.Unlock()
	oldest := time.Duration(0)
	for _, n := range nodes {
		_, ok := testhook.PartsOf(n.p).Lease.ClockProof()
		if n.paused || !ok {
			return false
		}
		oldest = max(oldest, n.p.Stats().LeaseAge)
	}
	most := (s.lease/3 - oldest - 50*time.Millisecond).Seconds()
	return most > 1.6 && time.Now().After(s.takes) && s.refuse(s.between(1.2, most))
}

// refuse refuses writes for as long as d, with an instant in between perhaps.
func (s *sim) refuse(d time.Duration) bool {
	text := simNoWrites[s.rng.IntN(len(simNoWrites))]
	s.setRefusal(text)
	s.takes = time.Now().Add(d + time.Second)
	if s.rng.IntN(4) > 0 {
		s.disturb(d, func() { s.setRefusal("") })
		return true
	}
	s.disturb(d/2, func() {
		s.setRefusal("")
		s.disturb(s.between(0.01, 0.2), func() {
			s.setRefusal(text)
			s.disturb(d/2, func() { s.setRefusal("") })
		})
	})
	return true
}

func (s *sim) setRefusal(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusal = text
	s.sickUntil(time.Now()) // the dead are buried later
	for _, n := range s.nodes {
		n.apply()
	}
	s.noted("writes are refused: %q", text)
}

// fray is what happens in a fragile run besides.
func (s *sim) fray() {
	if s.rng.IntN(20) == 0 {
		s.clean()
	}
	if s.rng.IntN(4) == 0 && s.refuseBetween() {
		s.inject("refusedbetween")
	}
}

// clean has an administrator clean up by hand.
func (s *sim) clean() {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickNode()
	room := s.rooms[s.rng.IntN(len(s.rooms))]
	if n == nil || n.paused {
		return
	}
	s.noted("clean %s on %s", room, n.name)
	s.calls.Go(func() {
		ctx, cancel := context.WithTimeout(s.ctx, 5*time.Second)
		defer cancel()
		_, err := n.p.CleanExpired(ctx, room)
		s.mu.Lock()
		defer s.mu.Unlock()
		if err != nil && !n.dead && !errors.Is(err, mesh.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			s.fail("clean %s: %v", room, err)
		}
	})
}

// frail makes some runs such that short refusals have the most to break: keys
// that run out within two seconds, of connections that show life often, in front
// of servers that are patient in spite of the refusals. What these runs are like
// is drawn aside, so that the others stay as they are.
func (s *sim) frail() bool {
	rng, fragile := fragileSeed(s.seed)
	if !fragile {
		return false
	}
	s.lease, s.ttl, s.touch = 10*time.Second, time.Second, 200*time.Millisecond
	s.menu = nil
	for _, f := range simFaultList() {
		if slices.Contains([]string{"refused", "kill", "start", "hintsaway", "hintsfalse"}, f.name) && rng.IntN(5) == 0 {
			s.menu = append(s.menu, f)
		}
	}
	return true
}

// fragileSeed says whether a run is one of those, and draws what it is like.
func fragileSeed(seed int64) (*rand.Rand, bool) {
	rng := rand.New(rand.NewPCG(uint64(seed), 22))
	return rng, rng.IntN(8) == 0 && *simFaults == ""
}

// simReads are the scripts that only read, by hash and by text.
var simReads = sync.OnceValue(func() (marks [][]byte) {
	for _, name := range []string{"snapshot", "positions", "occupancy", "instances"} {
		text, err := os.ReadFile(harness.InModule("internal", "store", "lua", name+".lua"))
		if err != nil {
			panic(err)
		}
		marks = append(marks, text, []byte(redis.NewScript(string(text)).Hash()))
	}
	return marks
})

// refused returns the answer to a request that Redis refuses; nil: it does not.
func (l *simLink) refused(request []byte, script bool) []byte {
	l.mu.Lock()
	text := l.refuse
	l.mu.Unlock()
	if text == "" {
		return nil
	}
	write := script
	for _, mark := range simReads() {
		write = write && !bytes.Contains(request, mark)
	}
	for _, name := range []string{"srem", "zrem", "del", "set", "setnx", "hset"} {
		write = write || bytes.Contains(request[:min(len(request), 32)], []byte("\r\n"+name+"\r\n"))
	}
	if !write {
		return nil
	}
	return []byte("-" + text + "\r\n")
}
