package local

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/errs"
	"github.com/meshpresence/mesh/internal/store"
)

// patch patches the state of a in x, and waits until it is written or waits for its
// interval.
func (r *rig) patch(c *Conn, patch string, expireAfter time.Duration) {
	r.Helper()
	w, err := c.PatchState("x", []byte(patch), expireAfter, false, -1)
	require.NoError(r, err)
	require.NoError(r, w.Await(r.Context()))
}

// patchSilently is patch without a delivery. It returns what Redis holds after an interval.
func (r *rig) patchSilently(c *Conn, patch string) storedEntry {
	r.Helper()
	w, err := c.PatchState("x", []byte(patch), 0, true, -1)
	require.NoError(r, err)
	require.NoError(r, w.Await(r.Context()))
	r.sleep(interval + paceSlack)
	h, _ := r.storedEntry("x", "a")
	return h
}

// endsOfKeys returns the ends of single keys of the newest state.
func (c *Conn) endsOfKeys(room string) map[string]time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[room].state.ends
}

// patching runs a test with a member a of the room x.
func patching(t *testing.T, f func(r *rig, c *Conn)) {
	t.Helper()
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.forgetTold()
		f(r, c)
		r.heal()
		r.drain()
		r.nothingLeft()
	})
}

func TestPatchesAreMerged(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.patch(c, `{"a":1,"b":2}`, 0)
		r.patch(c, `{"b":null,"c":3}`, 0)
		r.publish(c, "x", `{"d":4}`, 0)
		r.patch(c, `{"e":5}`, 0)
		r.patch(c, `{"d":null,"e":null}`, 0)
		r.patch(c, `{"f":null}`, 0) // there is no state
		r.patch(c, `{"g":7}`, 0)
		assert.Equal(r, []string{`{"a":1,"b":2}`, `{"a":1,"c":3}`, `{"d":4}`, `{"d":4,"e":5}`, "", `{"g":7}`}, r.states("a/x"))
		r.leave(c, "x")
		r.join(c, "x")
		r.patch(c, `{"h":8}`, 0)
		assert.Equal(r, `{"h":8}`, last(r.states("a/x")), "a new entry starts from nothing")
		_, err := c.PatchState("y", []byte(`{}`), 0, false, -1)
		require.ErrorIs(r, err, ErrNotPresent)
	})
}

// Patches that come while others are not written are merged with them.
func TestPatchesOverlap(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.slow(100 * time.Millisecond)
		var list []Write
		var want []string
		text := "{"
		for n := range 20 {
			w, err := c.PatchState("x", fmt.Appendf(nil, `{"k%d":%d}`, n, n), 0, false, -1)
			require.NoError(r, err)
			list = append(list, w)
			text += fmt.Sprintf(`"k%d":%d,`, n, n)
			want = append(want, strings.TrimSuffix(text, ",")+"}")
		}
		r.requireWritten(list)
		assert.Equal(r, want, r.states("a/x"))
	})
}

func TestMergedStateIsTooLarge(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.patch(c, `{"a":"0123456789"}`, time.Second)
		_, err := c.PatchState("x", []byte(`{"b":1}`), 0, false, 23)
		require.ErrorIs(r, err, errs.TooLarge)
		require.ErrorContains(r, err, "24 bytes, limit 23")
		w, err := c.PatchState("x", []byte(`{"b":1}`), 0, false, 24)
		require.NoError(r, err)
		require.NoError(r, w.Await(r.Context()))
		long := `{"a":1,"c":` + strings.Repeat(" ", 100) + `null}`
		w, err = c.PatchState("x", []byte(long), 0, false, 24)
		require.NoError(r, err, "only the merged state counts")
		require.NoError(r, w.Await(r.Context()))
		assert.Equal(r, []string{`{"a":"0123456789"}`, `{"a":"0123456789","b":1}`, `{"a":1,"b":1}`}, r.states("a/x"))
	})
}

func TestKeysExpire(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.patch(c, `{"stays":1}`, 0)
		r.patch(c, `{"two":2,"also":2}`, 2*time.Second)
		r.patch(c, `{"four":4}`, 4*time.Second)
		assert.Len(r, r.states("a/x"), 3)
		r.sleep(1900 * time.Millisecond)
		assert.Len(r, r.states("a/x"), 3)
		r.sleep(200 * time.Millisecond)
		assert.Equal(r, `{"stays":1,"four":4}`, last(r.states("a/x")))
		assert.Len(r, r.states("a/x"), 4, "both keys end with one write")
		r.sleep(2 * time.Second)
		assert.Equal(r, `{"stays":1}`, last(r.states("a/x")))
		r.sleep(time.Hour)
		assert.Len(r, r.states("a/x"), 5)
		assert.Zero(r, r.wheel.Armed())
		r.atRest()
	})
}

// A later patch gives a key another end, or none. A key that is removed takes its end with
// it, and a state that is published replaces all.
func TestEndsOfKeysChange(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.patch(c, `{"a":1,"b":1,"c":1,"d":1}`, 2*time.Second)
		r.patch(c, `{"a":2}`, 0)
		r.patch(c, `{"b":2}`, 4*time.Second)
		r.patch(c, `{"c":null}`, 0)
		r.patch(c, `{"c":3}`, 0)
		r.forgetTold()
		r.sleep(3 * time.Second)
		assert.Equal(r, []string{`{"a":2,"b":2,"c":3}`}, r.states("a/x"))
		r.publish(c, "x", `{"b":5}`, 0)
		r.sleep(time.Hour)
		assert.Equal(r, []string{`{"a":2,"b":2,"c":3}`, `{"b":5}`}, r.states("a/x"))

		// A state with an end is patched: its keys keep that end.
		r.publish(c, "x", `{"e":1,"f":1}`, 2*time.Second)
		r.patch(c, `{"g":1}`, 0)
		r.patch(c, `{"f":2}`, time.Minute)
		r.forgetTold()
		r.sleep(3 * time.Second)
		assert.Equal(r, []string{`{"f":2,"g":1}`}, r.states("a/x"))
		require.NoError(r, c.ClearState(r.Context(), "x"))
		assert.Zero(r, r.wheel.Armed())
	})
}

// The key in Redis gets an end only if each key of the state has one: the last.
func TestEndOfAPatchedStateInRedis(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		var left []time.Duration
		r.plan(func(_ int, ops []store.Op) fault {
			for _, op := range ops {
				left = append(left, op.StateLeft)
			}
			return fault{}
		})
		r.patch(c, `{"a":1}`, 3*time.Second)
		assert.Empty(r, c.endsOfKeys("x"), "the end of the state is enough")
		r.patch(c, `{"b":1}`, 5*time.Second)
		assert.Len(r, c.endsOfKeys("x"), 2)
		r.patch(c, `{"c":1}`, 0)
		r.patch(c, `{"c":null}`, 0)
		r.heal()
		assert.Equal(r, []time.Duration{3 * time.Second, 5 * time.Second, 0, 5 * time.Second}, left)
		r.sleep(6 * time.Second)
		assert.Equal(r, []string{`{"b":1}`, ""}, r.states("a/x")[4:])
		assert.Zero(r, r.wheel.Armed())
		r.patch(c, `{"d":1}`, 0)
		assert.Equal(r, `{"d":1}`, last(r.states("a/x")))
	})
}

// A key whose end has come before the timer fires is not in the merged state.
func TestPatchJustAfterTheEndOfAKey(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.sleep(time.Millisecond) // off the steps of the wheel
		r.patch(c, `{"a":1}`, time.Second)
		r.sleep(time.Second)
		r.patch(c, `{"b":1}`, 0)
		r.sleep(time.Second)
		assert.Equal(r, []string{`{"a":1}`, `{"b":1}`}, r.states("a/x"))
	})
}

func TestKeysExpireWhileRedisIsAway(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.patch(c, `{"a":1}`, 0)
		r.away()
		_, err := c.PatchState("x", []byte(`{"b":1}`), 3*time.Second, false, -1)
		require.NoError(r, err)
		r.sleep(10 * time.Second)
		_, err = c.PatchState("x", []byte(`{"c":1}`), 0, false, -1)
		require.NoError(r, err)
		r.heal()
		r.sleep(5 * time.Second)
		assert.Equal(r, []string{`{"a":1}`, `{"a":1}`, `{"a":1,"c":1}`}, r.states("a/x"),
			"b had ended before it was written; its caller still waited")
		r.atRest()
	})
}

// A state that waits for its interval contains the keys of all patches, and single keys
// end at the pace of the interval.
func TestPacedPatches(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		for n := range 6 {
			r.patch(c, fmt.Sprintf(`{"k%d":%d}`, n, n), 0)
		}
		r.sleep(interval + paceSlack)
		assert.Equal(r, []string{`{"k0":0}`, `{"k0":0,"k1":1,"k2":2,"k3":3,"k4":4,"k5":5}`}, r.states("a/x"))
		for n := range 6 {
			r.patch(c, fmt.Sprintf(`{"k%d":%d}`, n, n), time.Second+time.Duration(n)*50*time.Millisecond)
		}
		r.sleep(3 * time.Second)
		assert.Empty(r, last(r.states("a/x")))
		assert.Less(r, len(r.states("a/x")), 8)
		list := r.tellings("a")
		for i := 1; i < len(list)-1; i++ { // the end of the whole state does not wait
			require.GreaterOrEqual(r, list[i].Sub(list[i-1]), interval)
		}
	})
}

// A silent patch does not hide the keys of a patch that waits to be delivered.
func TestSilentPatchAfterAWaitingPatch(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		h := r.patchSilently(c, `{"a":1}`)
		assert.True(r, h.silent)
		assert.Equal(r, `{"a":1}`, h.state)
		r.patch(c, `{"b":1}`, 0)
		r.patch(c, `{"c":1}`, 0) // waits
		h = r.patchSilently(c, `{"d":1}`)
		assert.False(r, h.silent)
		assert.Equal(r, `{"a":1,"b":1,"c":1,"d":1}`, h.state)
		assert.True(r, r.patchSilently(c, `{"e":1}`).silent)
	})
}

// The same, if the patch waits because Redis is away and its caller has given up.
func TestSilentPatchWhileRedisIsAway(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		assert.True(r, r.patchSilently(c, `{"a":1}`).silent)
		r.away()
		ctx, cancel := context.WithCancel(r.Context())
		cancel()
		w, err := c.PatchState("x", []byte(`{"b":1}`), 0, false, -1)
		require.NoError(r, err)
		require.ErrorIs(r, w.Await(ctx), ErrUnavailable)
		w, err = c.PatchState("x", []byte(`{"c":1}`), 0, true, -1)
		require.NoError(r, err)
		r.heal()
		require.NoError(r, w.Await(r.Context()))
		h, _ := r.storedEntry("x", "a")
		assert.False(r, h.silent)
		assert.Equal(r, `{"a":1,"b":1,"c":1}`, h.state)
	})
}

// Redis lost the entry: its state is written again with the keys that it has.
func TestPatchedStateIsRestored(t *testing.T) {
	patching(t, func(r *rig, c *Conn) {
		r.patch(c, `{"a":1}`, 0)
		r.patch(c, `{"b":1}`, time.Minute)
		r.redis.do(r.redis.flush)
		r.heartbeat(true)
		r.sleep(10 * time.Second)
		h, ok := r.storedEntry("x", "a")
		require.True(r, ok)
		assert.Equal(r, `{"a":1,"b":1}`, h.state)
		r.sleep(time.Minute)
		h, _ = r.storedEntry("x", "a")
		assert.Equal(r, `{"a":1}`, h.state)
	})
}
