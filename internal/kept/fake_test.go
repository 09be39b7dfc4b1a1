package kept

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

var errCut = fmt.Errorf("%w: connection refused", store.ErrUnavailable)

// clockOffset is the lead of the clock of Redis.
const clockOffset = time.Hour

// redis models records of kept places and their index. The room of a place is named after
// its bucket.
type redis struct {
	mu      sync.Mutex
	records map[placeID]int64
	left    map[placeID][]int64 // times of the leaves
	listed  map[placeID]int64   // the index
	order   map[int][]store.KeptPlace
	refuse  map[placeID]bool // the room holds something else
	calls   map[string]int
	names   int // places named in CleanUp
}

func newRedis() *redis {
	return &redis{
		records: map[placeID]int64{}, left: map[placeID][]int64{}, listed: map[placeID]int64{}, order: map[int][]store.KeptPlace{},
		refuse: map[placeID]bool{}, calls: map[string]int{},
	}
}

func (r *redis) do(f func()) { r.mu.Lock(); defer r.mu.Unlock(); f() }

func (r *redis) nowLocked() int64 { return time.Now().Add(clockOffset).UnixMilli() }

func (r *redis) now() (now int64) { r.do(func() { now = r.nowLocked() }); return now }

func bucketOf(room string) int { b, _ := strconv.Atoi(room); return b }

func id(bucket, n int) placeID {
	return placeID{strconv.Itoa(bucket), "c" + strconv.Itoa(n), "e" + strconv.Itoa(n)}
}

// listLocked puts a place into the index.
func (r *redis) listLocked(p placeID, until int64) {
	b := bucketOf(p.room)
	r.listed[p] = until
	at := store.KeptPlace{EntryRef: store.EntryRef{Room: p.room, Conn: p.conn, Entry: p.entry}, Until: until}
	i, _ := slices.BinarySearchFunc(r.order[b], until+1, func(k store.KeptPlace, until int64) int { return int(k.Until - until) })
	r.order[b] = slices.Insert(r.order[b], i, at)
}

// keep makes n places of a bucket with one deadline, and returns it.
func (r *redis) keep(bucket, first, n int, grace time.Duration) (until int64) {
	r.do(func() {
		until = r.nowLocked() + grace.Milliseconds()
		for i := range n {
			r.records[id(bucket, first+i)] = until
			r.listLocked(id(bucket, first+i), until)
		}
	})
	return until
}

// pageLocked returns the listed places of a bucket in order, at most n of them.
func (r *redis) pageLocked(bucket, n int) []store.KeptPlace {
	live := func(k store.KeptPlace) bool { return r.listed[placeID{k.Room, k.Conn, k.Entry}] == k.Until }
	list := r.order[bucket]
	for len(list) > 0 && !live(list[0]) {
		list = list[1:]
	}
	r.order[bucket] = list
	var page []store.KeptPlace
	for _, k := range list {
		if len(page) == n {
			break
		}
		if live(k) {
			page = append(page, k)
		}
	}
	return page
}

func (r *redis) endLocked(it *store.CleanUpItem) store.CleanUpStatus {
	p := placeID{it.Room, it.Conn, it.Entry}
	until, ok := r.records[p]
	switch {
	case r.refuse[p]:
		return 0
	case !ok:
		delete(r.listed, p)
		return store.NotThere
	case until == 0: // the connection is back
		delete(r.listed, p)
		return store.Alive
	case until > r.nowLocked():
		if r.listed[p] != until {
			r.listLocked(p, until)
		}
		it.KeptUntil = until
		return store.Alive
	}
	delete(r.records, p)
	delete(r.listed, p)
	r.left[p] = append(r.left[p], r.nowLocked()-until)
	return store.Ended
}

// server is one server with its Sweeper.
type server struct {
	*Sweeper
	r     *redis
	wheel *clock.Wheel

	beats    sync.WaitGroup
	endBeats context.CancelFunc

	mu        sync.Mutex // guards the fields below
	cut       bool
	hang      bool
	readOnly  bool
	hungBelow int // writes in buckets below this hang
	noContact bool
	disabled  bool
	ahead     time.Duration // error of its estimate of the clock of Redis
	last      time.Time     // its last write
	failed    time.Time
	refused   int // calls of ClockRefused
}

func newServer(t *testing.T, r *redis, buckets int) *server {
	return newServerThatBeats(t, r, buckets, 0)
}

// newServerThatBeats is newServer with a Config.Heartbeat.
func newServerThatBeats(t *testing.T, r *redis, buckets int, every time.Duration) *server {
	t.Helper()
	s := &server{r: r, wheel: clock.NewWheel(0)}
	s.wheel.Start()
	s.Sweeper = New(Config{
		Store: s, Wheel: s.wheel, Buckets: buckets, Bucket: bucketOf, Logger: slog.New(slog.DiscardHandler),
		Clock: func() (int64, bool) { return s.estimate(), true },
		Proof: func() (store.ClockProof, bool) {
			contact := false
			s.set(func() { contact = !s.noContact })
			return store.ClockProof{Now: s.estimate(), Tolerance: time.Second}, contact
		},
		ClockRefused: func(time.Duration) { s.set(func() { s.refused++ }) },
		MayEnd: func(bucket int, deadline int64) bool {
			s.mu.Lock()
			defer s.mu.Unlock()
			return bucket >= s.hungBelow && s.last.Add(clockOffset+s.ahead).UnixMilli() >= deadline && time.Since(s.failed) >= time.Second
		},
		Enabled:   func() (on bool) { s.set(func() { on = !s.disabled }); return on },
		Heartbeat: every,
	})
	return s
}

func (s *server) set(f func()) { s.mu.Lock(); defer s.mu.Unlock(); f() }

// estimate is the clock of Redis as the server knows it.
func (s *server) estimate() (now int64) {
	s.set(func() { now = s.ahead.Milliseconds() })
	return now + s.r.now()
}

// kill ends a server.
func (s *server) kill() {
	if s.endBeats != nil {
		s.endBeats()
		s.beats.Wait()
	}
	s.Stop()
	s.wheel.Stop()
}

// add tells the server of n places.
func (s *server) add(bucket, first, n int, until int64) {
	for i := range n {
		p := id(bucket, first+i)
		s.Add(p.room, p.conn, p.entry, until)
	}
}

// heartbeats calls Renewed now and then every interval until kill.
func (s *server) heartbeats(every time.Duration) {
	var ctx context.Context
	ctx, s.endBeats = context.WithCancel(context.Background())
	s.beats.Go(func() {
		for ctx.Err() == nil {
			s.Renewed()
			_ = wait.For(ctx, every)
		}
	})
}

// call runs a script unless the link is cut.
func (s *server) call(ctx context.Context, name string, script func()) error {
	s.mu.Lock()
	cut, hang := s.cut || s.readOnly && (name == "write" || name == "clean up"), s.hang
	s.mu.Unlock()
	began := time.Now()
	if hang {
		<-ctx.Done()
	}
	if cut || hang {
		s.set(func() { s.failed = time.Now() })
		return errors.Join(errCut, ctx.Err())
	}
	time.Sleep(time.Millisecond)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	s.r.do(func() { s.r.calls[name]++; script() })
	if name == "write" {
		s.set(func() { s.last = began })
	}
	return nil
}

func (s *server) TryWrite(ctx context.Context, bucket int) error {
	below := 0
	s.set(func() { below = s.hungBelow })
	if bucket < below {
		<-ctx.Done()
		return ctx.Err()
	}
	return s.call(ctx, "write", func() {})
}

func (s *server) Kept(ctx context.Context, bucket, skip, limit int) (places []store.KeptPlace, next int, err error) {
	err = s.call(ctx, "kept", func() {
		places = s.r.pageLocked(bucket, skip+limit)
		places = places[min(skip, len(places)):]
		if len(places) == limit {
			next = skip + limit
		}
	})
	return places, next, err
}

func (s *server) NextKept(ctx context.Context, buckets []int) (first []int64, err error) {
	err = s.call(ctx, "next", func() {
		first = make([]int64, len(buckets))
		for i, b := range buckets {
			if page := s.r.pageLocked(b, 1); len(page) > 0 {
				first[i] = page[0].Until
			}
		}
	})
	return first, err
}

func (s *server) OverduePlaces(ctx context.Context, before int64, f func(store.KeptPlace)) error {
	var found []store.KeptPlace
	err := s.call(ctx, "search", func() {
		for p, until := range s.r.records {
			if until > 0 && until < before {
				found = append(found, store.KeptPlace{EntryRef: store.EntryRef{Room: p.room, Conn: p.conn, Entry: p.entry}, Until: until})
			}
		}
	})
	for _, p := range found {
		f(p)
	}
	return err
}

func (s *server) CleanUp(ctx context.Context, proof store.ClockProof, items []store.CleanUpItem) (out []store.CleanUpStatus, err error) {
	var refused error
	out = make([]store.CleanUpStatus, len(items))
	err = s.call(ctx, "clean up", func() {
		if d := s.r.nowLocked() - proof.Now; max(d, -d) > proof.Tolerance.Milliseconds() {
			refused = store.ErrClock
			return
		}
		s.r.names += len(items)
		for i := range items {
			if out[i] = s.r.endLocked(&items[i]); out[i] == 0 {
				refused = store.ErrData
			}
		}
	})
	return out, errors.Join(err, refused)
}

// sim runs a test in a synctest bubble.
func sim(t *testing.T, f func(t *testing.T, r *redis)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { f(t, newRedis()) })
}

// pass lets time pass until everything is idle.
func pass(d time.Duration) { time.Sleep(d); synctest.Wait() }
