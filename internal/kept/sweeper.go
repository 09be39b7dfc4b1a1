// Package kept ends kept places whose time is over. A kept place has no owner, so any
// server may end it. The server that was told of a place ends it at its deadline. The
// others look at the index of kept places at each heartbeat, and when the time of the
// first place in it is over. They end what is overdue if that server is gone.
//
// The record of a place decides whether its time is over, on the clock of Redis. So no
// place ends early, whatever this package believes.
package kept

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/histogram"
	"github.com/meshpresence/mesh/internal/store"
)

const (
	// maxPlaces bounds the places with a timer. For others the index is read.
	maxPlaces = 10_000
	// pageSize is the number of places that the worker ends before it looks what else is
	// due. It is also the length of a page of the index.
	pageSize = 4 * store.MaxOps
	// othersTurn is the time in which a place may be ended by the server that was told of
	// it in time, and in which a user may come back after an outage, before other servers
	// end it. othersJitter is the most that is added at random, so that not all servers
	// end the same places at the same moment.
	othersTurn   = 400 * time.Millisecond
	othersJitter = 300 * time.Millisecond
)

// Store is the part of *store.Store that this package uses.
type Store interface {
	Kept(ctx context.Context, bucket, skip, limit int) (places []store.KeptPlace, next int, err error)
	NextKept(ctx context.Context, buckets []int) ([]int64, error)
	OverduePlaces(ctx context.Context, before int64, f func(store.KeptPlace)) error
	CleanUp(ctx context.Context, proof store.ClockProof, items []store.CleanUpItem) ([]store.CleanUpStatus, error)
	TryWrite(ctx context.Context, bucket int) error
}

// Config configures a Sweeper. All fields are required, except for Heartbeat.
type Config struct {
	Store Store
	// Wheel has to run.
	Wheel   *clock.Wheel
	Buckets int
	// Bucket returns the bucket of a room.
	Bucket func(room string) int
	// Clock returns the time of Redis (unix ms) as this server knows it. It is not ok if
	// Redis never answered.
	Clock func() (now int64, ok bool)
	// Proof is not ok if this server may not end entries of others now.
	Proof func() (store.ClockProof, bool)
	// ClockRefused reports that Redis refused a proof, after a call that took so long.
	ClockRefused func(took time.Duration)
	// MayEnd reports whether this server may end a place with the given deadline: a write
	// of its own has succeeded after the deadline, and no call has failed for a second.
	MayEnd func(bucket int, deadline int64) bool
	// Enabled reports whether there is a rule with a grace. Otherwise heartbeats cost
	// nothing.
	Enabled func() bool
	// Heartbeat is the time between two calls of Renewed. Places whose time is over before
	// the next call are looked for at that time. 0: only Renewed looks for places.
	Heartbeat time.Duration
	Logger    *slog.Logger
}

// Sweeper ends kept places. All methods are safe for concurrent use, and only Stop
// blocks. While nothing is due, a Sweeper has no goroutine, and one timer at most.
type Sweeper struct {
	cfg  Config
	all  []int // the buckets
	life context.Context
	quit context.CancelFunc
	work sync.WaitGroup

	graceOver, spilled atomic.Uint64
	lag                *histogram.Histogram

	mu        sync.Mutex // guards the fields below
	stopped   bool
	running   bool // the worker runs, and arms the timer when it ends
	heartbeat bool // the index of all buckets has to be looked at
	// lookAt is when the index of all buckets is looked at without a heartbeat. Zero: never.
	lookAt    time.Time
	searchAt  time.Time // when the records are looked at; zero: not planned
	searching bool
	places    queue
	buckets   map[int]*bucket
	timer     clock.Timer
}

// bucket is what a Sweeper knows of a bucket that needs its attention.
type bucket struct {
	// readAt is the time at which the index is read. Zero: never.
	readAt time.Time
	// follow is the latest deadline (Redis time, unix ms) of a place that got no timer.
	// Until then the index is read at each deadline that it lists. 0: there is none.
	follow int64
	// After failures in a row nothing ends before heldUntil.
	failures  int
	heldUntil time.Time
}

// Stats are the figures of a Sweeper.
type Stats struct {
	GraceOver uint64 // places that this server ended
	// Lag counts them by the time from the deadline to the end.
	Lag     histogram.Counts
	Pending int    // places with a timer
	Spilled uint64 // places that got no timer, because there were too many
}

// New returns a Sweeper that does nothing until it is told of a place or a heartbeat.
func New(cfg Config) *Sweeper {
	s := &Sweeper{cfg: cfg, lag: histogram.New(histogram.Lags()...), buckets: make(map[int]*bucket)}
	for b := range cfg.Buckets {
		s.all = append(s.all, b)
	}
	s.places.of = make(map[placeID]*place)
	s.life, s.quit = context.WithCancel(context.Background())
	return s
}

// Add tells the Sweeper of a kept place and its deadline (Redis time, unix ms). If the
// deadline is over, another server that was told in time has its turn first. Adding a
// place again does nothing.
func (s *Sweeper) Add(room, conn, entry string, until int64) {
	at, over, ok := s.localTime(until)
	if !ok {
		return // the index has it
	}
	if over {
		at = time.Now().Add(othersTurn + jitter())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return
	}
	s.addLocked(&place{placeID: placeID{room, conn, entry}, until: until, bucket: s.cfg.Bucket(room), at: at})
	s.armLocked()
}

// addLocked gives a place a timer. If there are too many, its bucket is read instead.
func (s *Sweeper) addLocked(p *place) {
	if s.places.add(p) {
		return
	}
	s.spilled.Add(1)
	b := s.bucketLocked(p.bucket)
	b.follow = max(b.follow, p.until)
	b.readBy(p.at)
}

// Renewed tells the Sweeper that this server has renewed its lease. It then looks for
// overdue places of all buckets.
func (s *Sweeper) Renewed() {
	if !s.cfg.Enabled() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.heartbeat = true
	s.wakeLocked()
	s.searchLocked()
}

// Stop ends everything that the Sweeper does, and waits for it. Places that are left are
// in the index, for other servers.
func (s *Sweeper) Stop() {
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.quit()
	s.cfg.Wheel.Cancel(&s.timer)
	s.work.Wait()
}

// Stats returns the figures.
func (s *Sweeper) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{GraceOver: s.graceOver.Load(), Lag: s.lag.Counts(), Pending: len(s.places.heap), Spilled: s.spilled.Load()}
}

// bucketLocked returns the state of a bucket.
func (s *Sweeper) bucketLocked(n int) *bucket {
	b := s.buckets[n]
	if b == nil {
		b = new(bucket)
		s.buckets[n] = b
	}
	return b
}

// readBy plans to read the index no later than at the given time.
func (b *bucket) readBy(at time.Time) {
	if b.readAt.IsZero() || at.Before(b.readAt) {
		b.readAt = at
	}
}

// idle reports whether there is nothing to remember of a bucket.
func (b *bucket) idle() bool { return b.readAt.IsZero() && b.follow == 0 && b.failures == 0 }
