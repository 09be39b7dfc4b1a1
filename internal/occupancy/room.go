package occupancy

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
)

const (
	// readGap is the shortest time between two readings of a room for which something
	// waits, such as watchers that come one after the other.
	readGap = 50 * time.Millisecond
	// uncertainEvery is the shortest time between two readings of uncertain numbers.
	uncertainEvery = time.Second
)

// stage is the progress of a room's reading.
type stage byte

const (
	stageIdle    stage = iota
	stageQueued        // waits in the readQueue
	stageReading       // Redis is asked
)

// waiting stands for the last update of a watcher that has none yet.
var waiting = new(Update)

// room is the numbers of one room. Times are durations since Rooms.began; 0: none.
type room struct {
	rooms *Rooms
	name  string
	refs  int // watchers; guarded by Rooms.registry

	// dirty says that an event has come since the last reading began. It is cleared with
	// mu held, and changes to true only with mu held, so that a room that is dirty
	// already needs no lock.
	dirty atomic.Bool

	mu     sync.Mutex // guards the following
	closed bool
	timer  clock.Timer // set to timerAt
	fire   func()      // of timer

	timerAt  time.Duration
	lingerAt time.Duration // when the room may be dropped

	watchers map[Watcher]*Update // the last update of each; nil: it is shown
	answered int                 // watchers that are not waiting
	shown    *Update             // the last update of most watchers; nil: all are waiting
	mixed    bool                // some have another one
	changed  chan struct{}       // closed at the end of the next reading; nil: no call of Watch waits

	numbers   numbers
	uncertain bool    // Redis may have lost a part of the room, so numbers are earlier ones
	stale     bool    // see refreshStale
	current   *Update // the numbers as an update; nil: not made yet

	confirmed bool   // the listener is subscribed to the channel
	urgent    bool   // a reading must begin soon
	serial    uint32 // changes whenever events may have been missed
	stage     stage
	failures  uint8  // readings in a row that failed
	begun     uint32 // number of the last reading that began
	complete  uint32 // number of the last reading after which nothing was missed

	readAt    time.Duration // when the last reading began
	readFrom  uint32        // serial at that time
	dueAt     time.Duration // when the last reading began that an event had caused
	checkAt   time.Duration // when the room is read without a reason
	retryAt   time.Duration // no reading begins before, because one has failed
	pushedAt  time.Duration // of the last push
	emptyAt   time.Duration // when the reading began since which the room is known to be empty
	troubleAt time.Duration // since when events may have been missed, or Redis does not answer
	lostUntil time.Duration // until when the last numbers stay, because Redis has lost the room
}

func newRoom(rs *Rooms, name string) *room {
	r := &room{rooms: rs, name: name, watchers: make(map[Watcher]*Update)}
	r.fire = func() { rs.fired(r) }
	return r
}

// close ends the room.
func (r *room) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
	r.rooms.cfg.Wheel.Cancel(&r.timer)
	clear(r.watchers)
	r.answered, r.shown = 0, nil
	r.wakeWaiters()
}

// tick handles the times that have come.
func (r *room) tick() {
	r.mu.Lock()
	r.timerAt = 0
	over := !r.closed && due(r.lingerAt, r.rooms.now())
	if !over {
		r.settle()
	}
	r.mu.Unlock()
	if over {
		r.rooms.drop(r)
	}
}

// due reports whether a time is set and has come.
func due(at, now time.Duration) bool { return at != 0 && at <= now }

// first returns the earlier of two times, of which each may be none.
func first(a, b time.Duration) time.Duration {
	if a == 0 || b != 0 && b < a {
		return b
	}
	return a
}

// settle does everything whose time has come, and sets the timer for the rest. Every
// change of the room ends with it. A push of numbers that are about to be read again
// waits for the reading.
func (r *room) settle() {
	if r.closed {
		return
	}
	now := r.rooms.now()
	r.refreshStale(now)
	if due(r.nextRead(), now) {
		r.stage = stageQueued
		if !r.rooms.queue.push(r) && r.troubleAt == 0 {
			r.troubleAt = now
		}
	}
	if r.mayPush() && r.pushTime() <= now {
		r.push(now)
	}
	r.setTimer()
}

// nextRead returns the time at which the next reading may begin.
func (r *room) nextRead() time.Duration {
	if r.stage != stageIdle || !r.confirmed || len(r.watchers) == 0 {
		return 0
	}
	at := r.checkAt
	switch {
	case r.urgent && r.begun == 0:
		at = 1
	case r.urgent:
		at = first(at, r.readAt+readGap)
	}
	if r.dirty.Load() {
		at = first(at, r.eventRead())
	}
	if at == 0 {
		return 0
	}
	return max(at, r.retryAt)
}

// eventRead returns the time from which on an event may cause a reading. It is also that
// from which on the result may be pushed, so that a push has the newest numbers.
func (r *room) eventRead() time.Duration {
	last := max(r.dueAt, r.pushedAt)
	if last == 0 {
		return 1
	}
	return last + r.rooms.interval(r.name)
}

// refreshStale decides whether the numbers are stale.
func (r *room) refreshStale(now time.Duration) {
	if r.stage == stageReading && r.troubleAt == 0 && now >= r.readAt+r.rooms.cfg.StaleAfter {
		r.troubleAt = r.readAt
	}
	stale := r.uncertain || r.troubleAt != 0 && now >= r.troubleAt+r.rooms.cfg.StaleAfter
	if stale != r.stale {
		r.stale, r.current = stale, nil
	}
}

// setTimer sets the timer to the next time at which settle or tick has something to do.
func (r *room) setTimer() {
	at := first(r.lingerAt, r.nextRead())
	if r.mayPush() {
		at = first(at, r.pushTime())
	}
	if since := r.troubleAt; !r.stale {
		if since == 0 && r.stage == stageReading {
			since = r.readAt
		}
		if since != 0 {
			at = first(at, since+r.rooms.cfg.StaleAfter)
		}
	}
	if at == r.timerAt {
		return // the usual case
	}
	r.timerAt = at
	if at == 0 {
		r.rooms.cfg.Wheel.Cancel(&r.timer)
		return
	}
	r.rooms.cfg.Wheel.Schedule(&r.timer, at-r.rooms.now(), r.fire)
}

// missed notes that events may have been missed since now.
func (r *room) missed(now time.Duration) {
	r.serial++
	r.urgent = true
	if r.numbers.known && r.troubleAt == 0 {
		r.troubleAt = now
	}
}

// upToDate reports whether the numbers show everything that is known to have happened.
func (r *room) upToDate() bool {
	return r.answerable() && r.stage == stageIdle && !r.dirty.Load() && !r.urgent
}

// answerable reports whether the numbers show everything that had happened when the last
// complete reading began.
func (r *room) answerable() bool { return r.numbers.known && r.confirmed && r.troubleAt == 0 }

// wakeWaiters wakes the calls of Watch.
func (r *room) wakeWaiters() {
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}
