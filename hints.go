package mesh

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// hintDelay is within which time, at random, a server acts on a hint: the
	// first one ends what ran out, and tells the others, who then need not look.
	hintDelay = 300 * time.Millisecond
	// ownersTurn is what a server waits before that where an entry is at stake.
	// When Redis answered nobody for a while, too short for anybody's patience
	// to suffer, the keys of entries with a short TTL ran out meanwhile, and
	// their owners' refreshes are on the way: those come first. An owner that
	// is not heard of by then does not refresh.
	ownersTurn = 500 * time.Millisecond
	// tellWithin is how long after it looked a server tells the others what has
	// ended. Whoever joins anew after that look keeps his key for longer, so that
	// a hint about him is never taken for one about what has ended.
	tellWithin = 500 * time.Millisecond
	// hintStep is how often waiting hints are looked through.
	hintStep = 25 * time.Millisecond
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

// hints acts on expired events that others sent: late, double, or false, they
// only make somebody look.
type hints struct {
	n    *node
	wake chan struct{}
	work sync.WaitGroup
	quit context.CancelFunc

	dropped, acted atomic.Uint64
	resting        atomic.Pointer[time.Time] // until then no hint is acted on; nil: never was told to

	mu      sync.Mutex // guards the fields below
	waiting map[hint]time.Time
	lead    time.Duration // of this server's turn, for all hints of a burst
}

func newHints(n *node) *hints {
	return &hints{n: n, wake: make(chan struct{}, 1), waiting: make(map[hint]time.Time)}
}

// add takes a hint. It does not block.
func (h *hints) add(kind expiryKind, room, conn string) {
	if _, mine := h.n.owner.Conn(conn); mine {
		return // this server's own clock knows better
	}
	if kind == expiredState && !h.n.hub.Watches(room) {
		return // nobody here to be told; a server where somebody is will see to it
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	k := hint{kind, room, conn}
	if _, ok := h.waiting[k]; ok {
		return
	}
	if len(h.waiting) >= hintsHeld {
		h.dropped.Add(1)
		return
	}
	// What comes together goes together: a turn of its own for every hint would
	// have all servers take a few each at any moment, and look at the same ones.
	if len(h.waiting) == 0 {
		h.lead = rand.N(hintDelay)
	}
	wait := h.lead
	if kind == expiredConn {
		wait += ownersTurn
	}
	h.waiting[k] = time.Now().Add(wait)
	if len(h.waiting) > 1 {
		return // it is awake, and looks again soon
	}
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
}

// run looks after hints as they come due; it sleeps while there are none.
func (h *hints) run(ctx context.Context) {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		due, next := h.due(time.Now())
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

// due takes the hints whose time has come, and says when the next one's does.
func (h *hints) due(now time.Time) ([]hint, time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	next := time.Hour
	var due []hint
	for k, at := range h.waiting {
		wait := at.Sub(now)
		if wait > 0 {
			next = min(next, wait)
		} else if len(due) < store.MaxOps {
			due = append(due, k)
			delete(h.waiting, k)
		} else {
			next = 0
		}
	}
	if len(h.waiting) > 0 {
		next = max(min(next, hintStep), time.Millisecond)
	}
	return due, next
}

// act looks at what Redis holds of the hinted entries, where the write would
// go, and ends what has run out.
//
// On a cluster the nodes fail each by itself. While one was away nobody could
// refresh what is kept there, and what ran out on the replica that took its
// place says nothing about its owner; but the lease, kept by another node, may
// have been renewed in time all along. So it is looked for failovers first:
// after one no hint is acted on for one lease, see node.failover.
func (h *hints) act(ctx context.Context, due []hint) {
	if err := h.n.expiry.Look(ctx); err != nil || h.rests() {
		h.dropped.Add(uint64(len(due)))
		return
	}
	j, ok := h.n.lease.Judge()
	if !ok {
		h.dropped.Add(uint64(len(due)))
		return
	}
	refs := make([]store.OwnedRef, len(due))
	for i, k := range due {
		refs[i] = store.OwnedRef{Room: k.room, Conn: k.conn}
	}
	records, err := h.n.store.Records(ctx, refs)
	if err != nil {
		h.dropped.Add(uint64(len(due)))
		return
	}
	var items []store.ReapItem
	var of []hint // the hints that items are about
	for i, r := range records {
		if r.Entry == "" {
			continue
		}
		item := store.ReapItem{
			Mode: store.ReapExpired, Room: due[i].room, Conn: r.Conn, Entry: r.Entry, Incarnation: r.Incarnation,
			StateVersion: r.StateVersion,
		}
		if due[i].kind == expiredState {
			item.Mode = store.ReapState
		}
		items = append(items, item)
		of = append(of, due[i])
	}
	if len(items) == 0 {
		return
	}
	if h.rests() { // since just now
		h.dropped.Add(uint64(len(items)))
		return
	}
	began := time.Now()
	statuses, err := h.n.store.Reap(ctx, j, items)
	if errors.Is(err, store.ErrClock) {
		h.n.lease.ClockRefused(time.Since(began))
	}
	if err != nil {
		h.dropped.Add(uint64(len(items)))
		h.n.opts.Logger.Debug("mesh: expired entries not ended", "error", err)
		return
	}
	var ended []hint
	for i, s := range statuses {
		if s == store.Ended {
			h.acted.Add(1)
			ended = append(ended, of[i])
		}
	}
	h.tell(ctx, ended, began)
}

// tell has the other servers forget hints about what this one has ended since
// then. With each of them looking by itself, what runs out would cost Redis the
// more, the more servers there are. Who misses it looks, and finds nothing: so
// it is left alone where it comes too late.
func (h *hints) tell(ctx context.Context, ended []hint, since time.Time) {
	ctx, cancel := context.WithDeadline(ctx, since.Add(tellWithin))
	defer cancel()
	if len(ended) == 0 || ctx.Err() != nil {
		return
	}
	var note strings.Builder
	for _, k := range ended { // ids hold no spaces, names of rooms no line ends
		fmt.Fprintf(&note, "%c %s %s\n", k.kind, k.conn, k.room)
	}
	if _, err := h.n.store.Publish(ctx, h.n.keys.Ended(), note.String()); err != nil {
		h.n.opts.Logger.Debug("mesh: ended entries not told to the other servers", "error", err)
	}
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
