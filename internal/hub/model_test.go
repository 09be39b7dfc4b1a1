package hub

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// chaos is a random history of one room, and a network between Redis and the
// hub that loses, doubles and reorders.
type chaos struct {
	*house
	// mu is held but while time passes: between runs on another goroutine.
	mu    sync.Mutex
	rand  *rand.Rand
	conns int
	sinks []*fakeSink
	inbox []string // on their way, not heard yet
	saved *fakeRoom
	lossy bool
}

func (c *chaos) chance(percent int) bool { return c.rand.IntN(100) < percent }

// change does something to the room and puts what it publishes on its way.
func (c *chaos) change() {
	conn := fmt.Sprintf("c%d", c.rand.IntN(c.conns))
	value := fmt.Sprint(c.rand.IntN(4))
	switch c.rand.IntN(10) {
	case 0, 1, 2:
		c.publish(c.redis.join(room, conn))
	case 3:
		c.publish(c.redis.join(room, conn, withState(value, c.chance(30))))
	case 4, 5:
		c.publish(c.redis.leave(room, conn))
	case 6, 7:
		c.publish(c.redis.state(room, conn, value, c.chance(30)))
	case 8:
		c.publish(c.redis.state(room, conn, "", false))
	case 9:
		c.publish(c.redis.meta(room, conn, value))
	}
}

// publish loses a message, or doubles it, or puts it before another.
func (c *chaos) publish(message string) {
	if message == "" || (c.lossy && c.chance(4)) {
		return
	}
	c.inbox = append(c.inbox, message)
	if c.chance(5) {
		c.inbox = append(c.inbox, message)
	}
	if n := len(c.inbox); n > 1 && c.chance(8) {
		c.inbox[n-1], c.inbox[n-2] = c.inbox[n-2], c.inbox[n-1]
	}
}

// deliver lets some messages arrive.
func (c *chaos) deliver(n int) {
	n = min(n, len(c.inbox))
	c.send(c.inbox[:n]...)
	c.inbox = c.inbox[n:]
}

// mishap is something that does not happen every day.
func (c *chaos) mishap() {
	switch c.rand.IntN(9) {
	case 0:
		c.hub.HandleLost()
		c.inbox = nil
		c.pass(time.Duration(c.rand.IntN(300)) * time.Millisecond)
		c.hub.HandleSubscribed(room, true)
	case 1:
		c.inbox = nil // and nobody noticed
		if c.chance(50) {
			c.hub.HandleSubscribed(room, true)
		}
	case 2:
		c.saved = c.redis.copy(room)
	case 3: // failover to where we were once, a moment or a while ago
		if c.saved != nil {
			c.redis.wipe(room, c.saved)
			c.redis.set(func(f *fakeRedis) { f.generation = fmt.Sprint("G", c.rand.IntN(3)) })
		}
	case 4:
		c.redis.wipe(room, nil)
	case 5:
		c.redis.set(func(f *fakeRedis) { f.away = !f.away })
	case 6:
		c.hub.Resync()
	case 7:
		if n := len(c.sinks); n > 1 {
			assert.True(c.t, c.hub.Unwatch(room, c.sinks[n-1]))
			c.sinks = c.sinks[:n-1]
		}
	case 8:
		c.pass(time.Duration(c.rand.IntN(13)) * time.Second)
	}
}

// pass lets time go by.
func (c *chaos) pass(d time.Duration) {
	if !c.lossy {
		c.deliver(len(c.inbox)) // nothing is late
	}
	c.mu.Unlock()
	defer c.mu.Lock()
	c.house.pass(d)
}

// watch adds a sink.
func (c *chaos) watch() {
	if !c.lossy {
		c.deliver(len(c.inbox))
	}
	c.mu.Unlock()
	defer c.mu.Lock()
	c.sinks = append(c.sinks, c.house.watch())
}

// between is what happens while a room is read in pages.
func (c *chaos) between(string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range c.rand.IntN(6) {
		c.change()
		if c.chance(80) {
			c.deliver(2)
		}
	}
}

func TestChaos(t *testing.T) {
	t.Parallel()
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			live(t, func(t *testing.T, h *house) { runChaos(h, seed) })
		})
	}
}

func runChaos(h *house, seed uint64) {
	c := &chaos{house: h, rand: rand.New(rand.NewPCG(seed, 1)), conns: 2 + int(seed%7), lossy: seed%3 != 0}
	c.mu.Lock()
	defer c.mu.Unlock()
	h.redis.set(func(f *fakeRedis) { f.paged, f.between = seed%2 == 0, c.between })
	h.redis.join(room, "c0")
	c.watch()
	for range 400 {
		c.change()
		if c.chance(60) {
			c.deliver(c.rand.IntN(4))
		}
		if c.chance(20) {
			c.pass(time.Duration(c.rand.IntN(40)) * time.Millisecond)
		}
		if c.chance(3) && len(c.sinks) < 6 {
			c.watch()
		}
		if c.lossy && c.chance(3) {
			c.mishap()
		}
	}
	// Redis is back and all is quiet: everybody comes to know the truth.
	h.redis.set(func(f *fakeRedis) { f.away, f.between = false, nil })
	c.deliver(len(c.inbox))
	if seed%4 < 2 {
		h.hub.HandleSubscribed(room, true)
	}
	c.pass(45 * time.Second)
	c.watch()
	for _, s := range c.sinks {
		h.agree(s)
		assert.False(h.t, c.sinks[len(c.sinks)-1].view.Stale)
	}
	if !c.lossy {
		assert.Zero(h.t, h.hub.Stats().Snapshots[CauseGap])
		assert.Zero(h.t, h.hub.Stats().Repairs)
	}
	assert.Zero(h.t, h.hub.Stats().Stale)
	assert.Zero(h.t, h.hub.Stats().Waiting)
}
