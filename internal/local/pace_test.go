package local

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
	// paceSlack is the delay with which a state may be written after its interval.
	paceSlack = paceGrid + 2*paceStep
)

// paced runs a test with paced states in room "x".
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
		r.requireWritten(r.set(c, room, n, n))
	}
}

// tellings returns the times of the state events of a member.
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

// spaced asserts that no state came within the interval after the one before, given the
// longest time of a call.
func (r *rig) spaced(conn string, every, call time.Duration) {
	r.Helper()
	list := r.tellings(conn)
	for i := 1; i < len(list); i++ {
		require.GreaterOrEqual(r, list[i].Sub(list[i-1]), every-call, "telling %d", i)
	}
}

func TestOneStatePerInterval(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		other := r.connect("b")
		r.join(other, "x")
		const last = 300
		r.pace("free", 0)
		r.join(c, "free")
		began := time.Now()
		for n := 1; n <= last; n++ { // 10 s
			r.requireWritten(append(r.set(c, "x", n, n), r.set(c, "free", n, n)...))
			if n%10 == 0 {
				r.requireWritten(r.set(other, "x", n, n))
			}
			r.sleep(time.Second / 30)
		}
		took := time.Since(began)
		r.sleep(interval + paceSlack)
		got := r.states("a/x")
		assert.Equal(r, "s1", got[0])
		assert.Equal(r, fmt.Sprint("s", last), got[len(got)-1], "the last state is written")
		assert.LessOrEqual(r, len(got), int(took/interval)+2)
		assert.GreaterOrEqual(r, len(got), int(took/(interval+paceSlack)))
		assert.EqualValues(r, last-len(got), r.Stats().Superseded)
		assert.Equal(r, numbered(1, last), r.states("a/free"), "a room without an interval")
		var others []string
		for n := 10; n <= last; n += 10 {
			others = append(others, fmt.Sprint("s", n))
		}
		assert.Equal(r, others, r.states("b/x"), "another member, who is slower than that")
		r.forgetTold()
		r.sleep(time.Minute)
		assert.Empty(r, r.told())
		r.atRest()
	})
}

// The first state is written at once, also right after the join and after a pause. The
// caller of a state that waits for its interval is answered at once.
func TestFirstStateIsWrittenAtOnce(t *testing.T) {
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

// Several states that come while the first one is not yet written become one.
func TestUnwrittenStatesAreSuperseded(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.slow(50 * time.Millisecond)
		_, err := c.SetState("free", nil, 0, false)
		require.ErrorIs(r, err, ErrNotPresent)
		busy := r.connect("busy")
		r.sleep(time.Millisecond) // its registration is in flight
		r.requireWritten(r.set(c, "x", 1, 5))
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
		h, _ := r.storedEntry("x", "a")
		assert.False(r, h.silent)
		r.atRest()
	})
}

// A silent state waits like any other, and supersedes a waiting state.
func TestSilentStateWaits(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		require.NoError(r, c.PublishState(r.Context(), "x", []byte("quiet"), 0, true))
		h, _ := r.storedEntry("x", "a")
		assert.Equal(r, "s1", h.state)
		r.sleep(interval + paceSlack)
		h, _ = r.storedEntry("x", "a")
		assert.Equal(r, "quiet", h.state)
		assert.True(r, h.silent)
	})
}

// A waiting state ends with its entry, and does not delay the next entry.
func TestLeaveWithAWaitingState(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		r.leave(c, "x")
		r.join(c, "x")
		r.each(c, "x", 3, 3)
		r.sleep(time.Second)
		assert.Equal(r, []string{"J a/x", "S a/x s1", "L a/x l", "J a/x", "S a/x s3"}, r.told())
		r.each(c, "x", 4, 5)
		c.Close(store.CauseClosed, false)
		<-c.Gone()
		r.sleep(time.Second)
		assert.Equal(r, []string{"S a/x s4", "L a/x c"}, r.told()[5:])
	})
}

// ExpireAfter counts from the publishing of a state, even if the state waits. Its end is
// written on time.
func TestExpiryShorterThanTheInterval(t *testing.T) {
	virtual(t, func(r *rig) {
		r.pace("x", time.Minute)
		c := r.connect("a")
		r.join(c, "x")
		r.publish(c, "x", "s1", time.Second)
		r.sleep(1100 * time.Millisecond)
		assert.Equal(r, []string{"s1", ""}, r.states("a/x"))
		r.publish(c, "x", "s2", time.Second) // would be written in a minute
		r.sleep(2 * time.Minute)
		assert.Equal(r, []string{"s1", ""}, r.states("a/x"), "it was over before")

		r.publish(c, "x", "s3", 0)
		r.publish(c, "x", "s4", 10*time.Second)
		r.sleep(11 * time.Second)
		assert.Equal(r, []string{"s3", ""}, r.states("a/x")[2:], "s3 was replaced, and what replaced it is over")
		r.publish(c, "x", "s5", 90*time.Second)
		r.sleep(time.Minute)
		h, _ := r.storedEntry("x", "a")
		assert.Equal(r, "s5", h.state)
		r.sleep(time.Minute)
		assert.Equal(r, []string{"s5", ""}, r.states("a/x")[4:])
		r.atRest()
		r.drain()
		r.nothingLeft()
	})
}

// Changed rules apply at once.
func TestIntervalChanges(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.pace("x", time.Minute)
		r.ApplyRules(r.Rooms())
		r.each(c, "x", 1, 2)
		r.sleep(time.Second)
		assert.Equal(r, []string{"s1"}, r.states("a/x"))
		r.pace("x", 3*time.Second)
		r.ApplyRules(r.Rooms())
		r.sleep(time.Second)
		assert.Equal(r, []string{"s1"}, r.states("a/x"))
		r.sleep(time.Second + paceSlack)
		assert.Equal(r, []string{"s1", "s2"}, r.states("a/x"))

		r.each(c, "x", 3, 4)
		r.pace("x", 0)
		r.ApplyRules(r.Rooms())
		r.sleep(0)
		assert.Equal(r, []string{"s1", "s2", "s4"}, r.states("a/x"), "nothing waits any more")
		r.each(c, "x", 5, 9)
		assert.Equal(r, numbered(5, 9), r.states("a/x")[3:])

		r.slow(50 * time.Millisecond) // states that are queued under the old rule
		list := r.set(c, "x", 10, 10)
		r.sleep(time.Millisecond)
		list = append(list, r.set(c, "x", 11, 14)...)
		r.pace("x", time.Minute)
		r.ApplyRules(r.Rooms())
		began := time.Now()
		r.requireWritten(list)
		assert.Less(r, time.Since(began), time.Second)
		assert.Equal(r, "s14", last(r.states("a/x")))
		r.atRest()
	})
}

// While Redis is away callers get an error, and the newest state is written later.
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
			require.LessOrEqual(r, time.Since(began), answerTimeout)
			c.mu.Lock()
			require.LessOrEqual(r, len(c.entries["x"].queue.older), 1)
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

// Lost replies do not bring states closer together.
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

// A rejoin carries the newest state, even if that waits.
func TestRejoinWithAWaitingState(t *testing.T) {
	paced(t, func(r *rig, c *Conn) {
		r.each(c, "x", 1, 2)
		r.redis.do(func() { r.redis.cleanUpDead("I1") })
		r.reregister("I2", false)
		r.sleep(10 * time.Millisecond)
		h, ok := r.storedEntry("x", "a")
		require.True(r, ok)
		assert.Equal(r, "s2", h.state)
		before := len(r.told())
		r.sleep(time.Second)
		assert.Len(r, r.told(), before, "it is not written once more")
		r.atRest()
	})
}

// Joins, Flush, changes of metadata and a drain do not wait for a waiting state.
func TestNothingWaitsForAWaitingState(t *testing.T) {
	virtual(t, func(r *rig) {
		r.pace("x", time.Minute)
		c := r.connect("a")
		r.join(c, "x")
		r.each(c, "x", 1, 2)
		began := time.Now()
		assert.True(r, r.join(c, "x").Again)
		c.SetMeta(3, []byte("m"))
		require.NoError(r, c.Flush(r.Context()))
		h, _ := r.storedEntry("x", "a")
		assert.Equal(r, "m", h.meta)
		assert.Equal(r, "s1", h.state)
		assert.Zero(r, time.Since(began))
		r.drain()
		assert.Zero(r, time.Since(began))
		r.nothingLeft()
		assert.False(r, slices.Contains(r.told(), "S a/x s2"))
	})
}

// Without a rule with an interval there is no wheel for it.
func TestNoWheelWithoutAnInterval(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.each(c, "x", 1, 50)
		assert.Nil(r, r.Registry.paceWheel)
		c.mu.Lock()
		assert.Nil(r, c.entries["x"].queue)
		c.mu.Unlock()
	})
}
