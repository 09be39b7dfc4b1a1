package kept

import (
	"context"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// followEvery is the least time between two looks at an index that is followed because
// places got no timer.
const followEvery = 250 * time.Millisecond

// lookEvery is the least time between two looks at the index of all buckets.
const lookEvery = 150 * time.Millisecond

// look finds the buckets with overdue places, and plans to read their index after the
// turn of the servers that know these places. Before that it makes a write in each of
// them, so that it notices an outage from now on.
func (s *Sweeper) look() {
	var first []int64
	err := s.call(lookWithin, func(ctx context.Context) (err error) {
		first, err = s.cfg.Store.NextKept(ctx, s.all)
		return err
	})
	now, ok := s.cfg.Clock()
	if err != nil || !ok {
		if s.life.Err() == nil {
			s.cfg.Logger.Debug("mesh: kept places not looked for", "error", err)
		}
		return
	}
	var overdue []int
	for n, until := range first {
		switch {
		case until == 0:
		case until <= now:
			overdue = append(overdue, n)
		default:
			s.lookBy(until)
		}
	}
	// Writes has the outcome of the writes.
	_ = wait.Each(s.life, len(overdue), bucketsAtOnce, func(i int) error {
		if n := overdue[i]; !s.cfg.MayEnd(n, first[n]) {
			_ = s.try(n)
		}
		return nil
	})
	at := time.Now().Add(othersTurn + jitter())
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range overdue {
		s.bucketLocked(n).readBy(at)
	}
}

// lookBy plans to look at the index of all buckets when the time of a place is over (until,
// 0: there is none), unless a heartbeat comes before. The server that was told of the
// place may have shut down, and then every other server has to notice.
func (s *Sweeper) lookBy(until int64) {
	at, _, ok := s.localTime(until)
	left := time.Until(at)
	if until == 0 || !ok || left > s.cfg.Heartbeat {
		return
	}
	if left < lookEvery {
		at = time.Now().Add(lookEvery)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lookAt.IsZero() || at.Before(s.lookAt) {
		s.lookAt = at
	}
}

// read ends the overdue places that the index of a bucket lists, page by page. If it may
// not end them now, it plans to read the index again. After a failed read the next
// heartbeat does that.
func (s *Sweeper) read(n int) {
	for skip := 0; ; {
		var page []store.KeptPlace
		var next int
		err := s.call(callWithin, func(ctx context.Context) (err error) {
			page, next, err = s.cfg.Store.Kept(ctx, n, skip, pageSize)
			return err
		})
		now, ok := s.cfg.Clock()
		if err != nil || !ok {
			if s.life.Err() == nil {
				s.cfg.Logger.Debug("mesh: kept places not read", "bucket", n, "error", err)
			}
			s.plan(n, func(b *bucket) { b.follow = 0 })
			return
		}
		due, later := s.overdue(n, page, now)
		gone, ok := s.end(n, due)
		switch {
		case !ok:
			s.plan(n, func(b *bucket) { b.readBy(b.heldUntil) })
			return
		case later != 0 || next == 0:
			s.follow(n, later)
			s.lookBy(later)
			return
		}
		// Places that have ended are no longer there to be skipped.
		skip = next - gone
	}
}

// overdue returns the overdue places of a page, and the first deadline on it that is not
// over (0: there is none). Places that Redis refuses to end wait for their own time.
func (s *Sweeper) overdue(n int, page []store.KeptPlace, now int64) (due []*place, later int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range page {
		if p.Until > now {
			return due, p.Until
		}
		id := placeID{p.Room, p.Conn, p.Entry}
		if !s.places.refused(id) {
			due = append(due, &place{placeID: id, until: p.Until, bucket: n, index: -1})
		}
	}
	return due, 0
}

// follow plans the next look at an index that is followed, whose next deadline is later.
func (s *Sweeper) follow(n int, later int64) {
	at, _, ok := s.localTime(later)
	if soon := time.Now().Add(followEvery); at.Before(soon) {
		at = soon
	}
	s.plan(n, func(b *bucket) {
		if later == 0 || later > b.follow || !ok {
			b.follow = 0
			return
		}
		b.readBy(at)
	})
}

// plan changes the state of a bucket.
func (s *Sweeper) plan(n int, change func(*bucket)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s.bucketLocked(n))
}
