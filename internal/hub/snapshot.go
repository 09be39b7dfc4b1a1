package hub

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	// readTimeout bounds one snapshot, all its pages together.
	readTimeout = 10 * time.Second
	// Pauses before a snapshot is tried again because Redis did not answer.
	firstRetry, lastRetry = 100 * time.Millisecond, 3 * time.Second
	// Pauses between snapshots of a room that needs one right after another.
	firstPause, lastPause = 25 * time.Millisecond, 2 * time.Second
	// freeReads is how many snapshots in quick succession need no pause.
	freeReads = 2
)

// fetch notes that a snapshot is wanted, unless one is already: then it will
// be read later, or the one under way shows all that was known. The Redis
// process has to be asked who it is at the given time or later.
func (m *mirror) fetch(why Cause, asked time.Time) {
	if m.want >= why || m.want > CauseVerify {
		return
	}
	m.want, m.needed = why, asked
	if why != CauseVerify {
		m.held.clear()
		m.checkpoint = checkpoint{}
	}
	m.request(time.Now())
}

// worsen notes that events were dropped: only a snapshot helps.
func (m *mirror) worsen(why Cause, now time.Time) {
	if m.want <= CauseVerify {
		m.want, m.needed = why, now
	}
}

// request queues the wanted snapshot, at once or after a pause.
func (m *mirror) request(now time.Time) {
	if m.want == causeNone || m.stage != idle || !m.subscribed || !m.retryAt.IsZero() {
		return // HandleSubscribed, land or tick come back to it
	}
	if pause := m.pace(now); pause > 0 {
		m.retryAt = now.Add(pause)
		return
	}
	m.enqueue()
}

// pace returns how long to wait, so that a room which can never be read in
// one piece does not keep Redis busy.
func (m *mirror) pace(now time.Time) time.Duration {
	if m.triedAt.IsZero() || now.Sub(m.triedAt) > afterglow {
		m.churn = 0
		return 0
	}
	m.churn++
	return backoff(m.churn-freeReads, firstPause, lastPause)
}

// backoff returns the n-th pause (from 1; below: none) of a doubling series,
// with jitter of a half.
func backoff(n int, first, last time.Duration) time.Duration {
	if n < 1 {
		return 0
	}
	d := last
	if n < 16 {
		d = min(first<<(n-1), last)
	}
	return d/2 + rand.N(d)
}

// enqueue hands the mirror to the jobs.
func (m *mirror) enqueue() {
	if m.closed || m.want == causeNone || m.stage != idle || !m.subscribed {
		return
	}
	m.stage = queued
	m.hub.jobs.push(m)
}

// takeSnapshot reads a mirror's room. It runs as a job.
func (h *Hub) takeSnapshot(m *mirror) {
	ctx, cancel := context.WithTimeout(h.ctx, readTimeout)
	defer cancel()
	needed, ok := m.leaveQueue()
	if !ok {
		return
	}
	e := h.generation.learn(ctx, needed)
	readAt, later, ok := m.beginReading(needed)
	for ; !later.IsZero(); readAt, later, ok = m.beginReading(later) {
		e = h.generation.learn(ctx, later)
	}
	if !ok {
		return
	}
	snap, err := h.cfg.Store.Snapshot(ctx, m.room)
	if err != nil {
		m.land(nil, err)
		return
	}
	m.land(newFold(&snap, e, readAt), nil)
}

// leaveQueue reports whether the snapshot is still wanted, and how fresh the
// knowledge of Redis's generation must be.
func (m *mirror) leaveQueue() (needed time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.needed, m.mayRead()
}

// mayRead reports whether the queued snapshot can be read now; otherwise it
// is not queued any more.
func (m *mirror) mayRead() bool {
	if m.closed || !m.subscribed || m.want == causeNone {
		m.stage = idle
		return false
	}
	return true
}

// beginReading starts putting events aside. Those that came before were
// published before: the snapshot contains them. If the generation has to be
// known from later than the given time by now, it begins nothing and returns
// that time.
func (m *mirror) beginReading(known time.Time) (readAt, later time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.mayRead() {
		return time.Time{}, time.Time{}, false
	}
	if m.needed.After(known) {
		return time.Time{}, m.needed, false
	}
	now := time.Now()
	if len(m.held.list) > 0 && m.want == CauseVerify {
		m.want = CauseGap // what is held goes; the generation is known well enough
	}
	m.held.clear()
	m.checkpoint = checkpoint{}
	m.stage, m.spoiled = reading, false
	m.pending.clear()
	m.rearm()
	return now, time.Time{}, true
}

// land takes what was read.
func (m *mirror) land(f *fold, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	now := time.Now()
	m.triedAt = now
	switch {
	case err != nil:
		m.readFailed(err, now)
	case m.spoiled || !m.subscribed:
		m.failed = 0
		m.discard(now)
	default:
		m.failed = 0
		m.stage, m.fold = folding, f
		m.merge(now)
	}
	m.rearm()
	m.wakeWaiters()
}

// readFailed puts the snapshot off. A mirror that only wanted to be sure goes
// on with the events that came meanwhile.
func (m *mirror) readFailed(err error, now time.Time) {
	m.hub.counters.failures.Add(1)
	m.hub.warn("mesh: cannot read a room; trying again", "room", m.room, "error", err)
	m.failed++
	m.outage = true
	m.stage = idle
	m.retryAt = now.Add(backoff(m.failed, firstRetry, lastRetry))
	rest := m.pending.take()
	if m.spoiled {
		m.spoiled = false
		m.worsen(CauseOverflow, now)
	}
	if m.want == CauseVerify {
		for _, p := range rest {
			m.receive(p.ev, p.size, now)
		}
	}
}

// merge brings the snapshot and the events together, as far as they came.
func (m *mirror) merge(now time.Time) {
	switch m.fold.merge(&m.pending) {
	case complete:
		m.install(now)
	case broken:
		m.discard(now)
	case waiting:
		if m.foldUntil.IsZero() {
			m.foldUntil = now.Add(foldFor)
		}
	}
}

// discard gives up what was read, and reads again.
func (m *mirror) discard(now time.Time) {
	m.hub.counters.discarded.Add(1)
	m.stopReading(now)
	m.triedAt = now
	m.request(now)
}

// stopReading drops what was read and the events put aside meanwhile.
func (m *mirror) stopReading(now time.Time) {
	m.worsen(CauseOverflow, now)
	m.stage, m.fold, m.foldUntil, m.spoiled = idle, nil, time.Time{}, false
	m.pending.clear()
}
