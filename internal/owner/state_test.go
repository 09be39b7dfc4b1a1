package owner

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

// set sets states s<from> to s<to> without waiting.
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

// written asserts that Redis has taken all of them.
func (r *rig) written(list []Write) {
	r.Helper()
	for _, w := range list {
		require.NoError(r, w.Await(r.Context()))
	}
}

// states are what subscribers were told of one member's states.
func (r *rig) states(member string) []string {
	var list []string
	for _, s := range r.said() {
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

// States of one entry that wait together go together, each told by itself.
func TestStatesOfOneEntryGoTogether(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(10 * time.Millisecond)
		before, began := r.calls(), time.Now()
		list := r.set(c, "x", 1, 3*together)
		r.written(list)
		assert.Equal(r, numbered(1, 3*together), r.states("a/x"))
		assert.LessOrEqual(r, r.calls()-before, 4, "one alone, or as many as go together")
		assert.LessOrEqual(r, time.Since(began), 40*time.Millisecond)
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Whoever has many states to be written does not fill a batch alone.
func TestOneEntryDoesNotFillABatch(t *testing.T) {
	virtual(t, func(r *rig) {
		many, few := r.connect("many"), r.connect("few")
		r.join(many, "x")
		r.join(few, "x")
		r.slow(10 * time.Millisecond)
		first := r.set(many, "x", 1, 1) // is under way
		r.sleep(time.Millisecond)
		list := r.set(many, "x", 2, 20*together)
		one := r.set(few, "x", 1, 1)
		began := time.Now()
		r.written(one)
		assert.LessOrEqual(r, time.Since(began), 30*time.Millisecond)
		r.written(append(first, list...))
		assert.Equal(r, numbered(1, 20*together), r.states("many/x"))
	})
}

// A batch whose reply was lost is offered again, with what was not written;
// nothing is told twice, and nothing left out.
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
				r.written(list)
				assert.Equal(r, numbered(1, 40), r.states("a/x"))
				r.heal()
				r.atRest()
				r.drain()
				r.nothingLeft()
			})
		})
	}
}

// What Redis refuses is answered; of what was refused the newest is written
// after a while.
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

		r.forgetSaid()
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

// While Redis is away nothing piles up: whoever has given up has his state
// superseded by the next one.
func TestStatesWhileRedisIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.away()
		for n := range 30 {
			for _, w := range r.set(c, "x", 10*n+1, 10*n+10) {
				began := time.Now()
				require.ErrorIs(r, w.Await(r.Context()), ErrUnavailable)
				require.LessOrEqual(r, time.Since(began), answerWithin)
			}
			c.mu.Lock()
			require.Nil(r, c.entries["x"].flow, "only the newest is kept")
			require.Empty(r, c.entries["x"].waiters)
			c.mu.Unlock()
		}
		r.heal()
		r.sleep(2 * time.Second)
		assert.Equal(r, []string{"s300"}, r.states("a/x"), "nobody waited for those before")
		r.written(r.set(c, "x", 301, 303))
		assert.Equal(r, numbered(300, 303), r.states("a/x"))
		r.atRest()
	})
}

// A caller that goes away does not take the states of others with it.
func TestStatesOfACallerThatGoes(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(100 * time.Millisecond)
		list := r.set(c, "x", 1, 4)
		r.sleep(10 * time.Millisecond) // the first is under way
		list = append(list, r.set(c, "x", 5, 8)...)
		ctx, cancel := context.WithCancel(r.Context())
		cancel()
		require.ErrorIs(r, list[5].Await(ctx), context.Canceled)
		r.written(slices.Delete(list, 5, 6))
		assert.Equal(r, append(numbered(1, 5), "s7", "s8"), r.states("a/x"))
		r.atRest()
	})
}

// What is queued when the entry ends ends with it, and its callers hear so.
func TestLeaveWithStatesUnderWay(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(100 * time.Millisecond)
		list := r.set(c, "x", 1, 1)
		r.sleep(10 * time.Millisecond) // it is under way
		list = append(list, r.set(c, "x", 2, 9)...)
		r.leave(c, "x")
		r.written(list)
		assert.Equal(r, []string{"J a/x", "S a/x s1", "L a/x l"}, r.said())
		r.join(c, "x")
		h, _ := r.held("x", "a")
		assert.Empty(r, h.state)
		r.written(r.set(c, "x", 10, 11))
		assert.Equal(r, numbered(10, 11), r.states("a/x")[1:])
		r.atRest()
	})
}

// Where the entry is written anew it is with its newest state; who waited for
// the older ones is answered then.
func TestRejoinWithStatesUnderWay(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(r *rig){
		"redis lost everything": func(r *rig) { r.redis.do(r.redis.flush) },
		"declared dead": func(r *rig) {
			r.redis.do(func() { r.redis.bury("I1") })
			r.reborn("I2", false)
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
				r.written(list)
				h, ok := r.held("x", "a")
				require.True(r, ok)
				assert.Equal(r, "s40", h.state)
				told := r.states("a/x")
				assert.Equal(r, slices.Compact(slices.Clone(told)), told, "nothing is told twice")
				r.heal()
				r.heartbeat(true)
				r.written(r.set(c, "x", 41, 44))
				assert.Equal(r, numbered(41, 44), r.states("a/x")[len(r.states("a/x"))-4:])
				r.atRest()
				r.drain()
				r.nothingLeft()
			})
		})
	}
}

// The server had stalled: what was queued ends with the entry, and nobody is
// told that it has been set.
func TestStallWithStatesUnderWay(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.away()
		list := r.set(c, "x", 1, 4)
		r.sleep(10 * time.Millisecond)
		r.redis.do(func() { r.redis.bury("I1") })
		r.reborn("I2", true)
		for _, w := range list {
			require.ErrorIs(r, w.Await(r.Context()), ErrUnavailable)
		}
		r.heal()
		c.Seen()
		r.sleep(2 * time.Second)
		h, ok := r.held("x", "a")
		require.True(r, ok)
		assert.Empty(r, h.state)
		r.atRest()
	})
}

// An older state that ran out before it was written is told as its end, in its
// place; the newer ones stay.
func TestOlderStateRunsOutBeforeItIsWritten(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(300 * time.Millisecond)
		list := r.set(c, "x", 1, 1)
		r.sleep(10 * time.Millisecond)
		w, err := c.SetState("x", []byte("short"), 100*time.Millisecond, false)
		require.NoError(r, err)
		list = append(append(list, w), r.set(c, "x", 2, 2)...)
		r.written(list)
		r.sleep(time.Second)
		assert.Equal(r, []string{"s1", "", "s2"}, r.states("a/x"))

		// The newest, too: its end is told once.
		r.forgetSaid()
		list = r.set(c, "x", 3, 3)
		r.sleep(10 * time.Millisecond)
		w, err = c.SetState("x", []byte("short"), 100*time.Millisecond, false)
		require.NoError(r, err)
		r.written(append(list, w))
		r.sleep(time.Second)
		assert.Equal(r, []string{"s3", ""}, r.states("a/x"))
		r.atRest()
	})
}

// Metadata that change between states are with one that follows, and who
// waits for all of it is answered when all of it is written.
func TestFlushWithStatesUnderWay(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.slow(50 * time.Millisecond)
		list := r.set(c, "x", 1, 1)
		r.sleep(10 * time.Millisecond)
		list = append(list, r.set(c, "x", 2, together+10)...)
		c.SetMeta(7, []byte("m"))
		list = append(list, r.set(c, "x", together+11, together+12)...)
		require.NoError(r, c.Flush(r.Context()))
		h, _ := r.held("x", "a")
		assert.Equal(r, "m", h.meta)
		assert.Equal(r, fmt.Sprint("s", together+12), h.state)
		r.written(list)
		assert.Equal(r, numbered(1, together+12), r.states("a/x"))
		r.atRest()
	})
}
