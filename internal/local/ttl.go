package local

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// afterStall is the time after a late tick of the wheel in which no entry ends by
// silence. Frames that came in the meantime are still to be read.
const afterStall = 300 * time.Millisecond

// shortTTL is the longest TTL whose refreshes are all timed. A key with a longer TTL has
// seconds left when its refresh is queued.
const shortTTL = 5 * time.Second

// ttlTimers are the timers of an entry with a TTL.
type ttlTimers struct {
	silence clock.Timer // ends the entry
	refresh clock.Timer // refreshes the per-connection key in Redis
}

// armTTL starts or stops the timers of an entry by its TTL. Conn.mu is held.
func (e *entry) armTTL() {
	if e.ttl == 0 {
		e.stopTTL()
		return
	}
	if e.ttlTimers == nil {
		e.ttlTimers = new(ttlTimers)
	}
	e.armSilence(e.ttl - e.idle())
	e.armRefresh()
}

// idle returns the silence of the connection as far as it concerns this entry. The time
// before the join does not count.
func (e *entry) idle() time.Duration {
	return min(e.c.idle(), time.Since(e.c.registry.madeAt)-e.idleFrom)
}

func (e *entry) armSilence(after time.Duration) {
	e.c.registry.cfg.Wheel.Schedule(&e.ttlTimers.silence, max(after, 0), e.checkSilence)
}

// armRefresh schedules the next refresh at a third of the key's life. Its time is on a
// grid, so that refreshes of several entries share a call.
func (e *entry) armRefresh() {
	every := (e.ttl + time.Second) / 3
	grid := min(every/4, time.Second)
	since := time.Since(e.c.registry.madeAt)
	due := (since + every).Truncate(grid)
	e.c.registry.cfg.Wheel.Schedule(&e.ttlTimers.refresh, due-since, e.refreshKey)
}

// checkSilence runs on the wheel. It ends the entry if the connection has been silent for
// the TTL.
func (e *entry) checkSilence() {
	c := e.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !e.wanted() || e.ttl == 0 || e.ttlTimers == nil {
		return
	}
	if left := e.ttl - e.idle(); left > 0 {
		e.armSilence(left)
		return
	}
	if !c.registry.cfg.EndSilent {
		e.markLapsed()
		return
	}
	if stall := c.registry.cfg.Wheel.LastStall(); !stall.IsZero() && time.Since(stall) < afterStall {
		e.armSilence(afterStall)
		return
	}
	due := time.Since(c.registry.madeAt) - e.idle() + e.ttl
	pending := e.leaving.id
	e.leaveSilent(asked)         // not timed: a whole room at once would delay refreshes
	if e.leaving.id != pending { // an earlier one that is still ending keeps its own
		e.leaving.due = due
	}
	if e.idle() < e.ttl {
		e.returnOnFrame() // a frame came just before the entry began to wait for one
	}
}

// refreshKey runs on the wheel. It refreshes the key if there was a sign of life within
// the TTL. Otherwise the key may run out.
func (e *entry) refreshKey() {
	c := e.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !e.wanted() || e.ttl == 0 || e.ttlTimers == nil {
		return
	}
	e.armRefresh()
	if e.idle() >= e.ttl {
		return
	}
	p := routine
	if e.refresh || e.ttl <= shortTTL { // the last refresh still waits: a third of the key's life is over
		p = timed
	}
	e.refresh = true
	e.writer.enqueue(e, p)
}

// markLapsed leaves an entry whose TTL has passed to the server that cleans up. The next
// frame finds out whether one did. Conn.mu is held.
func (e *entry) markLapsed() {
	e.setLapsed(true)
	if e.idle() < e.ttl { // a frame came just now and saw nothing to do
		e.verifyLapsed()
	}
}

// verifyLapsed asks Redis whether the entry still exists. Conn.mu is held.
func (e *entry) verifyLapsed() {
	e.setLapsed(false)
	e.refresh, e.overdue = true, true
	e.armTTL()
	e.changed(timed)
}

// armExpiry schedules the end of the newest state, or of its first key to end. Conn.mu is
// held.
func (e *entry) armExpiry() {
	if e.expiry != nil {
		e.c.registry.cfg.Wheel.Cancel(e.expiry)
	}
	end := e.state.nextEnd()
	if end <= 0 {
		return
	}
	if e.expiry == nil {
		e.expiry = new(clock.Timer)
	}
	version, after := e.state.version, end-time.Since(e.c.registry.madeAt)
	e.c.registry.cfg.Wheel.Schedule(e.expiry, after, func() { e.expire(version) })
}

// expire runs on the wheel. It ends the state, or keys of it, unless there is a newer one.
func (e *entry) expire(version uint64) {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if !e.wanted() || e.state.version != version {
		return
	}
	if e.state.ends != nil {
		e.endKeys()
		return
	}
	e.setState(state{immediate: true})
}

func (e *entry) stopTTL() {
	if e.ttlTimers != nil {
		e.c.registry.cfg.Wheel.Cancel(&e.ttlTimers.silence)
		e.c.registry.cfg.Wheel.Cancel(&e.ttlTimers.refresh)
		e.ttlTimers = nil
	}
}

func (e *entry) stopTimers() {
	e.stopTTL()
	for _, t := range []*clock.Timer{e.expiry, e.retry} {
		if t != nil {
			e.c.registry.cfg.Wheel.Cancel(t)
		}
	}
	e.stopPace()
}

// retryLater queues the entry again after a pause, because Redis refused it by itself.
// The pause is long if Redis is full or the key has a wrong type: that does not change
// within a moment, and neither prevents the refresh of a key. Conn.mu is held.
func (e *entry) retryLater(why error) {
	if e.retry == nil {
		e.retry = new(clock.Timer)
	}
	after := retryAfter
	if e.wanted() && e.ttl > 0 && !errors.Is(why, store.ErrFull) && !errors.Is(why, store.ErrData) {
		after = refreshRetry
	}
	e.c.registry.cfg.Wheel.Schedule(e.retry, after, func() { e.writer.enqueueAgain(e) })
}

// lapsedPerWait is the number of entries that EndLapsed ends before it waits for them.
// The timeout of each write counts from its start.
const lapsedPerWait = 256

// EndLapsed ends the entries of this server in a room whose connections have been silent
// for their TTL, if nothing else ends them. It returns their number, also with an error
// because ctx ended or Redis went away halfway.
func (r *Registry) EndLapsed(ctx context.Context, room string) (int, error) {
	n := 0
	for conns := range slices.Chunk(r.InRoom(room), lapsedPerWait) {
		ended, err := endLapsed(ctx, room, conns)
		n += ended
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func endLapsed(ctx context.Context, room string, conns []*Conn) (int, error) {
	var ended []Write
	for _, c := range conns {
		c.mu.Lock()
		if e := c.entries[room]; e != nil && e.wanted() && e.ttl > 0 && e.idle() >= e.ttl {
			e.endedNow = false
			e.leaveSilent(asked)
			ended = append(ended, e.wait())
		}
		c.mu.Unlock()
	}
	failed := awaitAll(ctx, ended)
	n := 0
	for _, p := range ended {
		p.e.c.mu.Lock()
		if p.e.endedNow { // otherwise another server was faster
			n++
		}
		p.e.c.mu.Unlock()
	}
	return n, failed
}
