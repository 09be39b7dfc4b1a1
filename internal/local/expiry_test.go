package local

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

func TestStateExpires(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.forgetTold()
		r.publish(c, "x", "short", 2*time.Second)
		began := time.Now()
		r.sleep(2500 * time.Millisecond)
		assert.Equal(r, []string{"S a/x short", "S a/x"}, r.told())
		assert.GreaterOrEqual(r, r.last().at.Sub(began), 2*time.Second)

		// The end of an older state does not end a newer one.
		r.forgetTold()
		r.publish(c, "x", "one", 2*time.Second)
		r.sleep(time.Second)
		r.publish(c, "x", "two", 3*time.Second)
		r.sleep(2900 * time.Millisecond)
		assert.Equal(r, []string{"S a/x one", "S a/x two"}, r.told())
		r.publish(c, "x", "three", 0)
		r.sleep(time.Hour)
		assert.Equal(r, []string{"S a/x one", "S a/x two", "S a/x three"}, r.told())

		// Cleared, left and closed: none of their timers is left.
		r.publish(c, "x", "four", time.Minute)
		require.NoError(r, c.ClearState(r.Context(), "x"))
		r.publish(c, "x", "five", time.Minute)
		r.leave(c, "x")
		assert.Zero(r, r.wheel.Armed())
		r.join(c, "x")
		r.sleep(time.Hour)
		assert.Equal(r, []string{
			"S a/x one", "S a/x two", "S a/x three", "S a/x four", "S a/x", "S a/x five", "L a/x l", "J a/x",
		}, r.told())
		h, _ := r.storedEntry("x", "a")
		assert.Empty(r, h.state)
		r.atRest()
	})
}

// A state that expired while Redis was away is never delivered. Another one keeps the
// rest of its time.
func TestStateExpiresWhileRedisIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.join(c, "y")
		r.forgetTold()
		r.away()
		_ = c.PublishState(r.Context(), "x", []byte("over"), 3*time.Second, true)
		published := time.Now()
		_ = c.PublishState(r.Context(), "y", []byte("rest"), 20*time.Second, true)
		r.sleep(6 * time.Second)
		var left time.Duration
		r.plan(func(_ int, ops []store.Op) fault {
			for _, op := range ops {
				if op.Room == "y" && op.State != nil {
					left = op.StateLeft
				}
			}
			return fault{}
		})
		r.sleep(time.Second)
		assert.Equal(r, []string{"S a/y rest"}, r.told())
		assert.InDelta(r, 20*time.Second-time.Since(published), left, float64(1200*time.Millisecond))
		r.sleep(20 * time.Second)
		assert.Equal(r, []string{"S a/y rest", "S a/y"}, r.told())
		r.atRest()
	})
}
