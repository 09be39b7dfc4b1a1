package occupancy

import (
	"strings"
	"time"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// maxFloors is the number of earlier epochs for which a room keeps the highest seq that
// it showed.
const maxFloors = 8

// retryBackoff is the pause before a room is read again after Redis did not answer. A
// random half of it is left out.
var retryBackoff = wait.Backoff{First: 200 * time.Millisecond, Last: 5 * time.Second}

// numbers is the numbers of a room and their position.
type numbers struct {
	known       bool // the room has been read at least once
	certain     bool // that reading was not uncertain
	connections int
	users       int

	lost bool   // Redis had no position
	seq  uint64 // of the last reading; 0 if lost
	// epoch and shownSeq are the position that updates carry. A seq that was shown does
	// not fall. If Redis does not know the room, the position of the last epoch stays.
	epoch    string
	shownSeq uint64
	floors   []floor // of earlier epochs, by last use
}

// floor is the highest seq of an epoch that was shown to watchers.
type floor struct {
	epoch string
	seq   uint64
}

// beginReading takes the room out of the queue, when Redis is about to be asked. It
// returns false if the room is not to be read any more.
func (r *room) beginReading() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || !r.confirmed || len(r.watchers) == 0 {
		r.stage = stageIdle
		r.settle()
		return false
	}
	now := r.rooms.now()
	if r.dirty.Load() && now >= r.eventRead() {
		r.dueAt = now
	}
	r.dirty.Store(false)
	r.urgent, r.checkAt = false, 0
	r.stage, r.readAt, r.readFrom = stageReading, now, r.serial
	r.begun++
	r.settle()
	return true
}

// failReading notes that the room could not be read. If again, it is read again soon.
func (r *room) failReading(again bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.rooms.now()
	r.stage, r.urgent = stageIdle, true
	if r.troubleAt == 0 {
		r.troubleAt = r.readAt
	}
	if !again {
		r.failures = min(r.failures, 100) + 1
		r.retryAt = now + wait.Jitter(retryBackoff.After(int(r.failures)), 0.5)
	}
	r.settle()
}

// finishReading takes in the result of a reading.
func (r *room) finishReading(n *Reading) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	now := r.rooms.now()
	r.stage, r.failures, r.retryAt = stageIdle, 0, 0
	r.apply(n, now)
	r.checkAt = now + wait.Jitter(r.rooms.cfg.CompareEvery, 0.2)
	if r.uncertain {
		r.checkAt = now + max(r.rooms.interval(r.name), uncertainEvery)
	}
	if r.serial == r.readFrom {
		r.troubleAt, r.complete = 0, r.begun
	}
	r.refreshStale(now)
	if r.mayPush() && r.pushTime() <= now {
		// Before settle, which may begin the next reading: otherwise watchers that come
		// one after the other, each with a reading, would put off pushes for ever.
		r.push(now)
	}
	r.wakeWaiters()
	r.settle()
}

// apply takes in a reading, unless the last numbers stay because it is uncertain.
func (r *room) apply(n *Reading, now time.Duration) {
	lost := r.numbers.mayLack(n)
	switch {
	case !lost:
		r.lostUntil = 0
	case r.lostUntil == 0:
		r.lostUntil = now + r.rooms.cfg.UncertainFor
	}
	r.uncertain = n.Rebuilding || lost && now < r.lostUntil
	if r.uncertain && r.numbers.certain {
		return
	}
	known := r.numbers.known
	changed := r.numbers.take(n)
	switch {
	case n.Connections > 0:
		r.emptyAt = 0
	case changed && known:
		// If it was empty before, too, there were members since.
		r.emptyAt = r.readAt
	}
	if changed {
		r.current = nil
	}
	r.numbers.certain = !r.uncertain
	r.lostUntil = 0
}

// mayLack reports whether Redis may have lost connections since the last reading that
// was certain. The signs are a position that is missing, of another epoch, or an earlier
// one, and other numbers at the same position. A room whose numbers were 0 has nothing to
// lose. If a room becomes empty, its position stays for longer than CompareEvery, so the
// end of the last connection is seen before the position is gone.
func (v *numbers) mayLack(n *Reading) bool {
	p := &n.Position
	switch {
	case !v.certain || v.connections == 0 || v.lost:
		return false
	case p.Epoch != v.epoch || p.Seq < v.seq:
		return true
	}
	return p.Seq == v.seq && (n.Connections != v.connections || n.Users != v.users)
}

// take replaces the numbers. It reports whether anything has changed.
func (v *numbers) take(n *Reading) bool {
	before := *v
	v.known, v.connections, v.users = true, n.Connections, n.Users
	v.move(n.Position)
	return !before.known || before.connections != v.connections || before.users != v.users ||
		before.epoch != v.epoch || before.seq != v.seq || before.lost != v.lost
}

// move moves to another position.
func (v *numbers) move(p store.Position) {
	v.lost, v.seq = p.None(), p.Seq
	switch {
	case v.lost:
		v.seq = 0
		return
	case p.Epoch == v.epoch:
		v.shownSeq = max(v.shownSeq, p.Seq)
		return
	}
	next := floor{epoch: strings.Clone(p.Epoch), seq: p.Seq}
	kept := v.floors[:0]
	for _, f := range v.floors {
		if f.epoch == next.epoch {
			next.seq = max(next.seq, f.seq)
			continue
		}
		kept = append(kept, f)
	}
	if v.epoch != "" {
		if len(kept) == maxFloors {
			kept = append(kept[:0], kept[1:]...)
		}
		kept = append(kept, floor{epoch: v.epoch, seq: v.shownSeq})
	}
	v.floors, v.epoch, v.shownSeq = kept, next.epoch, next.seq
}
