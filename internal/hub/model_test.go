package hub

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

// chaos is a random history of one room, with a network between Redis and the hub
// that loses, duplicates and reorders messages.
type chaos struct {
	*harness
	// mu is held except while the test sleeps, because betweenPages runs on another
	// goroutine.
	mu    sync.Mutex
	rand  *rand.Rand
	conns int
	sinks []*fakeSink
	inbox []string // on their way
	saved *fakeRoom
	lossy bool
}

func (c *chaos) chance(percent int) bool { return c.rand.IntN(100) < percent }

// change changes the room and sends the event.
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

// publish sends a message. It may lose it, duplicate it, or reorder it.
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

// deliver delivers some messages.
func (c *chaos) deliver(n int) {
	n = min(n, len(c.inbox))
	c.send(c.inbox[:n]...)
	c.inbox = c.inbox[n:]
}

// fault causes one fault.
func (c *chaos) fault() {
	switch c.rand.IntN(9) {
	case 0:
		c.hub.HandleDisconnect()
		c.inbox = nil
		c.sleep(time.Duration(c.rand.IntN(300)) * time.Millisecond)
		c.hub.HandleSubscribed(room, true)
	case 1:
		c.inbox = nil // unnoticed
		if c.chance(50) {
			c.hub.HandleSubscribed(room, true)
		}
	case 2:
		c.saved = c.redis.copy(room)
	case 3: // failover to an earlier copy
		if c.saved != nil {
			c.redis.wipe(room, c.saved)
			c.redis.set(func(f *fakeRedis) { f.generation = fmt.Sprint("G", c.rand.IntN(3)) })
		}
	case 4:
		c.redis.wipe(room, nil)
	case 5:
		c.redis.set(func(f *fakeRedis) { f.down = !f.down })
	case 6:
		c.hub.Resync()
	case 7:
		if n := len(c.sinks); n > 1 {
			assert.True(c.t, c.hub.Unwatch(room, c.sinks[n-1]))
			c.sinks = c.sinks[:n-1]
		}
	case 8:
		c.sleep(time.Duration(c.rand.IntN(13)) * time.Second)
	}
}

// sleep sleeps without mu.
func (c *chaos) sleep(d time.Duration) {
	if !c.lossy {
		c.deliver(len(c.inbox)) // without losses no event is late
	}
	c.mu.Unlock()
	defer c.mu.Lock()
	c.harness.sleep(d)
}

// watch adds a sink.
func (c *chaos) watch() {
	if !c.lossy {
		c.deliver(len(c.inbox))
	}
	c.mu.Unlock()
	defer c.mu.Lock()
	c.sinks = append(c.sinks, c.harness.watch())
}

// betweenPages changes the room while it is read in pages.
func (c *chaos) betweenPages(string) {
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
			inBubble(t, func(t *testing.T, h *harness) { runChaos(h, seed) })
		})
	}
}

func runChaos(h *harness, seed uint64) {
	c := &chaos{harness: h, rand: rand.New(rand.NewPCG(seed, 1)), conns: 2 + int(seed%7), lossy: seed%3 != 0}
	c.mu.Lock()
	defer c.mu.Unlock()
	h.redis.set(func(f *fakeRedis) { f.paged, f.betweenPages = seed%2 == 0, c.betweenPages })
	h.redis.join(room, "c0")
	c.watch()
	for range 400 {
		c.change()
		if c.chance(60) {
			c.deliver(c.rand.IntN(4))
		}
		if c.chance(20) {
			c.sleep(time.Duration(c.rand.IntN(40)) * time.Millisecond)
		}
		if c.chance(3) && len(c.sinks) < 6 {
			c.watch()
		}
		if c.lossy && c.chance(3) {
			c.fault()
		}
	}
	// Redis is back, and nothing changes any more. All sinks then learn the truth.
	h.redis.set(func(f *fakeRedis) { f.down, f.betweenPages = false, nil })
	c.deliver(len(c.inbox))
	if seed%4 < 2 {
		h.hub.HandleSubscribed(room, true)
	}
	c.sleep(45 * time.Second)
	c.watch()
	for _, s := range c.sinks {
		h.checkSink(s)
		assert.False(h.t, c.sinks[len(c.sinks)-1].view.Stale)
	}
	if !c.lossy {
		assert.Zero(h.t, h.hub.Stats().Snapshots[CauseGap])
		assert.Zero(h.t, h.hub.Stats().Repairs)
	}
	assert.Zero(h.t, h.hub.Stats().Stale)
	assert.Zero(h.t, h.hub.Stats().Waiting)
}
