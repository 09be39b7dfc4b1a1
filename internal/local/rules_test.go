package local

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// Rules may change while entries are there, while they are refreshed, and while they wait
// for a frame.
func TestRulesChange(t *testing.T) {
	virtual(t, func(r *rig) {
		l := &link{}
		c, err := r.Connect("a", nil, l, func() {})
		require.NoError(r, err)
		r.join(c, "x")
		set := func(ttl time.Duration) storedEntry {
			r.rule("x", ttl)
			r.ApplyRules(r.Rooms())
			r.sleep(10 * time.Millisecond)
			h, ok := r.storedEntry("x", "a")
			require.True(r, ok)
			assert.Equal(r, ttl, h.ttl)
			assert.Equal(r, ttl == 0, h.until.IsZero())
			r.atRest()
			return h
		}
		set(10 * time.Second)
		assert.Positive(r, r.wheel.Armed())
		set(0)
		assert.Zero(r, r.wheel.Armed())
		set(10 * time.Second)
		assert.Equal(r, []time.Duration{10 * time.Second, 0, 10 * time.Second}, l.told())

		// The rule changes while a refresh is in flight, which tells Redis the old TTL.
		r.plan(func(int, []store.Op) fault {
			return fault{before: 100 * time.Millisecond, after: 100 * time.Millisecond}
		})
		stop := r.frames(c, time.Second)
		before := r.calls()
		for r.calls() == before {
			r.sleep(10 * time.Millisecond)
		}
		r.rule("x", 0)
		r.ApplyRules(r.Rooms())
		r.sleep(time.Second)
		stop()
		h, _ := r.storedEntry("x", "a")
		assert.Zero(r, h.ttl)
		assert.True(r, h.until.IsZero(), "a key would run out, and take who is alive with it")
		r.heal()

		// The rule changes while the entry waits for a frame.
		set(2 * time.Second)
		r.sleep(5 * time.Second)
		assert.Equal(r, "L a/x s", r.told()[1])
		r.rule("x", time.Hour)
		r.ApplyRules(r.Rooms())
		c.Touched()
		r.sleep(time.Millisecond)
		h, _ = r.storedEntry("x", "a")
		assert.Equal(r, time.Hour, h.ttl)
		r.sleep(time.Minute)
		assert.Len(r, r.told(), 3)
		r.drain()
		r.nothingLeft()
	})
}
