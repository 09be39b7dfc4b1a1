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

// In these faults, Redis refuses writes for a moment, and answers everything else.

var simNoWrites = []string{
	"NOREPLICAS Not enough good replicas to write.", "READONLY You can't write against a read only replica.",
	"MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
	"CLUSTERDOWN The cluster is down",
}

// refuseWrites makes Redis refuse all writes for a moment that is too short to end
// contact, and long enough for keys with a short TTL to run out. Sometimes Redis
// accepts writes for an instant in between.
func (s *sim) refuseWrites() bool {
	if time.Now().Before(s.refuseFrom) {
		return false
	}
	return s.refuse(s.between(0.5, 3))
}

// refuseBetween refuses writes if all servers are in contact, and if there is enough
// time for keys to run out before the next heartbeat of any server. So the servers stay
// in contact.
func (s *sim) refuseBetween() bool {
	s.mu.Lock()
	servers := s.living()
	s.mu.Unlock()
	oldest := time.Duration(0)
	for _, n := range servers {
		_, ok := testhook.PartsOf(n.p).Lease.ClockProof()
		if n.paused || !ok {
			return false
		}
		oldest = max(oldest, n.p.Stats().LeaseAge)
	}
	limit := (s.lease/3 - oldest - 50*time.Millisecond).Seconds()
	return limit > 1.6 && time.Now().After(s.refuseFrom) && s.refuse(s.between(1.2, limit))
}

// refuse refuses writes for d, sometimes with an instant in between.
func (s *sim) refuse(d time.Duration) bool {
	text := simNoWrites[s.rng.IntN(len(simNoWrites))]
	s.setRefusal(text)
	s.refuseFrom = time.Now().Add(d + time.Second)
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
	s.outageUntil(time.Now()) // dead servers are declared dead later
	for _, n := range s.servers {
		n.apply()
	}
	s.noted("writes are refused: %q", text)
}

// injectFragile injects the additional faults of a fragile run.
func (s *sim) injectFragile() {
	if s.rng.IntN(20) == 0 {
		s.clean()
	}
	if s.rng.IntN(4) == 0 && s.refuseBetween() {
		s.inject("refusedbetween")
	}
}

// clean makes an administrator call CleanExpired.
func (s *sim) clean() {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.pickServer()
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

// makeFragile makes some runs fragile, so that short refusals of writes can break the
// most. Their keys run out within two seconds, their connections show life often, and
// their servers stay in contact during the refusals. They use a separate random source,
// so that the schedules of other runs do not change.
func (s *sim) makeFragile() bool {
	rng, fragile := fragileSeed(s.seed)
	if !fragile {
		return false
	}
	s.lease, s.ttl, s.touch = 10*time.Second, time.Second, 200*time.Millisecond
	s.faults = nil
	for _, f := range simFaultList() {
		if slices.Contains([]string{"refused", "kill", "start", "hintsaway", "hintsfalse"}, f.name) && rng.IntN(5) == 0 {
			s.faults = append(s.faults, f)
		}
	}
	return true
}

// fragileSeed reports whether a run is fragile, and returns its random source.
func fragileSeed(seed int64) (*rand.Rand, bool) {
	rng := rand.New(rand.NewPCG(uint64(seed), 22))
	return rng, rng.IntN(8) == 0 && *simFaults == ""
}

// simReads returns the scripts that only read, as text and as hash.
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

// refused returns the answer to a request that Redis refuses, or nil.
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
