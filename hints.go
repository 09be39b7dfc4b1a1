package mesh

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// hintDelay is within which time, at random, a server acts on a hint: the
	// first one ends what ran out, the others find it gone.
	hintDelay = 300 * time.Millisecond
	// ownersTurn is what a server waits before that where an entry is at stake.
	// When Redis answered nobody for a while, too short for anybody's patience
	// to suffer, the keys of entries with a short TTL ran out meanwhile, and
	// their owners' refreshes are on the way: those come first. An owner that
	// is not heard of by then does not refresh.
	ownersTurn = 500 * time.Millisecond
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

	mu      sync.Mutex // guards waiting
	waiting map[hint]time.Time
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
	wait := rand.N(hintDelay)
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
	for _, s := range statuses {
		if s == store.Ended {
			h.acted.Add(1)
		}
	}
}
