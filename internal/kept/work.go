package kept

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// callWithin limits one call to Redis. A write that only shows whether Redis takes
	// writes, and the look at a heartbeat, get less time: on a cluster a node that hangs
	// must not delay the places of the others.
	callWithin = 2 * time.Second
	tryWithin  = 600 * time.Millisecond
	lookWithin = time.Second
	// againAfter is the time after which a place is named again whose time was not over
	// for Redis, although it was by the estimate of this server.
	againAfter = 100 * time.Millisecond
	// bucketsAtOnce is the number of buckets in which places end, or a heartbeat writes,
	// at a time.
	bucketsAtOnce = 64
)

var (
	// hold is the pause of a bucket in which this server may not end places, or in which
	// a call failed.
	hold = wait.Backoff{First: 200 * time.Millisecond, Last: time.Second}
	// refusedPause is the pause between attempts to end a place that Redis refuses to
	// end.
	refusedPause = wait.Backoff{First: time.Second, Last: time.Minute}
)

// wakeLocked starts the worker if it does not run.
func (s *Sweeper) wakeLocked() {
	if s.stopped || s.running {
		return // a running worker looks again before it ends
	}
	s.running = true
	s.work.Go(s.run)
}

// fired is called by the timer.
func (s *Sweeper) fired() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wakeLocked()
}

// armLocked sets the timer to the next time at which there is work. While the worker
// runs, that is for the worker to do.
func (s *Sweeper) armLocked() {
	if s.stopped || s.running {
		return
	}
	var next time.Time
	if len(s.places.heap) > 0 {
		next = s.places.heap[0].at
	}
	if !s.lookAt.IsZero() && (next.IsZero() || s.lookAt.Before(next)) {
		next = s.lookAt
	}
	for n, b := range s.buckets {
		switch {
		case b.idle():
			delete(s.buckets, n)
		case !b.readAt.IsZero() && (next.IsZero() || b.readAt.Before(next)):
			next = b.readAt
		}
	}
	if next.IsZero() {
		s.cfg.Wheel.Cancel(&s.timer)
		return
	}
	s.cfg.Wheel.Schedule(&s.timer, time.Until(next), s.fired)
}

// run is the worker. It ends when nothing is due.
func (s *Sweeper) run() {
	for s.life.Err() == nil {
		job := s.next()
		if job == nil {
			return
		}
		job()
	}
}

// next returns the next thing to do. If nothing is due, it sets the timer, notes that the
// worker ends, and returns nil.
func (s *Sweeper) next() func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.heartbeat || !s.lookAt.IsZero() && !s.lookAt.After(now) {
		s.heartbeat, s.lookAt = false, time.Time{}
		return s.look
	}
	due := s.places.takeDue(now, pageSize, func(n int) time.Time {
		if b := s.buckets[n]; b != nil {
			return b.heldUntil
		}
		return time.Time{}
	})
	if len(due) > 0 {
		return func() { s.endDue(due) }
	}
	for n, b := range s.buckets {
		if b.readAt.IsZero() || b.readAt.After(now) {
			continue
		}
		if b.heldUntil.After(now) {
			b.readAt = b.heldUntil
			continue
		}
		b.readAt = time.Time{}
		return func() { s.read(n) }
	}
	s.running = false
	s.armLocked()
	return nil
}

// call makes one call to Redis within a time limit.
func (s *Sweeper) call(within time.Duration, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(s.life, within)
	defer cancel()
	return do(ctx)
}

// try makes a write that changes nothing.
func (s *Sweeper) try(n int) error {
	return s.call(tryWithin, func(ctx context.Context) error { return s.cfg.Store.TryWrite(ctx, n) })
}

// endDue ends places whose timers have run out.
func (s *Sweeper) endDue(due []*place) {
	byBucket := make(map[int][]*place)
	for _, p := range due {
		byBucket[p.bucket] = append(byBucket[p.bucket], p)
	}
	buckets := slices.Collect(maps.Keys(byBucket))
	_ = wait.Each(s.life, len(buckets), bucketsAtOnce, func(i int) error {
		s.endDueIn(buckets[i], byBucket[buckets[i]])
		return nil
	})
}

// endDueIn is endDue for one bucket.
func (s *Sweeper) endDueIn(n int, list []*place) {
	if _, ok := s.end(n, list); ok {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range list {
		if !p.done {
			p.at = s.bucketLocked(n).heldUntil
			s.addLocked(p)
		}
	}
}

// end ends places of one bucket. It returns the number of places that the index no longer
// lists as overdue. It is not ok if this server may not end places now or a call failed.
// Then the caller tries again later with those that are not done.
func (s *Sweeper) end(n int, list []*place) (gone int, ok bool) {
	for _, p := range list {
		p.done = false
	}
	for batch := range slices.Chunk(list, store.MaxOps) {
		some, ok := s.endBatch(n, batch)
		gone += some
		if !ok {
			return gone, false
		}
	}
	return gone, true
}

// endBatch is end for one call. If Redis refuses a place, it is known that none of the
// others was left out.
func (s *Sweeper) endBatch(n int, list []*place) (gone int, ok bool) {
	proof, ok := s.mayEnd(n, list)
	if !ok {
		s.holdBucket(n)
		return 0, false
	}
	items := make([]store.CleanUpItem, len(list))
	for i, p := range list {
		items[i] = p.item()
	}
	var statuses []store.CleanUpStatus
	sent := time.Now()
	err := s.call(callWithin, func(ctx context.Context) (err error) {
		statuses, err = s.cfg.Store.CleanUp(ctx, proof, items)
		return err
	})
	if err != nil && s.life.Err() == nil {
		s.cfg.Logger.Debug("mesh: kept places not ended", "bucket", n, "error", err)
	}
	if errors.Is(err, store.ErrClock) {
		s.cfg.ClockRefused(time.Since(sent))
	}
	gone = s.settle(list, items, statuses, err == nil || errors.Is(err, store.ErrData))
	if err != nil && !errors.Is(err, store.ErrData) {
		s.holdBucket(n)
		return gone, false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.buckets[n]; b != nil {
		b.failures = 0
	}
	return gone, true
}

// mayEnd reports whether this server may end places of one bucket now, and returns the
// clock proof for it. If no write has succeeded since the last deadline, it makes one.
func (s *Sweeper) mayEnd(n int, list []*place) (store.ClockProof, bool) {
	deadline := list[0].until
	for _, p := range list {
		deadline = max(deadline, p.until)
	}
	proof, ok := s.cfg.Proof()
	if !ok || s.cfg.MayEnd(n, deadline) {
		return proof, ok
	}
	if s.try(n) != nil || !s.cfg.MayEnd(n, deadline) {
		return proof, false
	}
	return s.cfg.Proof()
}

// settle takes the answers for places of one bucket. If the call was answered, a place
// without a status was refused because of the data of its room.
func (s *Sweeper) settle(list []*place, items []store.CleanUpItem, statuses []store.CleanUpStatus, answered bool) (gone int) {
	now, _ := s.cfg.Clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, p := range list {
		var status store.CleanUpStatus
		if i < len(statuses) {
			status = statuses[i]
		}
		p.done = status != 0 || answered
		until := items[i].KeptUntil
		switch {
		case status == store.Ended:
			s.graceOver.Add(1)
			s.lag.Observe(time.Duration(now-p.until) * time.Millisecond)
		case status == store.Alive && until != 0:
			if until != p.until {
				gone++ // Redis has put it into its place in the index
			}
			p.refused = 0
			s.putOffLocked(p, until)
			continue
		case status == 0 && answered:
			p.refused++
			p.at = time.Now().Add(refusedPause.After(p.refused))
			s.places.remove(p.placeID)
			s.places.add(p) // if there are too many, the next heartbeat finds it
			continue
		case status == 0:
			continue
		}
		gone++
		s.places.remove(p.placeID)
	}
	return gone
}

// putOffLocked gives a place a timer for its true deadline.
func (s *Sweeper) putOffLocked(p *place, until int64) {
	at, _, ok := s.localTime(until)
	if !ok {
		return
	}
	if soon := time.Now().Add(againAfter); at.Before(soon) {
		at = soon
	}
	p.until, p.at = until, at
	s.places.remove(p.placeID)
	s.addLocked(p)
}

// holdBucket notes a failure in a bucket.
func (s *Sweeper) holdBucket(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.bucketLocked(n)
	b.failures++
	b.heldUntil = time.Now().Add(hold.After(b.failures))
}
