package lease

import (
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// beatPrefix begins every beat, so that the control channel can carry
	// other messages too.
	beatPrefix = "beat:"
	// beatEvery is how often a busy server hears of itself.
	beatEvery = time.Second
	// deafAfter is how long a beat may take from Redis back to its sender.
	deafAfter = 2 * time.Second
	// maxQuiet bounds how long a listener that stays deaf is given to come
	// back before OnDeaf is called again.
	maxQuiet = 30 * time.Second
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
	n  uint64
	at time.Time
}

// beats compares the beats that were sent with those that came back. Redis
// keeps the order of a channel, so that one beat answers for all before it.
type beats struct {
	mu      sync.Mutex // guards the fields below
	sent    uint64     // number of the newest beat
	back    uint64     // number of the newest that came back
	waiting []sentBeat // oldest first
	until   time.Time  // beats sent before are not waited for
	pause   time.Duration
	deaf    uint64
	// counts says which ways' last beat went to a listener: only after that
	// does it mean something if one goes to nobody. There are proxies, and
	// clusters, that never count.
	counts [ways]bool
}

func newBeats() *beats { return &beats{pause: deafAfter} }

// mint makes the next beat.
func (b *beats) mint() (beat string, n uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sent++
	return beatPrefix + strconv.FormatUint(b.sent, 10), b.sent
}

// published notes that Redis took beat n, sent and confirmed at these times, and
// passed it on to so many listeners; connected says that ours is not known to be
// without connection. The beat may have come back before that. True: it went to
// nobody, where there was somebody before, and should have come to us.
func (b *beats) published(n uint64, by way, heard int64, connected bool, sent, at time.Time) (nobody bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	nobody = b.counts[by] && heard == 0
	b.counts[by] = heard > 0
	switch {
	case n <= b.back, sent.Before(b.until):
		return false
	case !nobody:
		b.waiting = append(b.waiting, sentBeat{n: n, at: at})
		return false
	case !connected:
		return false // and will not come back
	}
	b.deaf++
	b.waiting = nil
	b.until = at.Add(deafAfter)
	return true
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
	for len(b.waiting) > 0 && b.waiting[0].n <= n {
		b.waiting = b.waiting[1:]
	}
}

// deafAt says when the oldest waiting beat will have taken too long; false if
// none waits.
func (b *beats) deafAt() (time.Time, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiting) == 0 {
		return time.Time{}, false
	}
	return b.waiting[0].at.Add(deafAfter), true
}

// overdue reports whether a beat has taken too long, and then gives the
// listener time to come back, each time more until a beat is heard.
func (b *beats) overdue(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.waiting) == 0 || now.Before(b.waiting[0].at.Add(deafAfter)) {
		return false
	}
	b.deaf++
	b.waiting = nil
	b.until = now.Add(b.pause)
	b.pause = min(2*b.pause, maxQuiet)
	return true
}

// quiet forgets the waiting beats and those that are sent within the next two
// seconds: the listener is being pointed at another channel.
func (b *beats) quiet(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = nil
	b.until = now.Add(deafAfter)
	b.counts = [ways]bool{}
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
