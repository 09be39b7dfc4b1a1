package hub

import (
	"context"
	"sync"
	"time"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	// roomsPerCall is how many positions are asked for in one call.
	roomsPerCall = 500
	// compareTimeout bounds one such call.
	compareTimeout = 5 * time.Second
	// bucketsAtOnce is how many buckets are compared at a time.
	bucketsAtOnce = 8
	// gather is how long a comparison that was asked for waits for others.
	gather = 20 * time.Millisecond
)

// suspects are the mirrors to be compared with Redis soon.
type suspects struct {
	wake chan struct{}

	mu    sync.Mutex // guards the following
	since map[*mirror]time.Time
}

func newSuspects() *suspects {
	return &suspects{wake: make(chan struct{}, 1), since: make(map[*mirror]time.Time)}
}

// add asks for a comparison of m. Who Redis is must be known from the given
// time or later.
func (s *suspects) add(m *mirror, since time.Time) {
	s.mu.Lock()
	if s.since[m].Before(since) {
		s.since[m] = since
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// take empties the set.
func (s *suspects) take() (list []*mirror, since time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for m, at := range s.since {
		list = append(list, m)
		if at.After(since) {
			since = at
		}
	}
	clear(s.since)
	return list, since
}

// compareLoop compares what is suspect, and everything from time to time,
// until the hub stops.
func (h *Hub) compareLoop() {
	every := time.NewTicker(h.cfg.CompareEvery)
	defer every.Stop()
	failed := 0
	for {
		var list []*mirror
		var since time.Time
		select {
		case <-h.ctx.Done():
			return
		case <-every.C:
			list, since = h.all(), time.Now()
		case <-h.suspects.wake:
			if !h.pause(gather) {
				return
			}
			list, since = h.suspects.take()
		}
		unseen := h.compare(list, since)
		if len(unseen) == 0 {
			failed = 0
			continue
		}
		failed++
		if !h.pause(backoff(failed, firstRetry, lastRetry)) {
			return
		}
		for _, m := range unseen {
			h.suspects.add(m, since)
		}
	}
}

// pause waits; false: the hub stops.
func (h *Hub) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-h.ctx.Done():
		return false
	}
}

// compare compares mirrors with Redis. It returns those that it could not,
// because Redis did not answer.
func (h *Hub) compare(list []*mirror, since time.Time) (unseen []*mirror) {
	if len(list) == 0 {
		return nil
	}
	checks := make([]check, 0, len(list))
	for _, m := range list {
		if c, ok := m.standing(); ok {
			checks = append(checks, c)
		}
	}
	if len(checks) == 0 {
		return nil
	}
	e := h.generation.learn(h.ctx, since)
	buckets := make(map[int][]check)
	for _, c := range checks {
		b := h.cfg.Bucket(c.mirror.room)
		buckets[b] = append(buckets[b], c)
	}
	var (
		wg sync.WaitGroup
		mu sync.Mutex // guards unseen
	)
	slots := make(chan struct{}, bucketsAtOnce)
	for _, checks := range buckets {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			left := h.compareBucket(checks, e, since)
			mu.Lock()
			defer mu.Unlock()
			unseen = append(unseen, left...)
		})
	}
	wg.Wait()
	return unseen
}

// compareBucket compares mirrors of one bucket and returns those that it could
// not.
func (h *Hub) compareBucket(checks []check, e era, since time.Time) (unseen []*mirror) {
	for len(checks) > 0 {
		n := min(len(checks), roomsPerCall)
		if err := h.compareSome(checks[:n], e, since); err != nil {
			h.warn("mesh: cannot compare rooms; trying again", "rooms", len(checks), "error", err)
			for _, c := range checks {
				unseen = append(unseen, c.mirror)
			}
			return unseen
		}
		checks = checks[n:]
	}
	return nil
}

// check is where a mirror stood before Redis was asked.
type check struct {
	mirror *mirror
	pos    store.Position
	empty  bool
	serial uint64
}

// compareSome compares as many rooms as fit one call.
func (h *Hub) compareSome(checks []check, e era, since time.Time) error {
	rooms := make([]string, len(checks))
	for i := range checks {
		// Once more: other calls may have taken their time.
		if c, ok := checks[i].mirror.standing(); ok {
			checks[i] = c
		}
		rooms[i] = checks[i].mirror.room
	}
	ctx, cancel := context.WithTimeout(h.ctx, compareTimeout)
	defer cancel()
	positions, err := h.cfg.Store.Positions(ctx, rooms)
	if err != nil {
		return err
	}
	h.counters.compared.Add(uint64(len(rooms)))
	for i := range min(len(checks), len(positions)) {
		checks[i].mirror.judge(checks[i], positions[i], e, since)
	}
	return nil
}

// standing returns where the mirror stands. False: there is nothing to
// compare, it waits for its subscription or for a snapshot.
func (m *mirror) standing() (check, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := check{mirror: m, pos: m.past.pos, empty: m.roster.len() == 0, serial: m.serial}
	return c, m.comparable()
}

func (m *mirror) comparable() bool {
	return m.live && m.subscribed && !m.closed && m.want <= CauseVerify && m.stage != reading && m.stage != folding
}

// judge compares the mirror with what Redis said. Before is where the mirror
// stood when Redis was asked; events may have come since, and others may be
// on their way.
func (m *mirror) judge(before check, p store.Position, e era, asked time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.comparable() || m.serial != before.serial {
		return // it has been, or will be, compared otherwise
	}
	switch m.verdict(before, p) {
	case same:
		m.compared, m.era = true, e
		m.wakeWaiters()
	case behind:
		m.checkpoint = checkpoint{pos: p, until: time.Now().Add(inFlight), asked: asked, era: e, serial: m.serial}
	case differs:
		m.fetch(m.standsElsewhere(), asked)
	}
	m.rearm()
}

// standsElsewhere returns the cause of a snapshot that is wanted because Redis
// stands where the mirror cannot come to.
func (m *mirror) standsElsewhere() Cause {
	if !m.compared {
		return CauseResubscribed
	}
	return CauseCompare
}

// verdict is what a comparison came to.
type verdict byte

const (
	same    verdict = iota
	behind          // the mirror has yet to come to Redis's position, or cannot
	differs         // there is no way from one to the other
)

func (m *mirror) verdict(before check, p store.Position) verdict {
	pos := m.past.pos
	switch {
	case p == pos:
		return same
	case p.None():
		// Either it is empty, or its first events came after Redis was asked.
		if m.roster.len() == 0 || before.empty {
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
	// The mirror has come through that number since, or stands there.
	if tag, known := m.past.recall(p.Seq); known && tag != p.Tag {
		return differs
	}
	return same
}
