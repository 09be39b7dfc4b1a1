package owner

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

const (
	interval = 200 * time.Millisecond
	// paceSlack is how much later than its interval a state may be told.
	paceSlack = paceGrid + 2*paceStep
)

// paced runs a test with states of room "x" told in intervals.
func paced(t *testing.T, f func(r *rig, c *Conn)) {
	t.Helper()
	virtual(t, func(r *rig) {
		r.pace("x", interval)
		c := r.connect("a")
		r.join(c, "x")
		f(r, c)
		r.heal()
		r.drain()
		r.nothingLeft()
	})
}

// each sets states one after the other.
func (r *rig) each(c *Conn, room string, from, to int) {
	r.Helper()
	for n := from; n <= to; n++ {
		r.written(r.set(c, room, n, n))
	}
}

// tellings are when subscribers were told of a member's states.
func (r *rig) tellings(conn string) []time.Time {
	var list []time.Time
	r.redis.do(func() {
		for _, e := range r.redis.events {
			if e.kind == store.State && e.conn == conn {
				list = append(list, e.at)
			}
		}
	})
	return list
}

// spaced asserts that nothing came sooner than the interval after what was
// before, where calls take that long at most.
func (r *rig) spaced(conn string, every, call time.Duration) {
	r.Helper()
	list := r.tellings(conn)
	for i := 1; i < len(list); i++ {
		require.GreaterOrEqual(r, list[i].Sub(list[i-1]), every-call, "telling %d", i)
	}
}

func TestOneStateEachInterval(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		other := r.connect("b")
		r.join(other, "x")
		const last = 300
		r.pace("free", 0)
		r.join(c, "free")
		began := time.Now()
		for n := 1; n <= last; n++ { // 10 s
			r.written(append(r.set(c, "x", n, n), r.set(c, "free", n, n)...))
			if n%10 == 0 {
				r.written(r.set(other, "x", n, n))
			}
			r.sleep(time.Second / 30)
		}
		took := time.Since(began)
		r.sleep(interval + paceSlack)
		got := r.states("a/x")
		assert.Equal(r, "s1", got[0])
		assert.Equal(r, fmt.Sprint("s", last), got[len(got)-1], "the last is told")
		assert.LessOrEqual(r, len(got), int(took/interval)+2)
		assert.GreaterOrEqual(r, len(got), int(took/(interval+paceSlack)))
		assert.EqualValues(r, last-len(got), r.Stats().Superseded)
		assert.Equal(r, numbered(1, last), r.states("a/free"), "a room without an interval")
		var others []string
		for n := 10; n <= last; n += 10 {
			others = append(others, fmt.Sprint("s", n))
		}
		assert.Equal(r, others, r.states("b/x"), "another member, who is slower than that")
		r.forgetSaid()
		r.sleep(time.Minute)
		assert.Empty(r, r.said())
		r.atRest()
	})
}

// The first state is told at once, also right after the join, and after a
// pause; one that waits is answered at once.
func TestFirstStateIsToldAtOnce(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		for n := range 3 {
			began := time.Now()
			r.each(c, "x", 10*n+1, 10*n+2)
			require.Zero(r, time.Since(began))
			r.sleep(0)
			require.Equal(r, fmt.Sprint("s", 10*n+1), last(r.states("a/x")))
			r.sleep(interval - time.Millisecond)
			require.Equal(r, fmt.Sprint("s", 10*n+1), last(r.states("a/x")), "not before")
			r.sleep(paceSlack)
			require.Equal(r, fmt.Sprint("s", 10*n+2), last(r.states("a/x")))
			r.sleep(time.Second)
		}
		r.spaced("a", interval, 0)
	})
}

func last(list []string) string {
	if len(list) == 0 {
		return ""
	}
	return list[len(list)-1]
}

// Several states that come while the first is still to be written are one.
func TestNewestOfWhatIsUnwritten(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.slow(50 * time.Millisecond)
		_, err := c.SetState("free", nil, 0, false)
		require.ErrorIs(r, err, ErrNotPresent)
		busy := r.connect("busy")
		r.sleep(time.Millisecond) // its registration is under way
		r.written(r.set(c, "x", 1, 5))
		<-busy.reg.ready
		assert.Equal(r, []string{"s5"}, r.states("a/x"))
		r.atRest()
	})
}

func TestClearCountsAsAState(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		require.NoError(r, c.ClearState(r.Context(), "x"))
		r.sleep(interval / 2)
		assert.Equal(r, []string{"s1"}, r.states("a/x"))
		r.sleep(interval)
		assert.Equal(r, []string{"s1", ""}, r.states("a/x"))
		require.NoError(r, c.PublishState(r.Context(), "x", []byte("quiet"), 0, true))
		r.each(c, "x", 3, 3)
		r.sleep(interval / 2)
		r.sleep(2 * interval)
		assert.Equal(r, "s3", last(r.states("a/x")))
		h, _ := r.held("x", "a")
		assert.False(r, h.silent)
		r.atRest()
	})
}

// A silent state waits like others, and takes the place of what waits.
func TestSilentStateWaits(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		require.NoError(r, c.PublishState(r.Context(), "x", []byte("quiet"), 0, true))
		h, _ := r.held("x", "a")
		assert.Equal(r, "s1", h.state)
		r.sleep(interval + paceSlack)
		h, _ = r.held("x", "a")
		assert.Equal(r, "quiet", h.state)
		assert.True(r, h.silent)
	})
}

// What waits ends with its entry, and the next entry owes nothing.
func TestLeaveWithAStateThatWaits(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		r.leave(c, "x")
		r.join(c, "x")
		r.each(c, "x", 3, 3)
		r.sleep(time.Second)
		assert.Equal(r, []string{"J a/x", "S a/x s1", "L a/x l", "J a/x", "S a/x s3"}, r.said())
		r.each(c, "x", 4, 5)
		c.Close(store.CauseClosed)
		<-c.Gone()
		r.sleep(time.Second)
		assert.Equal(r, []string{"S a/x s4", "L a/x c"}, r.said()[5:])
	})
}

// ExpireAfter counts from when a state was published, also of one that waits;
// its end is told when it comes.
func TestExpiryShorterThanTheInterval(t *testing.T) {
	virtual(t, func(r *rig) {
		r.pace("x", time.Minute)
		c := r.connect("a")
		r.join(c, "x")
		r.publish(c, "x", "s1", time.Second)
		r.sleep(1100 * time.Millisecond)
		assert.Equal(r, []string{"s1", ""}, r.states("a/x"))
		r.publish(c, "x", "s2", time.Second) // would be told in a minute
		r.sleep(2 * time.Minute)
		assert.Equal(r, []string{"s1", ""}, r.states("a/x"), "it was over before")

		r.publish(c, "x", "s3", 0)
		r.publish(c, "x", "s4", 10*time.Second)
		r.sleep(11 * time.Second)
		assert.Equal(r, []string{"s3", ""}, r.states("a/x")[2:], "s3 was replaced, and what replaced it is over")
		r.publish(c, "x", "s5", 90*time.Second)
		r.sleep(time.Minute)
		h, _ := r.held("x", "a")
		assert.Equal(r, "s5", h.state)
		r.sleep(time.Minute)
		assert.Equal(r, []string{"s5", ""}, r.states("a/x")[4:])
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Other rules take hold at once.
func TestIntervalChanges(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.pace("x", time.Minute)
		r.Retime(r.Rooms())
		r.each(c, "x", 1, 2)
		r.sleep(time.Second)
		assert.Equal(r, []string{"s1"}, r.states("a/x"))
		r.pace("x", 3*time.Second)
		r.Retime(r.Rooms())
		r.sleep(time.Second)
		assert.Equal(r, []string{"s1"}, r.states("a/x"))
		r.sleep(time.Second + paceSlack)
		assert.Equal(r, []string{"s1", "s2"}, r.states("a/x"))

		r.each(c, "x", 3, 4)
		r.pace("x", 0)
		r.Retime(r.Rooms())
		r.sleep(0)
		assert.Equal(r, []string{"s1", "s2", "s4"}, r.states("a/x"), "nothing waits any more")
		r.each(c, "x", 5, 9)
		assert.Equal(r, numbered(5, 9), r.states("a/x")[3:])

		r.slow(50 * time.Millisecond) // states that are queued under the old rule
		list := r.set(c, "x", 10, 10)
		r.sleep(time.Millisecond)
		list = append(list, r.set(c, "x", 11, 14)...)
		r.pace("x", time.Minute)
		r.Retime(r.Rooms())
		began := time.Now()
		r.written(list)
		assert.Less(r, time.Since(began), time.Second)
		assert.Equal(r, "s14", last(r.states("a/x")))
		r.atRest()
	})
}

// While Redis is away it is no secret, and then the newest is told.
func TestPacedStatesWhileRedisIsAway(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 1)
		r.away()
		n, errs := 1, 0
		for range 20 * 30 {
			n++
			w := r.set(c, "x", n, n)[0]
			began := time.Now()
			if err := w.Await(r.Context()); err != nil {
				require.ErrorIs(r, err, ErrUnavailable)
				errs++
			}
			require.LessOrEqual(r, time.Since(began), answerWithin)
			c.mu.Lock()
			require.LessOrEqual(r, len(c.entries["x"].flow.older), 1)
			require.Empty(r, c.entries["x"].waiters)
			c.mu.Unlock()
			r.sleep(time.Second / 30)
		}
		assert.Greater(r, errs, 500, "of 600, in 20 s or more")
		r.heal()
		r.sleep(2 * time.Second)
		assert.Equal(r, fmt.Sprint("s", n), last(r.states("a/x")))
		r.spaced("a", interval, 0)
		r.atRest()
	})
}

// Replies that are lost do not bring states closer together.
func TestPacedStatesOfLostReplies(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]fault{
		"ran, reply lost": {lost: true, after: 5 * time.Millisecond}, "did not run": {never: true},
	} {
		t.Run(name, func(t *testing.T) {
			paced(t, func(r *rig, c *Conn) {
				r.plan(func(call int, _ []store.Op) fault {
					if call%3 == 0 {
						return x
					}
					return fault{}
				})
				for n := 1; n <= 200; n++ {
					r.each(c, "x", n, n)
					r.sleep(20 * time.Millisecond)
				}
				r.sleep(time.Second)
				assert.Equal(r, "s200", last(r.states("a/x")))
				r.spaced("a", interval, 0)
				r.atRest()
			})
		})
	}
}

// An entry that is written anew is with its newest state, waiting or not.
func TestRejoinWithAStateThatWaits(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		r.redis.do(func() { r.redis.bury("I1") })
		r.reborn("I2", false)
		r.sleep(10 * time.Millisecond)
		h, ok := r.held("x", "a")
		require.True(r, ok)
		assert.Equal(r, "s2", h.state)
		before := len(r.said())
		r.sleep(time.Second)
		assert.Len(r, r.said(), before, "it is not told once more")
		r.atRest()
	})
}

// Whoever joins again, flushes or changes metadata does not wait for a state
// that does; and a drain does not either.
func TestNobodyWaitsForAStateThatWaits(t *testing.T) {
	virtual(t, func(r *rig) {
		r.pace("x", time.Minute)
		c := r.connect("a")
		r.join(c, "x")
		r.each(c, "x", 1, 2)
		began := time.Now()
		assert.True(r, r.join(c, "x").Again)
		c.SetMeta(3, []byte("m"))
		require.NoError(r, c.Flush(r.Context()))
		h, _ := r.held("x", "a")
		assert.Equal(r, "m", h.meta)
		assert.Equal(r, "s1", h.state)
		assert.Zero(r, time.Since(began))
		r.drain()
		assert.Zero(r, time.Since(began))
		r.nothingLeft()
		assert.False(r, slices.Contains(r.said(), "S a/x s2"))
	})
}

// Without a rule that asks for it there is no clock for it.
func TestNoIntervalNoClock(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.each(c, "x", 1, 50)
		assert.Nil(r, r.Owner.pace)
		c.mu.Lock()
		assert.Nil(r, c.entries["x"].flow)
		c.mu.Unlock()
	})
}
