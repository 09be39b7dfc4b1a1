package occupancy

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// roomsPerCall bounds the rooms of one call.
	roomsPerCall = 500
	// gatherFor is the time for which the first room of a call waits for others.
	gatherFor = 5 * time.Millisecond
	// sharedTimeout bounds a call with rooms of all buckets, and aloneTimeout one with
	// rooms of one bucket, whose Redis node did not answer before.
	sharedTimeout = time.Second
	aloneTimeout  = 5 * time.Second
)

// readQueue runs the readings. Rooms of all buckets share one line, and one call of it
// reads many of them, so that many rooms cost one round trip per Redis node. If such a
// call fails, the buckets of its rooms get lines of their own until they answer: a Redis
// node that does not answer delays only its own rooms. Each line has one call under way
// at most. The goroutines exist only while there is work.
type readQueue struct {
	rooms *Rooms

	mu     sync.Mutex // guards the following, and the fields of lines
	closed bool
	shared *line
	alone  map[int]*line // by bucket
}

// line is the rooms that one goroutine reads.
type line struct {
	bucket  int // of a line of its own
	alone   bool
	failing bool // the last call failed
	waiting []*room
	running bool
}

func newReadQueue(rs *Rooms) *readQueue {
	return &readQueue{rooms: rs, shared: new(line), alone: make(map[int]*line)}
}

// push queues the reading of a room, which must not be queued or under way. It returns
// false if Redis is not known to answer. After close it does nothing.
func (q *readQueue) push(r *room) bool {
	bucket := q.rooms.cfg.Bucket(r.name)
	q.mu.Lock()
	defer q.mu.Unlock()
	l := q.alone[bucket]
	if l == nil {
		l = q.shared
	}
	q.add(l, r)
	return !l.failing
}

// add adds a room to a line. The caller holds q.mu.
func (q *readQueue) add(l *line, r *room) {
	if q.closed {
		return
	}
	l.waiting = append(l.waiting, r)
	if !l.running {
		l.running = true
		q.rooms.wg.Go(func() { q.work(l) })
	}
}

// work reads the rooms of a line until none is left.
func (q *readQueue) work(l *line) {
	_ = wait.For(q.rooms.ctx, gatherFor) // if it fails, take returns none
	for batch := q.take(l); len(batch) > 0; batch = q.take(l) {
		timeout := sharedTimeout
		if l.alone {
			timeout = aloneTimeout
		}
		asked, err := q.rooms.read(batch, timeout)
		q.note(l, asked, err)
		if err == nil {
			continue
		}
		if l.alone && q.rooms.ctx.Err() == nil {
			q.rooms.log.Warn("mesh: cannot read the numbers of rooms; trying again", "rooms", len(asked), "error", err)
		}
		for _, r := range asked {
			r.failReading(!l.alone)
		}
	}
}

// take removes the rooms that have waited longest. If there are none, the goroutine must
// end, and a bucket that answers has no line of its own any more.
func (q *readQueue) take(l *line) []*room {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		l.waiting = nil
	}
	n := min(len(l.waiting), roomsPerCall)
	if n == 0 {
		l.waiting, l.running = nil, false
		if l.alone && !l.failing {
			delete(q.alone, l.bucket)
		}
		return nil
	}
	batch := l.waiting[:n:n]
	l.waiting = l.waiting[n:]
	return batch
}

// close drops the queued readings and makes the goroutines end soon. The caller waits for
// them.
func (q *readQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
}

// note notes the result of a call. After a shared call that failed, the buckets of its
// rooms get lines of their own.
func (q *readQueue) note(l *line, asked []*room, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case len(asked) == 0:
	case l.alone:
		l.failing = err != nil
	case err != nil:
		q.separate(asked)
	}
}

// separate gives the buckets of some rooms lines of their own. The caller holds q.mu.
func (q *readQueue) separate(batch []*room) {
	for _, r := range batch {
		bucket := q.rooms.cfg.Bucket(r.name)
		if q.alone[bucket] == nil {
			q.alone[bucket] = &line{bucket: bucket, alone: true}
		}
	}
	rest := q.shared.waiting
	q.shared.waiting = nil
	for _, r := range rest {
		if l := q.alone[q.rooms.cfg.Bucket(r.name)]; l != nil {
			q.add(l, r)
		} else {
			q.shared.waiting = append(q.shared.waiting, r)
		}
	}
}

// read reads rooms with one call. It returns those that Redis was asked for. After an
// error they wait for failReading.
func (rs *Rooms) read(batch []*room, timeout time.Duration) (asked []*room, err error) {
	asked = make([]*room, 0, len(batch))
	names := make([]string, 0, len(batch))
	for _, r := range batch {
		if r.beginReading() {
			asked, names = append(asked, r), append(names, r.name)
		}
	}
	if len(asked) == 0 {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(rs.ctx, timeout)
	defer cancel()
	rs.counters.calls.Add(1)
	rs.counters.readings.Add(uint64(len(names)))
	got, err := rs.cfg.Store.Occupancy(ctx, names...)
	if err == nil && len(got) != len(names) {
		err = fmt.Errorf("mesh: numbers of %d rooms instead of %d", len(got), len(names))
	}
	if err != nil {
		rs.counters.failures.Add(1)
		return asked, err
	}
	for i, r := range asked {
		reading := ReadingOf(&got[i])
		r.finishReading(&reading)
	}
	return asked, nil
}
