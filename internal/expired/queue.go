// Package expired ends entries and states of other servers after their keys in Redis have
// expired: those that an expired event names, and those that CleanExpired finds. An
// expired event may be late, double or false. It only makes a server look at Redis.
package expired

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/keys"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// maxLead bounds the random delay after which a server acts on a hint. The first
	// server to act ends the entry and tells the others, which then need not look. For an
	// entry, the owner's turn comes before that.
	maxLead = 300 * time.Millisecond
	// notifyWithin limits the time after its look in which a server tells the others which
	// entries have ended. If a connection joins again after that look, its key lives
	// longer than this, so no message about the old entry meets a hint about the new one.
	notifyWithin = 500 * time.Millisecond
	// lookInterval is the time between two looks through the waiting hints, and
	// blockedInterval is the same while Redis takes no writes.
	lookInterval    = 25 * time.Millisecond
	blockedInterval = 100 * time.Millisecond
	// maxHints bounds the waiting hints. More are dropped. Their entries end with their
	// owner's lease at the latest.
	maxHints = 16384
)

// Store is the part of *store.Store that this package uses.
type Store interface {
	Writes(bucket int) store.Writes
	TryWrite(ctx context.Context, bucket int) error
	Records(ctx context.Context, refs []store.EntryRef) ([]store.Record, error)
	CleanUp(ctx context.Context, proof store.ClockProof, items []store.CleanUpItem) ([]store.CleanUpStatus, error)
	Publish(ctx context.Context, channel, payload string) (int64, error)
}

// Lease is the part of *lease.Lease that this package uses.
type Lease interface {
	// ClockProof is not ok if this server may not end entries of others now.
	ClockProof() (store.ClockProof, bool)
	// ClockRefused reports that Redis refused a proof, after a call that took so long.
	ClockRefused(took time.Duration)
}

// Config configures a Queue. All fields are required, except for Kept.
type Config struct {
	Store Store
	Lease Lease
	// Owns reports whether a connection is one of this server, which ends its entries by
	// its own clock.
	Owns func(conn string) bool
	// Watches reports whether this server has subscribers of a room.
	Watches func(room string) bool
	// Bucket returns the bucket of a room.
	Bucket func(room string) int
	// Look returns after PauseUntil was called for each failover that has happened. After
	// an error a failover may have happened.
	Look func(ctx context.Context) error
	// Channel is the channel on which the servers tell each other what they have ended.
	Channel string
	// Kept is called for each entry that this server found expired and whose place is
	// kept, with the time until which it is kept (Redis time, unix ms). It must not block.
	Kept   func(room, conn, entry string, until int64)
	Logger *slog.Logger
}

// Queue holds expired hints until it is this server's turn to act on them.
type Queue struct {
	cfg  Config
	wake wait.Signal
	work sync.WaitGroup
	quit context.CancelFunc

	used, dropped, placesKept atomic.Uint64

	pausedUntil atomic.Pointer[time.Time] // until then no hint is acted on; nil: no pause yet

	trials trialWrites // in the buckets of waiting hints

	mu      sync.Mutex // guards the fields below
	waiting map[keys.Expired]queued
	lead    time.Duration // of this server's turn, for all hints of a burst
}

// queued is the rest of a hint that waits.
type queued struct {
	learned time.Time
	lead    time.Duration // of this server's turn, in the hint's burst
	bucket  int
}

// hint is a hint whose time has come.
type hint struct {
	keys.Expired
	queued
}

// turnOf returns the time that the owner has to act first, if there is no outage. Owners
// do not refresh the keys of states.
func turnOf(kind keys.Kind) time.Duration {
	if kind == keys.ConnExpired {
		return ownersTurn
	}
	return 0
}

// New returns a queue that does nothing before Start.
func New(cfg Config) *Queue {
	return &Queue{cfg: cfg, wake: wait.NewSignal(), waiting: make(map[keys.Expired]queued)}
}

// Start begins to act on hints, until Stop or the end of ctx.
func (q *Queue) Start(ctx context.Context) {
	ctx, q.quit = context.WithCancel(ctx)
	q.work.Go(func() { q.run(ctx) })
}

// Stop ends what Start began, and waits for it.
func (q *Queue) Stop() {
	q.quit()
	q.work.Wait()
	q.trials.work.Wait() // run starts them
}

// Add takes a hint. It does not block.
func (q *Queue) Add(e keys.Expired) {
	if q.cfg.Owns(e.Conn) {
		return
	}
	if e.Kind == keys.StateExpired && !q.cfg.Watches(e.Room) {
		return // a server with subscribers of that room acts
	}
	q.enqueue(e, q.cfg.Bucket(e.Room), true)
}

// enqueue makes a hint wait from now on. If wake is set it wakes run, which is only
// needed if no other hint waits.
func (q *Queue) enqueue(e keys.Expired, bucket int, wake bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if _, ok := q.waiting[e]; ok {
		return
	}
	if len(q.waiting) >= maxHints {
		q.dropped.Add(1)
		return
	}
	// Hints that arrive together have one lead. If each had its own, all servers would
	// look at a few hints at any moment, and at the same ones.
	if len(q.waiting) == 0 {
		q.lead = rand.N(maxLead)
	}
	q.waiting[e] = queued{time.Now(), q.lead, bucket}
	if len(q.waiting) == 1 && wake {
		q.wake.Set()
	}
}

// PauseUntil lets the queue act on no hint before the given time.
func (q *Queue) PauseUntil(until time.Time) { q.pausedUntil.Store(&until) }

// Paused reports whether the time of the last PauseUntil is still to come.
func (q *Queue) Paused() bool {
	until := q.pausedUntil.Load()
	return until != nil && time.Now().Before(*until)
}

// Stats are the figures of a Queue.
type Stats struct {
	Used    uint64 // hints that ended an entry or a state
	Dropped uint64 // hints that were dropped: too many, or while Redis failed
	// PlacesKept counts the entries that this server found expired and whose places are
	// kept.
	PlacesKept uint64
	Waiting    int
}

// Stats returns the figures.
func (q *Queue) Stats() Stats {
	q.mu.Lock()
	defer q.mu.Unlock()
	return Stats{Used: q.used.Load(), Dropped: q.dropped.Load(), PlacesKept: q.placesKept.Load(), Waiting: len(q.waiting)}
}

// run acts on hints when they are due. It sleeps while there are none.
func (q *Queue) run(ctx context.Context) {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		due, next := q.due(ctx, time.Now())
		if len(due) > 0 {
			q.act(ctx, due)
			continue
		}
		t.Reset(next)
		select {
		case <-ctx.Done():
			return
		case <-q.wake:
		case <-t.C:
		}
	}
}

// due removes and returns the hints whose time has come, and the time until the next
// look. In the buckets of the other hints it starts trial writes.
func (q *Queue) due(ctx context.Context, now time.Time) ([]hint, time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	buckets := make(map[int]store.Writes)
	fresh := make(map[int]bool) // whether there is a hint after which no write has succeeded
	next := time.Hour
	var due []hint
	for e, it := range q.waiting {
		w, ok := buckets[it.bucket]
		if !ok {
			w = q.cfg.Store.Writes(it.bucket)
			buckets[it.bucket] = w
		}
		turn := turnOf(e.Kind)
		at, ok := turnOver(w, it.learned, turn)
		switch {
		case !ok:
			fresh[it.bucket] = fresh[it.bucket] || w.Last.Before(it.learned)
			next = min(next, blockedInterval)
		case !mayAct(w, it.learned, turn, it.lead, now):
			next = min(next, lookInterval)
			if left := at.Add(it.lead).Sub(now); left > 0 { // otherwise it waits for a write
				next = min(next, max(left, time.Millisecond))
			}
		case len(due) < store.MaxOps:
			due = append(due, hint{e, it})
			delete(q.waiting, e)
		default:
			next = time.Millisecond
		}
	}
	for bucket := range buckets {
		q.trials.start(ctx, q.cfg.Store, bucket, fresh[bucket], q.wake.Set)
	}
	q.trials.forget(buckets)
	return due, next
}

// HandleEnded drops the hints that a message of notifyPeers names, because they have
// ended. A hint that waits is from before the message (see notifyWithin). Or it is about a
// state that began and expired within that moment; it ends with its entry at the latest.
// HandleEnded does not block.
func (q *Queue) HandleEnded(note string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for line := range strings.Lines(note) {
		kind, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		conn, room, ok := strings.Cut(rest, " ")
		if ok && len(kind) == 1 {
			delete(q.waiting, keys.Expired{Kind: keys.Kind(kind[0]), Room: room, Conn: conn})
		}
	}
}
