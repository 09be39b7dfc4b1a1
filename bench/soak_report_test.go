package bench

import (
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	// A server must have the age settled, and the run the age warm, before a sample
	// counts, because pools and mirrors fill in the first minutes.
	settled = 30 * time.Second
	warm    = 2 * time.Minute
	// mayGrow limits the median of the last third as a multiple of that of the first. It
	// is less than a leak of a byte per event would reach in half an hour, and more than
	// the difference between two collections.
	mayGrow = 1.25
	// enough is the number of samples in each third that a comparison needs.
	enough = 10
)

// report takes a sample of every server, and logs the state of the run.
func (s *soak) report() {
	s.t.Helper()
	now := time.Now()
	seconds := now.Sub(s.lastLook).Seconds()
	cpu := map[string]float64{}
	repairs := map[string]uint64{}
	var lines []string
	for i, m := range s.servers {
		look := lookSoak.on(m.process, true)
		cpu["servers"] += s.used(m.name, look.CPU)
		n := look.Stats.Connections
		smp := sample{at: now, server: m.name, lasting: i < max(len(s.servers)/4, 1), connections: n}
		if n > 0 {
			smp.heap = float64(look.Memory.Heap-m.base.Heap) / float64(n)
			smp.goroutines = float64(look.Memory.Goroutines-m.base.Goroutines) / float64(n)
		}
		if now.Sub(m.born) > settled && n >= *soakConnections / *soakServers / 4 {
			s.samples = append(s.samples, smp)
		}
		for cause, n := range look.Stats.Repairs {
			repairs[cause] += n
		}
		for name, n := range map[string]uint64{
			"reregistered": look.Stats.Reregistered, "listener resets": look.Stats.ListenerResets, "slow": look.Stats.Closed["slow"] + look.Stats.SlowSubscriptions,
			"redis failures": look.Stats.RedisFailures, "repair updates": look.Stats.RepairUpdates,
		} {
			repairs[name] += n
		}
		lines = append(lines, fmt.Sprintf("%s %v: %d conns, %d rooms watched, heap %.1f MiB (%.1f KiB/conn), %d goroutines (%.2f/conn), RSS %.0f MiB",
			m.name, now.Sub(m.born).Round(time.Second), n, look.Stats.Watched, mib(look.Memory.Heap), smp.heap/1024,
			look.Memory.Goroutines, smp.goroutines, mib(look.Memory.RSS)))
	}
	var all soakClients
	for i, c := range each(s.clients, func(p *process) soakClients { return countSoak.on(p, true) }) {
		cpu["clients"] += s.used(fmt.Sprintf("clients%d", i), c.CPU)
		all.Events += c.Events
		all.Commands += c.Commands
		all.Ended += c.Ended
		all.DialsFailed += c.DialsFailed
		all.Refused += c.Refused
		all.Violations += c.Violations
		all.Examples = append(all.Examples, c.Examples...)
	}
	if all.Violations > 0 {
		s.t.Errorf("%d violations", all.Violations)
	}
	for _, text := range all.Examples {
		s.t.Log(text)
	}
	u := usage(s.t, s.client)
	cpu["redis"] = s.used("redis", u.CPU)
	for who := range maps.Keys(cpu) {
		cpu[who] /= seconds
	}
	maps.DeleteFunc(repairs, func(_ string, n uint64) bool { return n == 0 })
	size, err := s.client.DBSize(s.t.Context()).Result()
	require.NoError(s.t, err)
	s.t.Logf("minute %.1f: %.0f events/s to clients, %d commands, %d connections ended, %d dials failed, %d refused, %d violations; "+
		"cores: servers %.2f, clients %.2f, redis %.2f; redis %s, %d keys; servers' counts: %v\n\t%s",
		now.Sub(s.began).Minutes(), float64(all.Events-s.lastEvents)/seconds, all.Commands, all.Ended, all.DialsFailed, all.Refused, all.Violations,
		cpu["servers"], cpu["clients"], cpu["redis"], s.redisMemory(), size, repairs, strings.Join(lines, "\n\t"))
	s.lastLook, s.lastEvents = now, all.Events
}

// used returns the processor time since the last call, in seconds.
func (s *soak) used(who string, cpu float64) float64 {
	before := s.lastCPU[who]
	s.lastCPU[who] = cpu
	return cpu - before
}

func mib(bytes int) float64 { return float64(bytes) / (1 << 20) }

func (s *soak) redisMemory() string {
	info, err := s.client.Info(s.t.Context(), "memory").Result()
	require.NoError(s.t, err)
	_, rest, _ := strings.Cut(info, "used_memory_human:")
	size, _, _ := strings.Cut(rest, "\r\n")
	return size
}

// flat compares the cost of a connection in the first third of the run with that in the
// last, for all servers, and for those that were never replaced.
func (s *soak) flat() {
	s.t.Helper()
	begun, end := s.began.Add(warm), time.Now()
	third := end.Sub(begun) / 3
	for who, counts := range map[string]func(sample) bool{
		"all servers":               func(sample) bool { return true },
		"servers that last the run": func(x sample) bool { return x.lasting },
	} {
		for what, figure := range map[string]func(sample) float64{
			"heap per connection":       func(x sample) float64 { return x.heap },
			"goroutines per connection": func(x sample) float64 { return x.goroutines },
		} {
			var first, last []float64
			for _, x := range s.samples {
				switch {
				case !counts(x) || x.at.Before(begun):
				case x.at.Before(begun.Add(third)):
					first = append(first, figure(x))
				case x.at.After(end.Add(-third)):
					last = append(last, figure(x))
				}
			}
			if len(first) == 0 || len(last) == 0 {
				continue
			}
			was, is := median(first), median(last)
			s.t.Logf("%s, %s: median %.2f in the first third, %.2f in the last (%d and %d samples)", what, who, was, is, len(first), len(last))
			if len(first) >= enough && len(last) >= enough && is > was*mayGrow {
				s.t.Errorf("%s grows, %s: from %.2f to %.2f", what, who, was, is)
			}
		}
	}
}
