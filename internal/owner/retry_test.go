package owner

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// othersAct is when another server acts on a key that ran out: counted from the
// moment when Redis takes writes again.
const othersAct = 500 * time.Millisecond

// until returns when a connection's key runs out.
func (r *rig) until(room, conn string) (until time.Time) {
	r.redis.do(func() { until = r.redis.rooms[room][conn].until })
	return until
}

// Whatever Redis does to writes and for however long: when it takes them again,
// the keys of entries with a TTL are refreshed well before another server acts.
func TestRefreshesComeFirstAfterAnOutage(t *testing.T) {
	for name, fail := range map[string]func(r *rig, on bool){
		"batches refused": func(r *rig, on bool) {
			r.plan(func(int, []store.Op) fault { return map[bool]fault{true: {never: true, err: errRefused}}[on] })
		},
		"ops refused": func(r *rig, on bool) { r.refuse(func(store.Op) bool { return on }) },
		"no answers": func(r *rig, on bool) {
			r.plan(func(int, []store.Op) fault { return map[bool]fault{true: {never: true, after: time.Hour}}[on] })
		},
	} {
		t.Run(name, func(t *testing.T) {
			for away := 1000 * time.Millisecond; away <= 3*time.Second; away += 130 * time.Millisecond {
				t.Run(fmt.Sprint(away), func(t *testing.T) {
					virtual(t, func(r *rig) {
						r.rule("x", time.Second)
						c := r.connect("a")
						r.join(c, "x")
						for range 20 {
							r.sleep(100 * time.Millisecond)
							c.Seen()
						}
						fail(r, true)
						began := time.Now()
						for time.Since(began) < away {
							r.sleep(min(100*time.Millisecond, away-time.Since(began)))
							c.Seen()
						}
						fail(r, false)
						back := time.Now()
						for r.until("x", "a").Before(time.Now()) && time.Since(back) < othersAct {
							r.sleep(10 * time.Millisecond)
							c.Seen()
						}
						assert.Less(r, time.Since(back), othersAct-100*time.Millisecond)
						r.heal()
						require.Empty(r, leavesIn(r.said()))
					}, func(cfg *Config) {
						cfg.Answered = func(int) time.Time { return time.Time{} } // never in time
					})
				})
			}
		})
	}
}

func leavesIn(lines []string) (leaves []string) {
	for _, l := range lines {
		if l[0] == 'L' {
			leaves = append(leaves, l)
		}
	}
	return leaves
}

// A Redis that answers late, and no answer comes in time, is waited for longer:
// at once if late answers are seen to come, after a few attempts otherwise.
func TestASlowRedisIsGivenLonger(t *testing.T) {
	for name, seen := range map[string]bool{"late answers are seen": true, "nothing is seen": false} {
		t.Run(name, func(t *testing.T) {
			var newest atomic.Pointer[time.Time]
			virtual(t, func(r *rig) {
				in := r.connect("in")
				r.sleep(time.Second)
				r.plan(func(int, []store.Op) fault {
					if seen {
						at := time.Now().Add(time.Hour) // one is on its way
						newest.Store(&at)
					}
					return fault{after: time.Second}
				})
				before := r.calls()
				_, _ = in.Join(r.Context(), "x")
				r.sleep(6 * time.Second)
				assert.NotContains(r, r.said(), "L in/x l")
				if seen {
					assert.LessOrEqual(r, r.calls()-before, 2)
				}
				r.heal()
				r.sleep(3 * time.Second)
				r.atRest()
			}, func(cfg *Config) {
				cfg.Answered = func(int) time.Time {
					if at := newest.Load(); at != nil {
						return *at
					}
					return time.Time{}
				}
			})
		})
	}
}

// An op that Redis refuses because of its data, or for lack of memory, is not tried
// several times a second.
func TestARefusalForGoodIsNotRetriedOften(t *testing.T) {
	for _, why := range []error{store.ErrData, store.ErrFull} {
		t.Run(why.Error(), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("x", time.Second)
				c := r.connect("a")
				r.sleep(time.Second)
				r.redis.do(func() { r.redis.refusal = why })
				r.refuse(func(op store.Op) bool { return op.Room == "x" })
				before := r.calls()
				_, err := c.Join(r.Context(), "x")
				assert.ErrorIs(r, err, why)
				for range 50 {
					r.sleep(100 * time.Millisecond)
					c.Seen()
				}
				assert.LessOrEqual(r, r.calls()-before, 16) // a refresh comes every 0.7 s as well
				r.heal()
			})
		})
	}
}

// What is offered once more as work that can wait, while the batch with it flies and
// is lost, is still as urgent as it was.
func TestLostBatchesKeepTheirUrgency(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Second)
		c := r.connect("c")
		r.join(c, "x")
		r.sleep(100 * time.Millisecond)
		r.plan(func(int, []store.Op) fault { return fault{before: 10 * time.Millisecond, never: true} })
		c.mu.Lock()
		e := c.entries["x"]
		e.refresh = true
		e.lane.offer(e, timed)
		c.mu.Unlock()
		r.sleep(5 * time.Millisecond)
		c.mu.Lock()
		e.verify()
		c.mu.Unlock()
		r.sleep(10 * time.Millisecond) // the pause after the batch has begun
		e.lane.mu.Lock()
		queued, u := e.marked.queued, e.marked.urgency
		e.lane.mu.Unlock()
		assert.True(r, queued)
		assert.Equal(r, timed, u)
		r.heal()
		r.sleep(time.Second)
		r.drain()
		r.nothingLeft()
	})
}

// A connection that Redis let into no room, because a key of another type is in the
// way, has nothing to leave there. It is forgotten when it closes.
func TestRefusedJoinsLeaveNothing(t *testing.T) {
	virtual(t, func(r *rig) {
		r.redis.do(func() { r.redis.refusal = fmt.Errorf("%w: WRONGTYPE", store.ErrData) })
		r.refuse(func(op store.Op) bool { return op.Room == "x" })
		for i := range 100 {
			c := r.connect(fmt.Sprint(i))
			_, err := c.Join(r.Context(), "x")
			require.ErrorIs(r, err, ErrUnavailable)
			c.Close(store.CauseClosed)
		}
		r.sleep(3 * time.Second)
		r.nothingLeft()
	})
}
