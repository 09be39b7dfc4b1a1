package lease

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// echoPrefix begins every echo, so that the server channel can carry other messages
	// too.
	echoPrefix = "echo:"
	// echoInterval is the interval between echoes of a server with watched rooms.
	echoInterval = time.Second
	// echoTimeout is the time that an echo may take from Redis back to its sender.
	echoTimeout = 2 * time.Second
	// unheardTimeout is echoTimeout for an echo that Redis counted no receiver for.
	unheardTimeout = 300 * time.Millisecond
	// maxQuiet is the longest pause between two calls of OnNoEcho for a listener that
	// stays silent.
	maxQuiet = 30 * time.Second
	// maxMade is the number of echoes whose start is remembered. Those that never come
	// back are dropped when a later one does.
	maxMade = 64
)

// quiet is the time that a silent listener gets to come back.
var quiet = wait.Backoff{First: echoTimeout, Last: maxQuiet}

// route is the kind of call that publishes an echo. On a cluster the two may lead to
// different nodes, and each node counts only its own listeners.
type route int

const (
	byPublish route = iota
	byRenewal
	routes
)

// IsEcho reports whether a message on a server channel is an echo.
func IsEcho(payload string) bool { return strings.HasPrefix(payload, echoPrefix) }

// sentEcho is an echo that Redis took and that has not come back.
type sentEcho struct {
	n          uint64
	at         time.Time
	by         route
	noReceiver bool // Redis counted no receiver, although it had counted one before
}

// deadline returns the time at which the echo is overdue.
func (s sentEcho) deadline() time.Time {
	if s.noReceiver {
		return s.at.Add(unheardTimeout)
	}
	return s.at.Add(echoTimeout)
}

// echoes compares the echoes that were sent with those that came back. Redis keeps the
// order of a channel, so one echo also answers for all before it.
type echoes struct {
	mu           sync.Mutex // guards the fields below
	sent         uint64     // number of the newest echo
	back         uint64     // number of the newest echo that came back
	waiting      []sentEcho // oldest first
	made         []madeEcho // those that have not come back, oldest first
	ignoreBefore time.Time  // echoes sent before this time are not awaited
	overdueInRow int        // echoes that were overdue since one came back
	timeouts     uint64
	// counts reports for each route whether the last echo had a receiver. Only then does
	// a later echo without a receiver mean something. Some proxies and clusters never
	// count.
	counts [routes]bool
	// countsWrong reports for each route whether an echo came back for which Redis had
	// counted no receiver. Such counts mean nothing. In a cluster each PUBLISH goes to
	// another node, which counts only its own listeners and forwards the message to the
	// rest.
	countsWrong [routes]bool

	trips *histogram.Histogram // from the making of an echo until it came back
}

// madeEcho is the time at which an echo was made.
type madeEcho struct {
	n  uint64
	at time.Time
}

func newEchoes() *echoes {
	return &echoes{trips: histogram.New(histogram.Calls()...)}
}

// next makes the next echo.
func (e *echoes) next() (echo string, n uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sent++
	if len(e.made) == maxMade {
		e.made = slices.Delete(e.made, 0, 1)
	}
	e.made = append(e.made, madeEcho{e.sent, time.Now()})
	return echoPrefix + strconv.FormatUint(e.sent, 10), e.sent
}

// published notes that Redis took echo n. It was sent and confirmed at these times, and
// Redis counted this many receivers. connected reports whether the listener seems
// connected. The echo may have come back already. An echo without a receiver, on a route
// that had one before, gets less time to come back.
func (e *echoes) published(n uint64, by route, receivers int64, connected bool, sent, at time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	noReceiver := e.counts[by] && receivers == 0 && connected
	e.counts[by] = receivers > 0 && connected
	switch {
	case n == e.back && noReceiver:
		e.countsWrong[by] = true
	case n <= e.back, sent.Before(e.ignoreBefore):
	default:
		e.waiting = append(e.waiting, sentEcho{n: n, at: at, by: by, noReceiver: noReceiver && !e.countsWrong[by]})
	}
}

// heard notes an echo that came back. Numbers that were never sent are ignored.
func (e *echoes) heard(echo string) {
	text, ok := strings.CutPrefix(echo, echoPrefix)
	if !ok {
		return
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if n <= e.back || n > e.sent {
		return
	}
	e.back, e.overdueInRow = n, 0
	e.observeTripLocked(n, time.Now())
	for len(e.waiting) > 0 && e.waiting[0].n <= n {
		if s := e.waiting[0]; s.n == n && s.noReceiver {
			e.countsWrong[s.by] = true
		}
		e.waiting = e.waiting[1:]
	}
}

// observeTripLocked records the round trip of echo n, which came back now. Those before
// it never will.
func (e *echoes) observeTripLocked(n uint64, now time.Time) {
	over := 0
	for ; over < len(e.made) && e.made[over].n <= n; over++ {
		if m := e.made[over]; m.n == n {
			e.trips.Observe(now.Sub(m.at))
		}
	}
	e.made = slices.Delete(e.made, 0, over)
}

// deadline returns the time at which the first awaited echo is overdue, and false if none
// is awaited.
func (e *echoes) deadline() (time.Time, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.deadlineLocked()
}

func (e *echoes) deadlineLocked() (first time.Time, ok bool) {
	for _, s := range e.waiting {
		if t := s.deadline(); !ok || t.Before(first) {
			first, ok = t, true
		}
	}
	return first, ok
}

// unheard reports whether an echo without a receiver is awaited.
func (e *echoes) unheard() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.ContainsFunc(e.waiting, func(s sentEcho) bool { return s.noReceiver })
}

// overdue reports whether an echo is overdue. If so, it gives the listener time to come
// back. The time grows with each overdue echo until one comes back.
func (e *echoes) overdue(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if at, ok := e.deadlineLocked(); !ok || now.Before(at) {
		return false
	}
	e.timeouts++
	e.waiting = nil
	e.overdueInRow++
	e.ignoreBefore = now.Add(quiet.After(e.overdueInRow))
	e.resetCountsLocked()
	return true
}

// disconnected notes that the listener has lost or closed its connection. An echo without
// a receiver then means nothing until another one had a receiver.
func (e *echoes) disconnected() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.resetCountsLocked()
	for i := range e.waiting {
		e.waiting[i].noReceiver = false
	}
}

func (e *echoes) resetCountsLocked() { e.counts, e.countsWrong = [routes]bool{}, [routes]bool{} }

// expectNone drops the awaited echoes and ignores those of the next two seconds, because
// the listener moves to another channel.
func (e *echoes) expectNone(now time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiting = nil
	e.ignoreBefore = now.Add(echoTimeout)
	e.resetCountsLocked()
}

// reset drops the awaited echoes after a stall: their answers may still be unread.
func (e *echoes) reset() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.waiting = nil
}

// resets returns the number of listener resets.
func (e *echoes) resets() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.timeouts
}
