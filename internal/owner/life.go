package owner

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/meshpresence/mesh/internal/clock"
	"github.com/meshpresence/mesh/internal/store"
)

// afterStall is how long nobody is judged silent after the wheel itself was
// late: the frames that came meanwhile are still to be read.
const afterStall = 300 * time.Millisecond

// shortTTL is the longest TTL of which every refresh is timed. The key of
// a longer one has seconds left when its refresh begins to wait.
const shortTTL = 5 * time.Second

// life is what an entry with a TTL needs beside the others.
type life struct {
	silence clock.Timer // the owner's clock: ends the entry
	refresh clock.Timer // keeps the per-connection key alive in Redis
}

// armLife starts or stops the timers of an entry as its TTL says. Conn.mu is held.
func (e *entry) armLife() {
	if e.ttl == 0 {
		e.stopLife()
		return
	}
	if e.life == nil {
		e.life = new(life)
	}
	e.armSilence(e.ttl - e.idle())
	e.armRefresh()
}

// idle is how long the connection has been silent as far as this entry is
// concerned: who had no reason to give a sign of life before was not silent.
func (e *entry) idle() time.Duration {
	return min(e.c.idle(), time.Since(e.c.o.born)-e.since)
}

func (e *entry) armSilence(after time.Duration) {
	e.c.o.cfg.Wheel.Schedule(&e.life.silence, max(after, 0), e.judge)
}

// armRefresh schedules the next refresh at a third of the key's life, on a
// grid, so that entries come due together and go in one call.
func (e *entry) armRefresh() {
	every := (e.ttl + time.Second) / 3
	grid := min(every/4, time.Second)
	since := time.Since(e.c.o.born)
	due := (since + every).Truncate(grid)
	e.c.o.cfg.Wheel.Schedule(&e.life.refresh, due-since, e.keep)
}

// judge runs on the wheel: has the connection been silent for the TTL?
func (e *entry) judge() {
	c := e.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !e.want || e.ttl == 0 || e.life == nil {
		return
	}
	if left := e.ttl - e.idle(); left > 0 {
		e.armSilence(left)
		return
	}
	if !c.o.cfg.EndSilent {
		e.lapse()
		return
	}
	if stall := c.o.cfg.Wheel.LastStall(); !stall.IsZero() && time.Since(stall) < afterStall {
		e.armSilence(afterStall)
		return
	}
	due := time.Since(c.o.born) - e.idle() + e.ttl
	pending := e.ending
	e.leave(store.CauseSilent, asked) // not timed: of all members of a room at once they would hold up refreshes
	if e.ending != pending {          // an earlier one that is still to be ended keeps its own
		e.due = due
	}
	e.sleep()
	if e.idle() < e.ttl {
		e.comeBack() // a frame came just now, before the entry was asleep
	}
}

// keep runs on the wheel: refresh the key if there was a sign of life within
// the TTL; otherwise it may run out.
func (e *entry) keep() {
	c := e.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !e.want || e.ttl == 0 || e.life == nil {
		return
	}
	e.armRefresh()
	if e.idle() >= e.ttl {
		return
	}
	u := routine
	if e.refresh || e.ttl <= shortTTL { // the last one still waits: a third of the key's time is gone
		u = timed
	}
	e.refresh = true
	e.lane.offer(e, u)
}

// lapse leaves an entry whose TTL has passed to whoever cleans up; the next
// frame finds out whether somebody has. Conn.mu is held.
func (e *entry) lapse() {
	if !e.lapsed {
		e.lapsed = true
		e.c.sleepers.Add(1)
	}
	if e.idle() < e.ttl { // a frame came just now, and saw nothing to do
		e.unlapse()
	}
}

// unlapse asks Redis whether the entry is still there. Conn.mu is held.
func (e *entry) unlapse() {
	e.wake()
	e.refresh, e.overdue = true, true
	e.armLife()
	e.changed(timed)
}

// armExpiry schedules the end of the state just set. Conn.mu is held.
func (e *entry) armExpiry(after time.Duration) {
	if e.expiry != nil {
		e.c.o.cfg.Wheel.Cancel(e.expiry)
	}
	if after <= 0 {
		return
	}
	if e.expiry == nil {
		e.expiry = new(clock.Timer)
	}
	version := e.state.version
	e.c.o.cfg.Wheel.Schedule(e.expiry, after, func() { e.expire(version) })
}

// expire runs on the wheel: ends the state, unless a newer one has come.
func (e *entry) expire(version uint64) {
	e.c.mu.Lock()
	defer e.c.mu.Unlock()
	if !e.want || e.state.version != version {
		return
	}
	e.setState(state{now: true})
}

func (e *entry) stopLife() {
	if e.life != nil {
		e.c.o.cfg.Wheel.Cancel(&e.life.silence)
		e.c.o.cfg.Wheel.Cancel(&e.life.refresh)
		e.life = nil
	}
}

func (e *entry) stopTimers() {
	e.stopLife()
	for _, t := range []*clock.Timer{e.expiry, e.retry} {
		if t != nil {
			e.c.o.cfg.Wheel.Cancel(t)
		}
	}
	e.stopPace()
}

// later offers the entry again after a while: Redis refused it alone. Memory is
// not freed, and an operator's key not deleted, within a moment; and neither
// refuses the refresh of a key. Conn.mu is held.
func (e *entry) later(why error) {
	if e.retry == nil {
		e.retry = new(clock.Timer)
	}
	after := retryAfter
	if e.want && e.ttl > 0 && !errors.Is(why, store.ErrFull) && !errors.Is(why, store.ErrData) {
		after = refreshRetry
	}
	e.c.o.cfg.Wheel.Schedule(e.retry, after, func() { e.lane.offerAgain(e) })
}

// lapsedTogether is the number of entries that EndLapsed ends before it waits for them. A
// write is waited for only so long from when it was asked for.
const lapsedTogether = 256

// EndLapsed ends the entries of this server in a room whose connections have
// been silent for their TTL, if nothing else ends them. It returns how many, also
// if ctx ends or Redis goes away before all of them have ended.
func (o *Owner) EndLapsed(ctx context.Context, room string) (int, error) {
	n := 0
	for conns := range slices.Chunk(o.InRoom(room), lapsedTogether) {
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
		if e := c.entries[room]; e != nil && e.want && e.ttl > 0 && e.idle() >= e.ttl {
			e.endedNow = false
			e.leave(store.CauseSilent, asked)
			e.sleep()
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
