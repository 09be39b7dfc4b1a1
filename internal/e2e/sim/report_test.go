package sim

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// simTally contains the totals of all runs.
type simTally struct {
	mu         sync.Mutex // guards the fields below
	runs       int
	violations int
	faults     map[string]int
	counts     map[string]int             // checked events, by type
	virtual    time.Duration              // simulated time
	recovery   map[string][]time.Duration // recovery times after phases with one kind of fault
}

var simTotal = simTally{faults: map[string]int{}, counts: map[string]int{}, recovery: map[string][]time.Duration{}}

func (t *simTally) add(s *sim) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.runs++
	t.virtual += time.Since(s.start)
	if s.failure != "" {
		t.violations++
	}
	for name, n := range s.injected {
		t.faults[name] += n
	}
	for kind, n := range s.counts {
		t.counts[kind] += n
	}
	for name, list := range s.recovered {
		t.recovery[name] = append(t.recovery[name], list...)
	}
}

func (t *simTally) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	sum := func(m map[string]int) (n int) {
		for _, v := range m {
			n += v
		}
		return n
	}
	list := func(m map[string]int) string {
		var parts []string
		for _, k := range slices.Sorted(maps.Keys(m)) {
			parts = append(parts, fmt.Sprintf("%s %d", k, m[k]))
		}
		return strings.Join(parts, ", ")
	}
	fmt.Fprintf(&b, "%d runs, %v of simulated time, %d violations\n", t.runs, t.virtual.Round(time.Second), t.violations)
	fmt.Fprintf(&b, "faults injected: %d: %s\n", sum(t.faults), list(t.faults))
	fmt.Fprintf(&b, "events checked: %d: %s\n", sum(t.counts), list(t.counts))
	for _, name := range slices.Sorted(maps.Keys(t.recovery)) {
		d := t.recovery[name]
		slices.Sort(d)
		fmt.Fprintf(&b, "recovery after %-11s median %5d ms, worst %6d ms, of %d\n", name+":",
			d[len(d)/2].Milliseconds(), d[len(d)-1].Milliseconds(), len(d))
	}
	return b.String()
}

// inject counts a fault.
func (s *sim) inject(name string) {
	s.injected[name]++
	if !slices.Contains(s.phase, name) {
		s.phase = append(s.phase, name)
	}
}

// simLogs contains the logs of a run's servers. It has a lock of its own, because
// servers log while they hold their locks.
type simLogs struct {
	start time.Time

	mu    sync.Mutex // guards lines
	lines []string
}

func newSimLogs() *simLogs { return &simLogs{start: time.Now()} }

// of returns the logger of a server, or nil without -sim.log.
func (l *simLogs) of(name string) *slog.Logger {
	if !*simLog {
		return nil
	}
	return slog.New(simLogHandler{l, name})
}

func (l *simLogs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return "\n" + strings.Join(l.lines, "\n")
}

type simLogHandler struct {
	logs *simLogs
	name string
}

func (h simLogHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h simLogHandler) WithAttrs([]slog.Attr) slog.Handler { return h }

func (h simLogHandler) WithGroup(string) slog.Handler { return h }

func (h simLogHandler) Handle(_ context.Context, r slog.Record) error {
	line := fmt.Sprintf("log [%v] %s: %s", time.Since(h.logs.start).Round(time.Millisecond), h.name, r.Message)
	r.Attrs(func(a slog.Attr) bool {
		line += " " + a.String()
		return true
	})
	h.logs.mu.Lock()
	defer h.logs.mu.Unlock()
	h.logs.lines = append(h.logs.lines, line)
	return nil
}
