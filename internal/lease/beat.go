package lease

import (
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/histogram"
)

const (
	// beatPrefix begins every beat, so that the control channel can carry
	// other messages too.
	beatPrefix = "beat:"
	// beatEvery is how often a busy server hears of itself.
	beatEvery = time.Second
	// deafAfter is how long a beat may take from Redis back to its sender.
	deafAfter = 2 * time.Second
	// doubtAfter is how long one may take that Redis passed on to nobody.
	doubtAfter = 300 * time.Millisecond
	// maxQuiet bounds how long a listener that stays deaf is given to come
	// back before OnDeaf is called again.
	maxQuiet = 30 * time.Second
	// mintedKept is of how many beats it is known when they were made. Those
	// that never come back go when a later one does.
	mintedKept = 64
)

// way is how a beat gets to Redis. On a cluster the two may lead to different
// nodes, and each knows of its own listeners only.
type way int

const (
	byPublish way = iota
	byRenewal
	ways
)

// IsBeat reports whether a message on a control channel is a beat.
func IsBeat(payload string) bool { return strings.HasPrefix(payload, beatPrefix) }

// sentBeat is a beat that Redis took and that has not come back.
type sentBeat struct {
	n      uint64
	at     time.Time
	by     way
	nobody bool // Redis had nobody to pass it on to, where it had somebody before
}

// deadline is when it will have taken too long.
func (s sentBeat) deadline() time.Time {
	if s.nobody {
		return s.at.Add(doubtAfter)
	}
	return s.at.Add(deafAfter)
}

// beats compares the beats that were sent with those that came back. Redis
// keeps the order of a channel, so that one beat answers for all before it.
type beats struct {
	mu      sync.Mutex // guards the fields below
	sent    uint64     // number of the newest beat
	back    uint64     // number of the newest that came back
	waiting []sentBeat // oldest first
	minted  []minted   // that have not come back, oldest first
	until   time.Time  // beats sent before are not waited for
	pause   time.Duration
	deaf    uint64
	// counts says which ways' last beat went to a listener: only after that
	// does it mean something if one goes to nobody. There are proxies, and
	// clusters, that never count.
	counts [ways]bool
	// astray says by which ways a beat came back that had gone to nobody: the
	// counts of those mean nothing. In a cluster each PUBLISH goes to another
	// node, which counts its own listeners only, and passes it on to the rest.
	astray [ways]bool

	trips *histogram.Histogram // how long beats took that came back, from when they were made
}

// minted says when a beat was made.
type minted struct {
	n  uint64
	at time.Time
}

func newBeats() *beats {
	return &beats{pause: deafAfter, trips: histogram.New(histogram.Calls()...)}
}

// mint makes the next beat.
func (b *beats) mint() (beat string, n uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent++
	if len(b.minted) == mintedKept {
		b.minted = slices.Delete(b.minted, 0, 1)
	}
	b.minted = append(b.minted, minted{b.sent, time.Now()})
	return beatPrefix + strconv.FormatUint(b.sent, 10), b.sent
}

// published notes that Redis took beat n, sent and confirmed at these times, and
// passed it on to so many listeners; connected says that ours is not known to be
// without connection. The beat may have come back before that. One that went to
// nobody, where there was somebody before, is given less time to come back.
func (b *beats) published(n uint64, by way, heard int64, connected bool, sent, at time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	nobody := b.counts[by] && heard == 0 && connected
	b.counts[by] = heard > 0 && connected
	switch {
	case n == b.back && nobody:
		b.astray[by] = true
	case n <= b.back, sent.Before(b.until):
	default:
		b.waiting = append(b.waiting, sentBeat{n: n, at: at, by: by, nobody: nobody && !b.astray[by]})
	}
}

// heard notes a beat that came back. Numbers that were never sent are ignored.
func (b *beats) heard(beat string) {
	text, ok := strings.CutPrefix(beat, beatPrefix)
	if !ok {
		return
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if n <= b.back || n > b.sent {
		return
	}
	b.back, b.pause = n, deafAfter
	b.timeLocked(n, time.Now())
	for len(b.waiting) > 0 && b.waiting[0].n <= n {
		if s := b.waiting[0]; s.n == n && s.nobody {
			b.astray[s.by] = true
		}
		b.waiting = b.waiting[1:]
	}
}

// timeLocked notes how long the beat took that came back now. Those before it
// never will.
func (b *beats) timeLocked(n uint64, now time.Time) {
	over := 0
	for ; over < len(b.minted) && b.minted[over].n <= n; over++ {
		if m := b.minted[over]; m.n == n {
			b.trips.Observe(now.Sub(m.at))
		}
	}
	b.minted = slices.Delete(b.minted, 0, over)
}

// deafAt says when the first of the waiting beats will have taken too long;
// false if none waits.
func (b *beats) deafAt() (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.deafAtLocked()
}

func (b *beats) deafAtLocked() (first time.Time, ok bool) {
	for _, s := range b.waiting {
		if t := s.deadline(); !ok || t.Before(first) {
			first, ok = t, true
		}
	}
	return first, ok
}

// doubtful reports whether a beat is awaited that went to nobody.
func (b *beats) doubtful() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(b.waiting, func(s sentBeat) bool { return s.nobody })
}

// overdue reports whether a beat has taken too long, and then gives the
// listener time to come back, each time more until a beat is heard.
func (b *beats) overdue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if at, ok := b.deafAtLocked(); !ok || now.Before(at) {
		return false
	}
	b.deaf++
	b.waiting = nil
	b.until = now.Add(b.pause)
	b.pause = min(2*b.pause, maxQuiet)
	b.countsAnewLocked()
	return true
}

// lost notes that the listener has lost its connection, or gives it up: that
// nobody hears a beat is no news until somebody did again.
func (b *beats) lost() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.countsAnewLocked()
	for i := range b.waiting {
		b.waiting[i].nobody = false
	}
}

func (b *beats) countsAnewLocked() { b.counts, b.astray = [ways]bool{}, [ways]bool{} }

// quiet forgets the waiting beats and those that are sent within the next two
// seconds: the listener is being pointed at another channel.
func (b *beats) quiet(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = nil
	b.until = now.Add(deafAfter)
	b.countsAnewLocked()
}

// forgive forgets the waiting beats: this process stood still, and so did
// whoever should have reported them.
func (b *beats) forgive() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = nil
}

// deafCount returns how often the listener was found deaf.
func (b *beats) deafCount() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.deaf
}
