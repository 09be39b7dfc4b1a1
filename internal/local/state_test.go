package local

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// set sets the states s<from> to s<to> without waiting.
func (r *rig) set(c *Conn, room string, from, to int) []Write {
	r.Helper()
	var list []Write
	for n := from; n <= to; n++ {
		w, err := c.SetState(room, fmt.Append(nil, "s", n), 0, false)
		require.NoError(r, err)
		list = append(list, w)
	}
	return list
}

// requireWritten asserts that Redis has taken all of them.
func (r *rig) requireWritten(list []Write) {
	r.Helper()
	for _, w := range list {
		require.NoError(r, w.Await(r.Context()))
	}
}

// states returns the state events of a member.
func (r *rig) states(member string) []string {
	var list []string
	for _, s := range r.told() {
		if rest, ok := strings.CutPrefix(s, "S "+member); ok {
			list = append(list, strings.TrimSpace(rest))
		}
	}
	return list
}

func numbered(from, to int) []string {
	var list []string
	for n := from; n <= to; n++ {
		list = append(list, fmt.Sprint("s", n))
	}
	return list
}

// slow makes every call take that long.
func (r *rig) slow(d time.Duration) {
	r.plan(func(int, []store.Op) fault { return fault{before: d} })
}

// States of one entry that wait together share a batch, and each is delivered by itself.
func TestStatesOfOneEntryShareABatch(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(10 * time.Millisecond)
		before, began := r.calls(), time.Now()
		list := r.set(c, "x", 1, 3*maxOpsPerItem)
		r.requireWritten(list)
		assert.Equal(r, numbered(1, 3*maxOpsPerItem), r.states("a/x"))
		assert.LessOrEqual(r, r.calls()-before, 4, "one alone, or as many as go together")
		assert.LessOrEqual(r, time.Since(began), 40*time.Millisecond)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// A connection with many states does not fill a batch alone.
func TestOneEntryDoesNotFillABatch(t *testing.T) {
	virtual(t, func(r *rig) {
		many, few := r.connect("many"), r.connect("few")
		r.join(many, "x")
		r.join(few, "x")
		r.slow(10 * time.Millisecond)
		first := r.set(many, "x", 1, 1) // in flight
		r.sleep(time.Millisecond)
		list := r.set(many, "x", 2, 20*maxOpsPerItem)
		one := r.set(few, "x", 1, 1)
		began := time.Now()
		r.requireWritten(one)
		assert.LessOrEqual(r, time.Since(began), 30*time.Millisecond)
		r.requireWritten(append(first, list...))
		assert.Equal(r, numbered(1, 20*maxOpsPerItem), r.states("many/x"))
	})
}

// After a lost reply the batch is sent again with the states that were not written. No
// state is delivered twice or left out.
func TestStatesOfALostReply(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]fault{
		"ran, reply lost": {lost: true, after: 5 * time.Millisecond},
		"did not run":     {never: true},
		"runs later":      {late: 10 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				c := r.connect("a")
				r.join(c, "x")
				r.plan(func(call int, _ []store.Op) fault {
					if call%2 == 0 {
						return x
					}
					return fault{before: 5 * time.Millisecond}
				})
				var list []Write
				for n := range 40 {
					list = append(list, r.set(c, "x", n+1, n+1)...)
					r.sleep(time.Millisecond)
				}
				r.requireWritten(list)
				assert.Equal(r, numbered(1, 40), r.states("a/x"))
				r.heal()
				r.atRest()
				r.drain()
				r.nothingLeft()
			})
		})
	}
}

// Callers of refused states get the error. The newest refused state is written after a
// while.
func TestRefusedStates(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.refuse(func(store.Op) bool { return true })
		for _, w := range r.set(c, "x", 1, 5) {
			require.ErrorIs(r, w.Await(r.Context()), ErrUnavailable)
		}
		r.heal()
		r.sleep(2 * time.Second)
		assert.Equal(r, numbered(5, 5), r.states("a/x"))
		r.atRest()

		r.forgetTold()
		r.refuse(func(op store.Op) bool { return string(op.State) == "s7" })
		list := r.set(c, "x", 6, 8)
		require.NoError(r, list[0].Await(r.Context()))
		require.ErrorIs(r, list[1].Await(r.Context()), ErrUnavailable)
		require.NoError(r, list[2].Await(r.Context()))
		r.sleep(5 * time.Second)
		assert.Equal(r, []string{"s6", "s8"}, r.states("a/x"), "an older one does not come after a newer one")
		r.atRest()
	})
}

// While Redis is away no states pile up: after a caller has given up, the next state
// supersedes its own.
func TestStatesWhileRedisIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.away()
		for n := range 30 {
			for _, w := range r.set(c, "x", 10*n+1, 10*n+10) {
				began := time.Now()
				require.ErrorIs(r, w.Await(r.Context()), ErrUnavailable)
				require.LessOrEqual(r, time.Since(began), answerTimeout)
			}
			c.mu.Lock()
			require.Nil(r, c.entries["x"].queue, "only the newest is kept")
			require.Empty(r, c.entries["x"].waiters)
			c.mu.Unlock()
		}
		r.heal()
		r.sleep(2 * time.Second)
		assert.Equal(r, []string{"s300"}, r.states("a/x"), "no caller waited for the older ones")
		r.requireWritten(r.set(c, "x", 301, 303))
		assert.Equal(r, numbered(300, 303), r.states("a/x"))
		r.atRest()
	})
}

// A caller that gives up does not affect the states of others.
func TestCallerGivesUp(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(100 * time.Millisecond)
		list := r.set(c, "x", 1, 4)
		r.sleep(10 * time.Millisecond) // the first is in flight
		list = append(list, r.set(c, "x", 5, 8)...)
		ctx, cancel := context.WithCancel(r.Context())
		cancel()
		require.ErrorIs(r, list[5].Await(ctx), context.Canceled)
		r.requireWritten(slices.Delete(list, 5, 6))
		assert.Equal(r, append(numbered(1, 5), "s7", "s8"), r.states("a/x"))
		r.atRest()
	})
}

// Queued states end with the entry, and their callers get an error.
func TestLeaveWithStatesInFlight(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(100 * time.Millisecond)
		list := r.set(c, "x", 1, 1)
		r.sleep(10 * time.Millisecond) // it is in flight
		list = append(list, r.set(c, "x", 2, 9)...)
		r.leave(c, "x")
		r.requireWritten(list)
		assert.Equal(r, []string{"J a/x", "S a/x s1", "L a/x l"}, r.told())
		r.join(c, "x")
		h, _ := r.storedEntry("x", "a")
		assert.Empty(r, h.state)
		r.requireWritten(r.set(c, "x", 10, 11))
		assert.Equal(r, numbered(10, 11), r.states("a/x")[1:])
		r.atRest()
	})
}

// A rejoin carries the newest state. Callers of the older ones are answered then.
func TestRejoinWithStatesInFlight(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(r *rig){
		"redis lost everything": func(r *rig) { r.redis.do(r.redis.flush) },
		"declared dead": func(r *rig) {
			r.redis.do(func() { r.redis.cleanUpDead("I1") })
			r.reregister("I2", false)
		},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				c := r.connect("a")
				r.join(c, "x")
				r.slow(50 * time.Millisecond)
				list := r.set(c, "x", 1, 1)
				r.sleep(10 * time.Millisecond)
				list = append(list, r.set(c, "x", 2, 40)...)
				lose(r)
				r.requireWritten(list)
				h, ok := r.storedEntry("x", "a")
				require.True(r, ok)
				assert.Equal(r, "s40", h.state)
				told := r.states("a/x")
				assert.Equal(r, slices.Compact(slices.Clone(told)), told, "no state is delivered twice")
				r.heal()
				r.heartbeat(true)
				r.requireWritten(r.set(c, "x", 41, 44))
				assert.Equal(r, numbered(41, 44), r.states("a/x")[len(r.states("a/x"))-4:])
				r.atRest()
				r.drain()
				r.nothingLeft()
			})
		})
	}
}

// The server has stalled. Queued states end with the entry, and no caller hears of
// success.
func TestStallWithStatesInFlight(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.away()
		list := r.set(c, "x", 1, 4)
		r.sleep(10 * time.Millisecond)
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.reregister("I2", true)
		for _, w := range list {
			require.ErrorIs(r, w.Await(r.Context()), ErrUnavailable)
		}
		r.heal()
		c.Touched()
		r.sleep(2 * time.Second)
		h, ok := r.storedEntry("x", "a")
		require.True(r, ok)
		assert.Empty(r, h.state)
		r.atRest()
	})
}

// An older state that expired before it was written is delivered as its end, in its
// place. The newer ones stay.
func TestOlderStateExpiresBeforeItIsWritten(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(300 * time.Millisecond)
		list := r.set(c, "x", 1, 1)
		r.sleep(10 * time.Millisecond)
		w, err := c.SetState("x", []byte("short"), 100*time.Millisecond, false)
		require.NoError(r, err)
		list = append(append(list, w), r.set(c, "x", 2, 2)...)
		r.requireWritten(list)
		r.sleep(time.Second)
		assert.Equal(r, []string{"s1", "", "s2"}, r.states("a/x"))

		// The same holds for the newest, and its end is delivered once.
		r.forgetTold()
		list = r.set(c, "x", 3, 3)
		r.sleep(10 * time.Millisecond)
		w, err = c.SetState("x", []byte("short"), 100*time.Millisecond, false)
		require.NoError(r, err)
		r.requireWritten(append(list, w))
		r.sleep(time.Second)
		assert.Equal(r, []string{"s3", ""}, r.states("a/x"))
		r.atRest()
	})
}

// Metadata that changes between states goes with one that follows. Flush returns after
// all of it is written.
func TestFlushWithStatesInFlight(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(50 * time.Millisecond)
		list := r.set(c, "x", 1, 1)
		r.sleep(10 * time.Millisecond)
		list = append(list, r.set(c, "x", 2, maxOpsPerItem+10)...)
		c.SetMeta(7, []byte("m"))
		list = append(list, r.set(c, "x", maxOpsPerItem+11, maxOpsPerItem+12)...)
		require.NoError(r, c.Flush(r.Context()))
		h, _ := r.storedEntry("x", "a")
		assert.Equal(r, "m", h.meta)
		assert.Equal(r, fmt.Sprint("s", maxOpsPerItem+12), h.state)
		r.requireWritten(list)
		assert.Equal(r, numbered(1, maxOpsPerItem+12), r.states("a/x"))
		r.atRest()
	})
}
