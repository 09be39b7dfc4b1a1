package local

import (
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestReregistered(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(20)
		r.publish(conns[0], "x", "s", time.Hour)
		r.forgetTold()
		r.reregister("I2", false)
		r.sleep(time.Second)
		said := r.told()
		require.Len(r, said, 40)
		for _, s := range said {
			assert.Equal(r, "R", s[:1], "no member has left")
		}
		h, _ := r.storedEntry("x", "c0")
		assert.Equal(r, "s", h.state)
		assert.Equal(r, "I2", h.inc)
		r.redis.do(func() {
			assert.Len(r, r.redis.owned[ownerKey{0, "I2"}], 60)
			for _, m := range r.redis.conns {
				assert.Equal(r, "I2", m.Owner)
			}
			r.redis.cleanUpDead("I1")
		})
		assert.Len(r, r.told(), 40, "the dead one had nothing any more")
		r.heartbeats(5)
		assert.Zero(r, r.reconciles())
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// The writer may find the new incarnation before Reregistered is called.
func TestReregisteredWhileWriting(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(20)
		r.redis.do(func() { r.redis.dead["I1"] = true })
		r.setIncarnation("I2")
		for i, c := range conns {
			if i%2 == 0 {
				r.publish(c, "x", "s", 0)
			}
		}
		late := r.connect("late")
		r.join(late, "x")
		r.forgetTold()
		r.Reregistered(false)
		r.sleep(time.Second)
		for _, s := range r.told() {
			assert.Equal(r, "R", s[:1])
		}
		assert.Len(r, r.told(), 30, "ten were written again before")
		r.redis.do(func() { assert.Len(r, r.redis.owned[ownerKey{0, "I2"}], 62) })
		r.heartbeats(6)
		assert.Zero(r, r.reconciles(), "the counts agree with Redis")
		r.atRest()
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.drain()
		r.nothingLeft()
	})
}

func TestFencedIncarnation(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(3)
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.forgetTold()
		var wg sync.WaitGroup
		wg.Go(func() { r.publish(conns[0], "x", "s", 0) })
		r.sleep(100 * time.Millisecond)
		r.mu.Lock()
		assert.NotEmpty(r, r.fenced)
		assert.Equal(r, "I1", r.fenced[0])
		r.mu.Unlock()
		assert.Empty(r, r.told())
		r.reregister("I2", false)
		wg.Wait()
		r.sleep(time.Second)
		assert.Len(r, r.told(), 6)
		h, _ := r.storedEntry("x", "c0")
		assert.Equal(r, "s", h.state)
		r.atRest()
	})
}

// After a stall of its own a server does not know which connections are still there. Each
// comes back at its next frame.
func TestReregisteredAfterAStall(t *testing.T) {
	virtual(t, func(r *rig) {
		l := &link{}
		c, err := r.Connect("a", nil, l, func() {})
		require.NoError(r, err)
		d := r.connect("b")
		r.join(c, "x")
		r.join(d, "x")
		r.publish(c, "x", "s", 0)
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.forgetTold()
		r.reregister("I2", true)
		r.sleep(time.Second)
		assert.Empty(r, r.told())
		assert.Equal(r, 1, l.pings)
		assert.True(r, c.In("x"))
		r.redis.do(func() { assert.Len(r, r.redis.conns, 2) })
		c.Touched()
		r.sleep(time.Millisecond)
		assert.Equal(r, []string{"J a/x"}, r.told())
		r.atRest()
		r.sleep(time.Hour)
		assert.Len(r, r.told(), 1)
		r.drain()
		r.nothingLeft()
	})
}

// Entries that were written under the new incarnation before Reregistered reports a stall
// do no harm.
func TestReregisteredAfterAStallWhileWriting(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(4)
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.setIncarnation("I2")
		r.publish(conns[0], "x", "s", 0)
		r.Reregistered(true)
		r.sleep(time.Second)
		_, ok := r.storedEntry("x", "c0")
		assert.False(r, ok, "it has to show a sign of life as well")
		r.atRest()
		for _, c := range conns {
			c.Touched()
		}
		r.sleep(time.Second)
		r.redis.do(func() { assert.Len(r, r.redis.owned[ownerKey{0, "I2"}], 12) })
		r.heartbeats(4)
		assert.Zero(r, r.reconciles())
		requireLegal(r, r.redis.events)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// A caller that waits for a state does not hear of success if the state ends with its
// entry.
func TestPublishWhileReregistering(t *testing.T) {
	virtual(t, func(r *rig) {
		conns := r.fill(1)
		r.away()
		done := make(chan error, 1)
		go func() { done <- conns[0].PublishState(r.Context(), "x", []byte("s"), 0, false) }()
		r.sleep(100 * time.Millisecond)
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.reregister("I2", true)
		r.heal()
		conns[0].Touched()
		r.sleep(500 * time.Millisecond)
		h, ok := r.storedEntry("x", "c0")
		assert.True(r, ok)
		assert.Empty(r, h.state)
		require.Error(r, <-done)
		r.atRest()
	})
}
