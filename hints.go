package mesh

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// hintDelay bounds the random delay after which a server acts on a hint. The
	// first server to act ends the entry and tells the others, which then need
	// not look. If an entry is at stake, ownersTurn comes before that.
	hintDelay = 300 * time.Millisecond
	// tellWithin limits the time after its look in which a server tells the others
	// which entries have ended. A connection that joins again after that look keeps its key for
	// longer, so that a hint about it is never taken for one about what ended.
	tellWithin = 500 * time.Millisecond
	// hintStep is how often waiting hints are looked through, and blockedStep is
	// that while Redis takes no writes.
	hintStep    = 25 * time.Millisecond
	blockedStep = 100 * time.Millisecond
	// hintsHeld bounds the hints that wait. More are dropped: what they are
	// about ends with its owner's lease at the latest.
	hintsHeld = 16384
)

// hint says that a key with a TTL is said to have run out.
type hint struct {
	kind expiryKind
	room string
	conn string
}

// waitingHint is a hint that waits for its time.
type waitingHint struct {
	learned time.Time
	lead    time.Duration // of this server's turn, in the hint's burst
	bucket  int
}

// dueHint is a hint whose time has come.
type dueHint struct {
	hint
	waitingHint
}

// turn is how long the owner has to act first, without an outage. A state's key
// is never refreshed.
func (k hint) turn() time.Duration {
	if k.kind == expiredConn {
		return ownersTurn
	}
	return 0
}

// hints acts on expired events that others sent: late, double, or false, they
// only make a server look.
type hints struct {
	n    *node
	wake chan struct{}
	work sync.WaitGroup
	quit context.CancelFunc

	dropped, acted atomic.Uint64
	resting        atomic.Pointer[time.Time] // until then no hint is acted on; nil: never was told to

	trials trials // of writes in the buckets of waiting hints

	mu      sync.Mutex // guards the fields below
	waiting map[hint]waitingHint
	lead    time.Duration // of this server's turn, for all hints of a burst
}

func newHints(n *node) *hints {
	return &hints{n: n, wake: make(chan struct{}, 1), waiting: make(map[hint]waitingHint)}
}

// add takes a hint. It does not block.
func (h *hints) add(kind expiryKind, room, conn string) {
	if _, mine := h.n.owner.Conn(conn); mine {
		return // this server's own clock knows better
	}
	if kind == expiredState && !h.n.hub.Watches(room) {
		return // this server has no subscribers of that room: one that has will act
	}
	h.put(hint{kind, room, conn}, h.n.keys.RoomBucket(room), true)
}

// put has a hint wait, from now on.
func (h *hints) put(k hint, bucket int, wake bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.waiting[k]; ok {
		return
	}
	if len(h.waiting) >= hintsHeld {
		h.dropped.Add(1)
		return
	}
	// Hints that arrive together have one lead. With a lead for every hint all
	// servers would take a few each at any moment, and look at the same ones.
	if len(h.waiting) == 0 {
		h.lead = rand.N(hintDelay)
	}
	h.waiting[k] = waitingHint{time.Now(), h.lead, bucket}
	if len(h.waiting) == 1 && wake { // otherwise run is awake, and looks again soon
		h.rouse()
	}
}

// rouse has run look through the hints now.
func (h *hints) rouse() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// rest has no hint acted on until the given time.
func (h *hints) rest(until time.Time) { h.resting.Store(&until) }

// rests reports whether it is to rest now.
func (h *hints) rests() bool {
	until := h.resting.Load()
	return until != nil && time.Now().Before(*until)
}

func (h *hints) start() {
	var ctx context.Context
	ctx, h.quit = context.WithCancel(h.n.life)
	h.work.Go(func() { h.run(ctx) })
}

func (h *hints) stop() {
	h.quit()
	h.work.Wait()
	h.trials.work.Wait() // run starts them
}

// run acts on hints as they come due. It sleeps while there are none.
func (h *hints) run(ctx context.Context) {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		due, next := h.due(ctx, time.Now())
		if len(due) > 0 {
			h.act(ctx, due)
			continue
		}
		t.Reset(next)
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
		case <-t.C:
		}
	}
}

// due removes and returns the hints whose time has come, and the time until the
// next look. In the buckets of the other hints it starts trial writes.
func (h *hints) due(ctx context.Context, now time.Time) ([]dueHint, time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	buckets := make(map[int]store.Writes)
	fresh := make(map[int]bool) // whether there is a hint that no write has succeeded since
	next := time.Hour
	var due []dueHint
	for k, wait := range h.waiting {
		w, ok := buckets[wait.bucket]
		if !ok {
			w = h.n.store.Writes(wait.bucket)
			buckets[wait.bucket] = w
		}
		at, ok := turnOver(w, wait.learned, k.turn())
		switch {
		case !ok:
			fresh[wait.bucket] = fresh[wait.bucket] || w.Last.Before(wait.learned)
			next = min(next, blockedStep)
		case !mayAct(w, wait.learned, k.turn(), wait.lead, now):
			next = min(next, hintStep)
			if left := at.Add(wait.lead).Sub(now); left > 0 { // otherwise a write is awaited
				next = min(next, max(left, time.Millisecond))
			}
		case len(due) < store.MaxOps:
			due = append(due, dueHint{k, wait})
			delete(h.waiting, k)
		default:
			next = time.Millisecond
		}
	}
	for bucket := range buckets {
		h.trials.want(ctx, h.n.store, bucket, fresh[bucket], h.rouse)
	}
	h.trials.forget(buckets)
	return due, next
}

// told takes in what another server, or this one, has told. What it names has
// ended: a hint that waits is of before (see tellWithin), or of a state that
// began and ran out in the moment since, which ends with its entry at the
// latest. It does not block.
func (h *hints) told(note string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for line := range strings.Lines(note) {
		kind, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		conn, room, ok := strings.Cut(rest, " ")
		if ok && len(kind) == 1 {
			delete(h.waiting, hint{expiryKind(kind[0]), room, conn})
		}
	}
}
