package meshtest

import (
	"fmt"
	"strings"
	"time"

	"github.com/alicebob/miniredis/v2"
)

const (
	// share is which part of the time moving the clock may take: one eighth.
	// Moving costs miniredis a sort of all its keys.
	share = 8
	// maxPause bounds how coarse the clock may become for that.
	maxPause = 250 * time.Millisecond
	// maxIdle is how long the clock may stand while nothing that is known of
	// runs out: TTLs of hash fields, and those set past the hook, run too.
	maxIdle = time.Second
)

// clock is the one clock of a Redis. It stands still between calls of
// Redis.move, so TIME and TTLs cannot differ.
type clock struct {
	mini   *miniredis.Miniredis
	base   time.Time     // when the Redis was started
	offset time.Duration // by Advance
	now    time.Time     // what the Redis thinks it is
	cost   time.Duration // of the last move
	pause  time.Duration // not moved again before that
}

func (c *clock) init(m *miniredis.Miniredis, start time.Time) {
	c.mini, c.base, c.now = m, start, start
	m.SetTime(start.UTC())
}

// target is where the clock should be now. It follows the monotonic clock, or
// that of the bubble.
func (c *clock) target() time.Time { return c.base.Add(time.Since(c.base) + c.offset) }

// move brings the clock up to date and publishes what ran out, unless it was
// moved so recently that it would cost too much. r.turn is held.
func (r *Redis) move(force bool) {
	c, target := &r.time, r.time.target()
	elapsed := target.Sub(c.now)
	if elapsed == 0 || elapsed < c.pause && !force {
		return
	}
	began := time.Now()
	due := r.index.due(r.mini, c.now, target)
	r.mini.FastForward(elapsed)
	r.mini.SetTime(target.UTC())
	c.now = target
	r.publishExpired(due)
	// The cheaper of the last two: one that was interrupted says nothing.
	cost := time.Since(began)
	c.pause = min(share*min(cost, c.cost), maxPause)
	c.cost = cost
}

// publishExpired tells of keys that ran out, as notify-keyspace-events says.
// r.turn is held: whoever hears of it finds the key gone.
func (r *Redis) publishExpired(due []expiry) {
	if len(due) == 0 || r.cfg.mute {
		return
	}
	r.mu.Lock()
	flags := r.events
	r.mu.Unlock()
	if !strings.ContainsAny(flags, "xA") {
		return
	}
	for _, e := range due {
		if strings.Contains(flags, "K") {
			r.mini.Publish(fmt.Sprintf("__keyspace@%d__:%s", e.db, e.key), "expired")
		}
		if strings.Contains(flags, "E") {
			r.mini.Publish(fmt.Sprintf("__keyevent@%d__:expired", e.db), e.key)
		}
	}
}

// runTicker moves the clock while no command does, whenever a key runs out.
func (r *Redis) runTicker() {
	ticker := time.NewTicker(r.cfg.tick)
	defer ticker.Stop()
	for {
		select {
		case <-r.stop:
			return
		case <-ticker.C:
			r.tick()
		}
	}
}

func (r *Redis) tick() {
	r.mu.Lock()
	hung := r.hung != nil
	r.mu.Unlock()
	if hung {
		return
	}
	r.turn.Lock()
	defer r.turn.Unlock()
	target := r.time.target()
	if r.index.dueBy(r.mini, r.time.now, target) || target.Sub(r.time.now) >= maxIdle {
		r.move(false)
	}
}

// Advance moves the clock of the Redis by d, as when the clock of its machine
// is set: TIME jumps, and so does every TTL; keys whose time has then come run
// out at once. A negative d gives all keys that much longer.
func (r *Redis) Advance(d time.Duration) {
	r.turn.Lock()
	defer r.turn.Unlock()
	r.move(true)
	r.time.offset += d
	r.move(true)
}

// Now returns what the clock of the Redis shows.
func (r *Redis) Now() time.Time {
	r.turn.Lock()
	defer r.turn.Unlock()
	r.move(false)
	return r.time.now.UTC()
}
