package hub

import (
	"context"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// roomsPerCall bounds the rooms of one call of Store.Positions.
	roomsPerCall = 500
	// compareTimeout bounds one such call.
	compareTimeout = 5 * time.Second
	// bucketsAtOnce bounds the buckets that are compared at the same time.
	bucketsAtOnce = 8
	// compareDelay is the time for which a requested comparison waits for others.
	compareDelay = 20 * time.Millisecond
)

// compareLoop compares the queued rooms soon and all rooms at intervals, until the
// hub stops.
func (h *Hub) compareLoop() {
	every := time.NewTicker(h.cfg.CompareEvery)
	defer every.Stop()
	failures := 0
	for {
		var list []*mirror
		var since time.Time
		select {
		case <-h.ctx.Done():
			return
		case <-every.C:
			list, since = h.allMirrors(), time.Now()
			h.reportOverdue(list)
		case <-h.toCompare.wake:
			if wait.For(h.ctx, compareDelay) != nil {
				return
			}
			list, since = h.queuedMirrors()
		}
		failed := h.compare(list, since)
		if len(failed) == 0 {
			failures = 0
			continue
		}
		failures++
		if wait.For(h.ctx, jitter(retryBackoff.After(failures))) != nil {
			return
		}
		for _, m := range failed {
			h.toCompare.add(m.room, since)
		}
	}
}

// reportOverdue reports the disconnected members whose places should have ended.
func (h *Hub) reportOverdue(list []*mirror) {
	if h.cfg.Overdue == nil {
		return
	}
	before := h.cfg.Now() - h.cfg.UnconfirmedFor.Milliseconds()
	for _, m := range list {
		m.mu.Lock()
		overdue := m.members.overdue(before)
		m.mu.Unlock()
		for _, o := range overdue {
			h.cfg.Overdue(m.room, o)
		}
	}
}

// queuedMirrors empties the compareQueue and returns the mirrors of its rooms.
func (h *Hub) queuedMirrors() (list []*mirror, since time.Time) {
	rooms, since := h.toCompare.take()
	for _, room := range rooms {
		if m := h.mirror(room); m != nil {
			list = append(list, m)
		}
	}
	return list, since
}

// compare compares mirrors with Redis. It returns those for which Redis did not
// answer.
func (h *Hub) compare(list []*mirror, since time.Time) (failed []*mirror) {
	buckets := make(map[int][]comparePoint)
	for _, m := range list {
		if c, ok := m.comparePoint(); ok {
			n := h.cfg.Bucket(m.room)
			buckets[n] = append(buckets[n], c)
		}
	}
	if len(buckets) == 0 {
		return nil
	}
	g := h.generation.learn(h.ctx, since)
	work := make([][]comparePoint, 0, len(buckets))
	for _, points := range buckets {
		work = append(work, points)
	}
	var mu sync.Mutex // guards failed
	_ = wait.Each(h.ctx, len(work), bucketsAtOnce, func(i int) error {
		rest := h.compareBucket(work[i], g, since)
		mu.Lock()
		defer mu.Unlock()
		failed = append(failed, rest...)
		return nil // the other buckets are compared all the same
	})
	return failed
}

// compareBucket compares mirrors of one bucket and returns those for which Redis did
// not answer.
func (h *Hub) compareBucket(points []comparePoint, g generation, since time.Time) (failed []*mirror) {
	for len(points) > 0 {
		n := min(len(points), roomsPerCall)
		if err := h.compareSome(points[:n], g, since); err != nil {
			h.warn("mesh: cannot compare rooms; trying again", "rooms", len(points), "error", err)
			for _, c := range points {
				failed = append(failed, c.mirror)
			}
			return failed
		}
		points = points[n:]
	}
	return nil
}

// comparePoint is the position of a mirror before Redis was asked for its own.
type comparePoint struct {
	mirror *mirror
	pos    store.Position
	empty  bool
	serial uint64
}

// compareSome compares the mirrors of one call.
func (h *Hub) compareSome(points []comparePoint, g generation, since time.Time) error {
	rooms := make([]string, len(points))
	for i := range points {
		// Again, because the calls before may have taken long.
		if c, ok := points[i].mirror.comparePoint(); ok {
			points[i] = c
		}
		rooms[i] = points[i].mirror.room
	}
	ctx, cancel := context.WithTimeout(h.ctx, compareTimeout)
	defer cancel()
	positions, err := h.cfg.Store.Positions(ctx, rooms)
	if err != nil {
		return err
	}
	for i := range min(len(points), len(positions)) {
		points[i].mirror.applyComparison(points[i], positions[i], g, since)
	}
	return nil
}

// comparePoint returns the mirror's position. It returns false if the mirror waits
// for its subscription or a snapshot, so that there is nothing to compare.
func (m *mirror) comparePoint() (comparePoint, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := comparePoint{mirror: m, pos: m.past.pos, empty: m.members.len() == 0, serial: m.sub.serial}
	return c, m.canCompare()
}

func (m *mirror) canCompare() bool {
	return m.live && m.sub.confirmed && !m.closed && !m.read.needsSnapshot() && !m.read.buffersEvents()
}

// applyComparison compares the mirror with the position that Redis returned. before
// is the mirror's position when Redis was asked. Events may have arrived since, and
// others may be on their way.
func (m *mirror) applyComparison(before comparePoint, p store.Position, g generation, asked time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.canCompare() || m.sub.serial != before.serial {
		return // another comparison or a snapshot follows
	}
	switch m.compareWith(before, p) {
	case same:
		m.sub.compared, m.generation = true, g
		m.wakeWaiters()
	case behind:
		m.sub.checkpoint = checkpoint{pos: p, until: time.Now().Add(deliveryDelay), asked: asked, generation: g, serial: m.sub.serial}
	case differs:
		m.fetchSnapshot(m.compareCause(), asked)
	}
	m.rearm()
}

// compareCause returns the cause of a snapshot after a comparison.
func (m *mirror) compareCause() Cause {
	if !m.sub.compared {
		return CauseResubscribed
	}
	return CauseCompare
}

// comparison is the result of a comparison.
type comparison byte

const (
	same    comparison = iota
	behind             // the mirror has not reached the position of Redis; events may be on their way
	differs            // no event leads from one to the other
)

func (m *mirror) compareWith(before comparePoint, p store.Position) comparison {
	pos := m.past.pos
	switch {
	case p == pos:
		return same
	case p.None():
		// Either the room is empty, or its first events came after Redis was asked.
		if m.members.len() == 0 || before.empty {
			return same
		}
		return differs
	case p.Epoch != pos.Epoch:
		if p.Epoch == before.pos.Epoch {
			return same // a new epoch began since Redis was asked
		}
		return behind
	case p.Seq > pos.Seq:
		return behind
	case before.pos.Epoch == p.Epoch && p.Seq < before.pos.Seq:
		return differs // Redis went back
	}
	// The mirror has passed the position since Redis was asked, or is at it.
	if tag, known := m.past.recall(p.Seq); known && tag != p.Tag {
		return differs
	}
	return same
}
