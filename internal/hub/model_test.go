package hub

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/meshpresence/mesh/internal/store"
)

var (
	hubSeeds = flag.Uint64("hub.seeds", 60, "the number of histories of TestChaos")
	hubFrom  = flag.Uint64("hub.from", 0, "the seed of the first one")
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

// change changes the room and sends the events.
func (c *chaos) change() {
	r := c.redis
	conn, other := c.conn(), c.conn()
	value := fmt.Sprint(c.rand.IntN(4))
	causes := []store.Cause{store.CauseLeft, store.CauseRemoved, store.CauseClosed, store.CauseLost, store.CauseSilent, store.CauseServerLost}
	cause := causes[c.rand.IntN(len(causes))]
	switch c.rand.IntN(14) {
	case 0, 1, 2:
		c.publish(r.joinAs(room, conn, c.user(), "", withEntry("e"+value))...)
	case 3:
		c.publish(r.joinAs(room, conn, c.user(), "", withMeta(value), withState(value, c.chance(30)))...)
	case 4:
		c.publish(r.joinAs(room, conn, c.user(), other, withEntry("e"+value))...)
	case 5, 6:
		c.publish(r.end(room, conn, cause))
	case 7, 8:
		c.publish(r.disconnect(room, conn, cause)...)
	case 9, 10:
		if rec := r.copy(room).members[conn]; !rec.Kept() {
			c.publish(r.state(room, conn, value, c.chance(30)))
		}
	case 11:
		c.publish(r.state(room, conn, "", false))
	case 12:
		c.publish(r.meta(room, conn, value))
	case 13:
		c.publish(r.metaAs(room, conn, c.user(), value)...)
	}
}

func (c *chaos) conn() string { return fmt.Sprintf("c%d", c.rand.IntN(c.conns)) }

// user returns one of few users, or none.
func (c *chaos) user() string { return []string{"", "ann", "ann", "bob"}[c.rand.IntN(4)] }

// checkInvariant checks the model itself: a user has connections in the room, or one
// kept place, and never both.
func (c *chaos) checkInvariant() {
	live, kept := map[string]int{}, map[string]int{}
	for _, rec := range c.redis.copy(room).members {
		if rec.Kept() {
			kept[rec.User]++
		} else {
			live[rec.User]++
		}
	}
	for user, n := range kept {
		assert.NotEmpty(c.t, user)
		assert.Equal(c.t, 1, n+live[user], user)
	}
}

// checkNumbers compares the numbers of the mirror with a recount, and with its view.
func (c *chaos) checkNumbers() {
	m := c.hub.mirror(room)
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	want := numbersOf(m.members.list, c.hub.cfg.CountUsers)
	assert.Equal(c.t, want.shown(), m.numbers.shown())
	assert.Equal(c.t, want.alone, m.numbers.alone)
	assert.Len(c.t, m.numbers.of, len(want.of))
	for user, n := range want.of {
		assert.Equal(c.t, n, m.numbers.of[user], user)
	}
	if v := m.view(false); m.live {
		assert.Equal(c.t, want.connections, v.Total)
		assert.Equal(c.t, want.shown().Users, v.Users)
	}
}

// publish sends messages.
func (c *chaos) publish(messages ...string) {
	for _, m := range messages {
		c.publishOne(m)
	}
}

// publishOne sends a message. It may lose it, duplicate it, or reorder it.
func (c *chaos) publishOne(message string) {
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
	for _, message := range c.inbox[:n] {
		c.send(message)
		c.checkNumbers()
	}
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
	c.checkNumbers()
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
	for seed := *hubFrom; seed < *hubFrom+*hubSeeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inBubble(t, func(t *testing.T, h *harness) { runChaos(h, seed) },
				func(cfg *Config) { cfg.CountUsers = seed%5 != 4 })
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
		c.checkInvariant()
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
