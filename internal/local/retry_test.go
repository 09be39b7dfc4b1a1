package local

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// othersAct is the time until another server acts on an expired key, counted from the
// moment at which Redis takes writes again.
const othersAct = 500 * time.Millisecond

// until returns the end of a connection's key.
func (r *rig) until(room, conn string) (until time.Time) {
	r.redis.do(func() { until = r.redis.rooms[room][conn].until })
	return until
}

// However Redis fails and for however long, the keys of entries with a TTL are refreshed
// well before another server acts.
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
							c.Touched()
						}
						fail(r, true)
						began := time.Now()
						for time.Since(began) < away {
							r.sleep(min(100*time.Millisecond, away-time.Since(began)))
							c.Touched()
						}
						fail(r, false)
						back := time.Now()
						for r.until("x", "a").Before(time.Now()) && time.Since(back) < othersAct {
							r.sleep(10 * time.Millisecond)
							c.Touched()
						}
						assert.Less(r, time.Since(back), othersAct-100*time.Millisecond)
						r.heal()
						require.Empty(r, leavesIn(r.told()))
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

// If answers of Redis come too late, attempts get more time: at once if late answers are
// seen, otherwise after a few attempts.
func TestSlowRedisGetsMoreTime(t *testing.T) {
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
				assert.NotContains(r, r.told(), "L in/x l")
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

// An op that Redis refuses because of its data or for lack of memory is not tried several
// times a second.
func TestPermanentRefusalIsRarelyRetried(t *testing.T) {
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
					c.Touched()
				}
				assert.LessOrEqual(r, r.calls()-before, 16) // a refresh comes every 0.7 s as well
				r.heal()
			})
		})
	}
}

// A batch is lost while one of its items is queued again with a lower priority. The item
// keeps the higher one.
func TestLostBatchesKeepTheirPriority(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Second)
		c := r.connect("c")
		r.join(c, "x")
		r.sleep(100 * time.Millisecond)
		r.plan(func(int, []store.Op) fault { return fault{before: 10 * time.Millisecond, never: true} })
		c.mu.Lock()
		e := c.entries["x"]
		e.refresh = true
		e.writer.enqueue(e, timed)
		c.mu.Unlock()
		r.sleep(5 * time.Millisecond)
		c.mu.Lock()
		e.verify()
		c.mu.Unlock()
		r.sleep(10 * time.Millisecond) // the pause after the batch has begun
		e.writer.mu.Lock()
		queued, p := e.inQueue.queued, e.inQueue.priority
		e.writer.mu.Unlock()
		assert.True(r, queued)
		assert.Equal(r, timed, p)
		r.heal()
		r.sleep(time.Second)
		r.drain()
		r.nothingLeft()
	})
}

// Redis let a connection into no room because a key of another type is in the way. The
// connection has nothing to leave there, and is removed when it closes.
func TestRefusedJoinsLeaveNothing(t *testing.T) {
	virtual(t, func(r *rig) {
		r.redis.do(func() { r.redis.refusal = fmt.Errorf("%w: WRONGTYPE", store.ErrData) })
		r.refuse(func(op store.Op) bool { return op.Room == "x" })
		for i := range 100 {
			c := r.connect(fmt.Sprint(i))
			_, err := c.Join(r.Context(), "x")
			require.ErrorIs(r, err, ErrUnavailable)
			c.Close(store.CauseClosed, false)
		}
		r.sleep(3 * time.Second)
		r.nothingLeft()
	})
}

// Every unknown outcome ends in one join and one leave.
func TestUnknownOutcomes(t *testing.T) {
	t.Parallel()
	for name, x := range map[string]fault{
		"ran, reply lost":  {lost: true},
		"did not run":      {never: true},
		"runs much later":  {late: 500 * time.Millisecond},
		"runs a bit later": {late: 10 * time.Millisecond},
		"slow and lost":    {before: time.Second, after: 500 * time.Millisecond, lost: true},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				twice := func(call int, _ []store.Op) fault {
					if call < 2 {
						return x
					}
					return fault{}
				}
				c := r.connect("a")
				require.NoError(r, c.Registered(r.Context()))
				r.plan(twice)
				_, _ = c.Join(r.Context(), "x")
				r.sleep(5 * time.Second)
				r.atRest()
				r.plan(twice)
				_ = c.PublishState(r.Context(), "x", []byte("s"), 0, false)
				r.sleep(5 * time.Second)
				r.plan(twice)
				_, _ = c.Leave(r.Context(), "x", store.CauseLeft)
				r.sleep(5 * time.Second)
				r.plan(twice)
				c.Close(store.CauseClosed, false)
				r.sleep(5 * time.Second)
				assert.Equal(r, []string{"J a/x", "S a/x s", "L a/x l"}, r.told())
				r.nothingLeft()
			})
		})
	}
}

// Changes made while the outcome of a join is unknown are written with the repeated join
// or after it.
func TestStateWhileAJoinIsUnknown(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.plan(func(call int, _ []store.Op) fault {
			if call == 0 {
				return fault{after: 300 * time.Millisecond, lost: true}
			}
			return fault{}
		})
		var wg sync.WaitGroup
		wg.Go(func() { r.join(c, "x") })
		r.sleep(100 * time.Millisecond)
		r.publish(c, "x", "s", 0)
		c.SetMeta(1, []byte("m"))
		wg.Wait()
		require.NoError(r, c.Flush(r.Context()))
		h, ok := r.storedEntry("x", "a")
		require.True(r, ok)
		assert.Equal(r, "s", h.state)
		assert.Equal(r, "m", h.meta)
		r.atRest()
	})
}

// The Redis client returns the timeout of an earlier dial at once after many have failed.
// That must not make batches as fast as possible.
func TestImmediateTimeoutIsNoWait(t *testing.T) {
	virtual(t, func(r *rig) {
		in := r.connect("in")
		r.plan(func(int, []store.Op) fault {
			return fault{err: fmt.Errorf("dial: %w", context.DeadlineExceeded)}
		})
		_, err := in.Join(r.Context(), "x")
		assert.ErrorIs(r, err, ErrUnavailable)
		before := r.calls()
		r.sleep(time.Minute)
		assert.LessOrEqual(r, r.calls()-before, 60*6, "it backs off")
		r.heal()
		r.sleep(time.Second + 100*time.Millisecond)
		assert.Equal(r, []string{"J in/x"}, r.told())
		r.drain()
	})
}

// The store gives up on a call before the last limit of a batch. That counts as a wait,
// and the next attempt follows at once, however many fail.
func TestNoPauseAfterATimeout(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		const storeGivesUp = 1800 * time.Millisecond
		began := time.Now()
		var at []time.Duration
		r.plan(func(int, []store.Op) fault {
			at = append(at, time.Since(began))
			return fault{before: storeGivesUp, never: true, err: context.DeadlineExceeded}
		})
		c.SetMeta(2, []byte("m"))
		const first = 600 * time.Millisecond
		r.sleep(3*first + 4*storeGivesUp)
		r.redis.do(func() {
			want := []time.Duration{0, first}
			for i := range 5 {
				want = append(want, 3*first+time.Duration(i)*storeGivesUp)
			}
			assert.Equal(r, want, at)
		})
		r.heal()
		r.sleep(storeGivesUp)
		r.atRest()
	})
}
