package meshtest

import (
	"fmt"
	"strings"
	"time"

	"github.com/alicebob/miniredis/v2"
)

const (
	// clockShare limits the time for moving the clock to one part in eight. For each move
	// miniredis sorts all its keys.
	clockShare = 8
	// maxPause limits how coarse the clock may become for that reason.
	maxPause = 250 * time.Millisecond
	// maxIdle is the longest time for which the clock stands still while no known key
	// runs out. TTLs of hash fields, and TTLs that were set past the hook, need the clock
	// too.
	maxIdle = time.Second
)

// clock is the only clock of a Redis. It stands still between calls of Redis.move, so
// that TIME and TTLs always agree.
type clock struct {
	mini   *miniredis.Miniredis
	base   time.Time     // when the Redis was started
	offset time.Duration // by Advance
	now    time.Time     // current time of the Redis
	cost   time.Duration // of the last move
	pause  time.Duration // shortest time until the next move
}

func (c *clock) init(m *miniredis.Miniredis, start time.Time) {
	c.mini, c.base, c.now = m, start, start
	m.SetTime(start.UTC())
}

// target is the time to which the clock should move now. It follows the monotonic clock,
// or that of the bubble.
func (c *clock) target() time.Time { return c.base.Add(time.Since(c.base) + c.offset) }

// move moves the clock to the current time and publishes the keys that ran out. If the
// last move was so recent that another one would cost too much, it does nothing unless
// forced. r.cmdMu is held.
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
	// Use the lower cost of the last two moves: the goroutine may have been interrupted
	// in one of them.
	cost := time.Since(began)
	c.pause = min(clockShare*min(cost, c.cost), maxPause)
	c.cost = cost
}

// publishExpired publishes the events of keys that ran out, as notify-keyspace-events
// says. r.cmdMu is held, so that a client that receives the event finds the key gone.
func (r *Redis) publishExpired(due []expiry) {
	if len(due) == 0 || r.cfg.noExpiredEvents {
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
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	target := r.time.target()
	if r.index.dueBy(r.mini, r.time.now, target) || target.Sub(r.time.now) >= maxIdle {
		r.move(false)
	}
}

// Advance moves the clock of the Redis by d, as if the clock of its machine were set.
// TIME jumps, and so does every TTL. Keys whose time has then come run out at once. A
// negative d makes the TTLs of all keys longer by that time.
func (r *Redis) Advance(d time.Duration) {
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	r.move(true)
	r.time.offset += d
	r.move(true)
}

// Now returns the time of the Redis's clock.
func (r *Redis) Now() time.Time {
	r.cmdMu.Lock()
	defer r.cmdMu.Unlock()
	r.move(false)
	return r.time.now.UTC()
}
