package hub

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/meshpresence/mesh/internal/wait"
)

const (
	// readTimeout bounds the reading of one snapshot with all its pages.
	readTimeout = 10 * time.Second
	// freeReads is the number of snapshots in quick succession that need no pause.
	freeReads = 2
)

var (
	// retryBackoff is the pause before the next attempt after Redis did not answer.
	// jitter is applied to it.
	retryBackoff = wait.Backoff{First: 100 * time.Millisecond, Last: 3 * time.Second}
	// repeatBackoff is the pause between snapshots of a room that needs one soon after
	// another. jitter is applied to it.
	repeatBackoff = wait.Backoff{First: 25 * time.Millisecond, Last: 2 * time.Second}
)

// jitter returns a random duration from d/2 to 3d/2.
func jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d/2 + rand.N(d)
}

// fetchSnapshot asks for a snapshot, unless one is already wanted: a snapshot that
// is not being read yet will show everything, and one that is being read shows all
// that was known. The generation of Redis must be known from the given time or
// later.
func (m *mirror) fetchSnapshot(cause Cause, asked time.Time) {
	if m.read.want >= cause || m.read.needsSnapshot() {
		return
	}
	m.read.want, m.read.needed = cause, asked
	if cause != CauseVerify {
		m.early.clear()
		m.sub.checkpoint = checkpoint{}
	}
	m.scheduleRead(time.Now())
}

// scheduleRead queues the wanted snapshot, at once or after a pause. If it cannot be
// queued now, HandleSubscribed, finishRead or tick calls it again.
func (m *mirror) scheduleRead(now time.Time) {
	if m.read.want == causeNone || m.read.stage != stageIdle || !m.sub.confirmed || !m.read.retryAt.IsZero() {
		return
	}
	if pause := m.readPause(now); pause > 0 {
		m.read.retryAt = now.Add(pause)
		return
	}
	m.enqueueRead()
}

// readPause returns the pause before the next snapshot, so that a room that can
// never be read in one piece does not keep Redis busy.
func (m *mirror) readPause(now time.Time) time.Duration {
	if m.read.triedAt.IsZero() || now.Sub(m.read.triedAt) > snapshotOverlap {
		m.read.repeats = 0
		return 0
	}
	m.read.repeats++
	return jitter(repeatBackoff.After(m.read.repeats - freeReads))
}

// enqueueRead queues the wanted snapshot.
func (m *mirror) enqueueRead() {
	if m.closed || m.read.want == causeNone || m.read.stage != stageIdle || !m.sub.confirmed {
		return
	}
	m.read.stage = stageQueued
	m.hub.toRead.push(m.room, m.takeSnapshot)
}

// takeSnapshot reads the mirror's room. The snapshotQueue calls it.
func (m *mirror) takeSnapshot() {
	h := m.hub
	ctx, cancel := context.WithTimeout(h.ctx, readTimeout)
	defer cancel()
	needed, ok := m.leaveQueue()
	if !ok {
		return
	}
	g := h.generation.learn(ctx, needed)
	readAt, later, ok := m.beginReading(needed)
	for ; !later.IsZero(); readAt, later, ok = m.beginReading(later) {
		g = h.generation.learn(ctx, later)
	}
	if !ok {
		return
	}
	snap, err := h.cfg.Store.Snapshot(ctx, m.room)
	if err != nil {
		m.finishRead(nil, err)
		return
	}
	m.finishRead(newPagedMerge(&snap, g, readAt, h.cfg.CountUsers), nil)
}

// leaveQueue reports whether the snapshot is still wanted, and from when on the
// generation must be known.
func (m *mirror) leaveQueue() (needed time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.read.needed, m.mayRead()
}

// mayRead reports whether the queued snapshot can be read now. If not, it takes the
// mirror out of the queue.
func (m *mirror) mayRead() bool {
	if m.closed || !m.sub.confirmed || m.read.want == causeNone {
		m.read.stage = stageIdle
		return false
	}
	return true
}

// beginReading starts to buffer events. Earlier events are part of the snapshot. A
// later request may need a generation that is known from a later time than the given
// one. Then beginReading returns that time and begins nothing.
func (m *mirror) beginReading(known time.Time) (readAt, later time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.mayRead() {
		return time.Time{}, time.Time{}, false
	}
	if m.read.needed.After(known) {
		return time.Time{}, m.read.needed, false
	}
	now := time.Now()
	if len(m.early.list) > 0 && m.read.want == CauseVerify {
		m.read.want = CauseGap // the early events are dropped below
	}
	m.early.clear()
	m.sub.checkpoint = checkpoint{}
	m.read.stage, m.read.spoiled = stageReading, false
	m.pending.clear()
	m.rearm()
	return now, time.Time{}, true
}

// finishRead handles the result of a read.
func (m *mirror) finishRead(p *pagedMerge, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return
	}
	now := time.Now()
	m.read.triedAt = now
	switch {
	case err != nil:
		m.readFailed(err, now)
	case m.read.spoiled || !m.sub.confirmed:
		m.read.failures = 0
		m.discard(now)
	default:
		m.read.failures = 0
		m.read.stage, m.read.merge = stageMerging, p
		m.mergeBuffered(now)
	}
	m.rearm()
	m.wakeWaiters()
}

// readFailed schedules the next attempt. If the snapshot was only to verify
// unconfirmed members, the mirror applies the events that were buffered.
func (m *mirror) readFailed(err error, now time.Time) {
	m.hub.counters.failures.Add(1)
	m.hub.warn("mesh: cannot read a room; trying again", "room", m.room, "error", err)
	m.read.failures++
	m.read.outage = true
	m.read.stage = stageIdle
	m.read.retryAt = now.Add(jitter(retryBackoff.After(m.read.failures)))
	rest := m.pending.takeAll()
	if m.read.spoiled {
		m.read.spoiled = false
		m.read.require(CauseOverflow, now)
	}
	if m.read.want == CauseVerify {
		for _, e := range rest {
			m.receive(e.ev, e.size, now)
		}
	}
}

// mergeBuffered merges the buffered events into the snapshot.
func (m *mirror) mergeBuffered(now time.Time) {
	switch m.read.merge.merge(&m.pending) {
	case complete:
		m.install(now)
	case broken:
		m.discard(now)
	case waiting:
		if m.read.mergeUntil.IsZero() {
			m.read.mergeUntil = now.Add(mergeTimeout)
		}
	}
}

// discard drops the snapshot and reads again.
func (m *mirror) discard(now time.Time) {
	m.hub.counters.discarded.Add(1)
	m.stopReading(now)
	m.read.triedAt = now
	m.scheduleRead(now)
}

// stopReading drops the snapshot and the buffered events.
func (m *mirror) stopReading(now time.Time) {
	m.read.require(CauseOverflow, now)
	m.read.stop()
	m.pending.clear()
}
