package owner

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// frames has a connection show signs of life until told to stop.
func (r *rig) frames(c *Conn, every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(r.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for wait(ctx, every) == nil {
			c.Seen()
		}
	})
	return func() { cancel(); wg.Wait() }
}

// last returns the last event.
func (r *rig) last() told {
	r.redis.mu.Lock()
	defer r.redis.mu.Unlock()
	return r.redis.events[len(r.redis.events)-1]
}

func TestSilence(t *testing.T) {
	t.Parallel()
	for _, ttl := range []time.Duration{time.Second, 1700 * time.Millisecond, 10 * time.Second, time.Minute} {
		t.Run(ttl.String(), func(t *testing.T) {
			virtual(t, func(r *rig) {
				l := &link{}
				r.rule("x", ttl)
				c, err := r.Connect("a", nil, l, func() {})
				require.NoError(r, err)
				r.join(c, "x")
				r.join(c, "forever")
				assert.Equal(r, []time.Duration{ttl}, l.told())
				stop := r.frames(c, ttl/3)
				r.sleep(10 * ttl)
				stop()
				assert.Len(r, r.said(), 2, "frames keep it")
				c.Seen()
				silent := time.Now()

				r.sleep(ttl + time.Second)
				e := r.last()
				assert.Equal(r, []string{"J a/x", "J a/forever", "L a/x s"}, r.said())
				assert.GreaterOrEqual(r, e.at.Sub(silent), ttl)
				assert.LessOrEqual(r, e.at.Sub(silent), ttl+time.Second)
				r.sleep(10 * ttl)
				assert.Len(r, r.said(), 3, "once")
				assert.True(r, c.In("x"), "it comes back by itself")
				assert.Empty(r, r.InRoom("x"))
				require.ErrorIs(r, c.PublishState(r.Context(), "x", []byte("s"), 0, false), ErrNotPresent)
				r.atRest()

				c.Seen()
				r.sleep(time.Millisecond)
				assert.Equal(r, "J a/x", r.said()[3])
				r.atRest()
				assert.Zero(r, c.sleepers.Load())
				r.leave(c, "x")
				assert.Equal(r, []time.Duration{ttl, 0}, l.told())
				r.drain()
				r.nothingLeft()
				assert.EqualValues(r, 1, r.Stats().LeftSilent)
			})
		})
	}
}

// Who asks to leave while it is away does not come back; who joins does.
func TestAskedWhileAsleep(t *testing.T) {
	virtual(t, func(r *rig) {
		for _, room := range []string{"leaves", "joins", "closes"} {
			r.rule(room, time.Second)
		}
		c := r.connect("a")
		r.join(c, "leaves")
		r.join(c, "joins")
		r.join(c, "closes")
		r.sleep(3 * time.Second)
		require.Len(r, r.said(), 6)
		r.forgetSaid()
		r.leave(c, "leaves")
		assert.False(r, r.join(c, "joins").Again)
		assert.Equal(r, []string{"J a/joins"}, r.said())
		assert.Equal(r, []string{"closes", "joins"}, c.Rooms())
		c.Close(store.CauseClosed)
		<-c.Gone()
		assert.Equal(r, []string{"J a/joins", "L a/joins c"}, r.said())
		c.Seen()
		r.nothingLeft()
	})
}

// The frame that comes while the leave is being written joins anew after it.
func TestFrameWhileItIsEnded(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Second)
		c := r.connect("a")
		r.join(c, "x")
		r.plan(func(int, []store.Op) fault {
			return fault{before: 100 * time.Millisecond, after: 100 * time.Millisecond}
		})
		r.sleep(1100 * time.Millisecond) // the leave is under way
		c.Seen()
		r.sleep(time.Second / 2)
		assert.Equal(r, []string{"J a/x", "L a/x s", "J a/x"}, r.said())
		r.atRest()
	})
}

func TestRefreshCadence(t *testing.T) {
	virtual(t, func(r *rig) {
		const ttl = 11 * time.Second
		r.rule("x", ttl)
		c := r.connect("a")
		r.join(c, "x")
		stop := r.frames(c, time.Second)
		var at []time.Time
		r.plan(func(_ int, ops []store.Op) fault {
			at = append(at, time.Now())
			assert.Len(r, ops, 1)
			assert.Equal(r, string(store.OpUpdate), string(ops[0].Kind))
			assert.Equal(r, ttl, ops[0].TTL)
			assert.LessOrEqual(r, ops[0].Left, ttl+time.Second)
			assert.GreaterOrEqual(r, ops[0].Left, ttl-100*time.Millisecond)
			return fault{}
		})
		for range 600 {
			r.sleep(100 * time.Millisecond)
			h, ok := r.held("x", "a")
			require.True(r, ok)
			require.Greater(r, time.Until(h.until), ttl/2, "the key is never near its end")
		}
		stop()
		for i := range at[1:] {
			gap := at[i+1].Sub(at[i])
			assert.LessOrEqual(r, gap, (ttl+time.Second)/3+50*time.Millisecond)
			assert.GreaterOrEqual(r, gap, 2*time.Second)
		}
		assert.LessOrEqual(r, len(at), 20)
	})
}

// The key's life counts from the last frame, so that it dies with a silent
// connection of a dead server too.
func TestRefreshCountsFromTheLastFrame(t *testing.T) {
	virtual(t, func(r *rig) {
		const ttl = 9 * time.Second
		r.rule("x", ttl)
		c := r.connect("a")
		r.join(c, "x")
		r.sleep(time.Second)
		c.Seen()
		end := time.Now().Add(ttl + time.Second)
		r.sleep(ttl - time.Second)
		h, ok := r.held("x", "a")
		require.True(r, ok)
		assert.WithinDuration(r, end, h.until, time.Millisecond)
	})
}

// Entries come due together, whatever their rooms and whenever they joined.
func TestRefreshesGoTogether(t *testing.T) {
	virtual(t, func(r *rig) {
		r.plan(func(int, []store.Op) fault { return fault{before: time.Millisecond} })
		var conns []*Conn
		for i := range 1000 {
			room := fmt.Sprint("room", i%50)
			r.rule(room, 29*time.Second)
			c := r.connect(fmt.Sprint(i))
			conns = append(conns, c)
			_, err := c.Join(r.Context(), room)
			require.NoError(r, err)
		}
		r.sleep(20 * time.Second)
		for _, c := range conns {
			c.Seen()
		}
		before := r.Stats()
		r.sleep(10 * time.Second)
		after := r.Stats()
		assert.EqualValues(r, 1000, after.Ops-before.Ops, "each once in a third of its life")
		assert.LessOrEqual(r, after.Batches-before.Batches, uint64(20))
		r.drain()
		r.nothingLeft()
	})
}

func TestEntriesWithoutTTLCostNothing(t *testing.T) {
	virtual(t, func(r *rig) {
		for i := range 100 {
			r.join(r.connect(fmt.Sprint(i)), "x")
		}
		before := r.calls()
		r.sleep(time.Hour)
		assert.Equal(r, before, r.calls())
		assert.Zero(r, r.wheel.Armed())
	})
}

func TestStateExpires(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.forgetSaid()
		r.publish(c, "x", "short", 2*time.Second)
		began := time.Now()
		r.sleep(2500 * time.Millisecond)
		assert.Equal(r, []string{"S a/x short", "S a/x"}, r.said())
		assert.GreaterOrEqual(r, r.last().at.Sub(began), 2*time.Second)

		// A newer one is not ended by the older one's time.
		r.forgetSaid()
		r.publish(c, "x", "one", 2*time.Second)
		r.sleep(time.Second)
		r.publish(c, "x", "two", 3*time.Second)
		r.sleep(2900 * time.Millisecond)
		assert.Equal(r, []string{"S a/x one", "S a/x two"}, r.said())
		r.publish(c, "x", "three", 0)
		r.sleep(time.Hour)
		assert.Equal(r, []string{"S a/x one", "S a/x two", "S a/x three"}, r.said())

		// Cleared, left and closed: no time of theirs is left.
		r.publish(c, "x", "four", time.Minute)
		require.NoError(r, c.ClearState(r.Context(), "x"))
		r.publish(c, "x", "five", time.Minute)
		r.leave(c, "x")
		assert.Zero(r, r.wheel.Armed())
		r.join(c, "x")
		r.sleep(time.Hour)
		assert.Equal(r, []string{
			"S a/x one", "S a/x two", "S a/x three", "S a/x four", "S a/x", "S a/x five", "L a/x l", "J a/x",
		}, r.said())
		h, _ := r.held("x", "a")
		assert.Empty(r, h.state)
		r.atRest()
	})
}

// A state that ran out while Redis was away is never told, and one that has
// not has the rest of its time.
func TestStateExpiresWhileRedisIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		c := r.connect("a")
		r.join(c, "x")
		r.join(c, "y")
		r.forgetSaid()
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
		assert.Equal(r, []string{"S a/y rest"}, r.said())
		assert.InDelta(r, 20*time.Second-time.Since(published), left, float64(1200*time.Millisecond))
		r.sleep(20 * time.Second)
		assert.Equal(r, []string{"S a/y rest", "S a/y"}, r.said())
		r.atRest()
	})
}

// Rules may change while entries are there, while they are being refreshed,
// and while they are away.
func TestRetime(t *testing.T) {
	virtual(t, func(r *rig) {
		l := &link{}
		c, err := r.Connect("a", nil, l, func() {})
		require.NoError(r, err)
		r.join(c, "x")
		set := func(ttl time.Duration) held {
			r.rule("x", ttl)
			r.Retime(r.Rooms())
			r.sleep(10 * time.Millisecond)
			h, ok := r.held("x", "a")
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

		// While a refresh is under way, which tells Redis the old TTL.
		r.plan(func(int, []store.Op) fault {
			return fault{before: 100 * time.Millisecond, after: 100 * time.Millisecond}
		})
		stop := r.frames(c, time.Second)
		before := r.calls()
		for r.calls() == before {
			r.sleep(10 * time.Millisecond)
		}
		r.rule("x", 0)
		r.Retime(r.Rooms())
		r.sleep(time.Second)
		stop()
		h, _ := r.held("x", "a")
		assert.Zero(r, h.ttl)
		assert.True(r, h.until.IsZero(), "a key would run out, and take who is alive with it")
		r.heal()

		// While it is away.
		set(2 * time.Second)
		r.sleep(5 * time.Second)
		assert.Equal(r, "L a/x s", r.said()[1])
		r.rule("x", time.Hour)
		r.Retime(r.Rooms())
		c.Seen()
		r.sleep(time.Millisecond)
		h, _ = r.held("x", "a")
		assert.Equal(r, time.Hour, h.ttl)
		r.sleep(time.Minute)
		assert.Len(r, r.said(), 3)
		r.drain()
		r.nothingLeft()
	})
}

// Redis lost an entry, or another server ended it on its expired key: who is
// alive is back at the next refresh, who is silent at the next frame.
func TestEntryEndedByAnother(t *testing.T) {
	for _, alive := range []bool{true, false} {
		t.Run(fmt.Sprint("alive ", alive), func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("x", 10*time.Second)
				c := r.connect("a")
				r.join(c, "x")
				stop := func() {}
				if alive {
					stop = r.frames(c, time.Second)
				}
				r.sleep(5 * time.Second)
				r.redis.do(func() { r.redis.remove("x", "a", store.CauseSilent) })
				r.sleep(10 * time.Second)
				want := []string{"J a/x", "L a/x s", "J a/x"}
				if !alive {
					want = append(want, "L a/x s") // back at the refresh, as there was a frame within the TTL
				}
				assert.Equal(r, want, r.said())
				stop()
				r.atRest()
			})
		})
	}
}

// Where nobody ends what is silent, entries stay, keys run out, and whoever
// comes back is refreshed at once.
func TestLapsedEntries(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", 3*time.Second)
		r.rule("y", 3*time.Second)
		c, d := r.connect("a"), r.connect("b")
		r.join(c, "x")
		r.join(d, "x")
		r.join(d, "y")
		r.sleep(time.Minute)
		assert.Len(r, r.said(), 3, "they stay")
		h, _ := r.held("x", "a")
		assert.True(r, h.until.Before(time.Now()), "and the key may run out")
		r.atRest()

		c.Seen()
		r.sleep(time.Millisecond)
		h, _ = r.held("x", "a")
		assert.Equal(r, 4*time.Second, time.Until(h.until)+time.Millisecond)
		assert.Zero(r, c.sleepers.Load())
		assert.Len(r, r.said(), 3)

		n, err := r.EndLapsed(r.Context(), "x")
		require.NoError(r, err)
		assert.Equal(r, 1, n)
		assert.Equal(r, []string{"J a/x", "J b/x", "J b/y", "L b/x s"}, r.said())
		n, err = r.EndLapsed(r.Context(), "x")
		require.NoError(r, err)
		assert.Zero(r, n)
		r.atRest()
		d.Seen()
		r.sleep(time.Millisecond)
		assert.Equal(r, "J b/x", r.said()[4])
		assert.Zero(r, d.sleepers.Load())

		// Reaped by hand, by the app on another server.
		r.sleep(time.Minute)
		r.redis.do(r.redis.reap)
		assert.Len(r, r.said(), 8)
		c.Seen()
		d.Seen()
		r.sleep(time.Second)
		assert.Len(r, r.said(), 11)
		r.atRest()
		r.drain()
		r.nothingLeft()
	}, func(cfg *Config) { cfg.EndSilent = false })
}

func TestEndLapsedWhileRedisIsAway(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Second)
		for i := range 5 {
			r.join(r.connect(fmt.Sprint(i)), "x")
		}
		r.sleep(3 * time.Second)
		r.away()
		began := time.Now()
		_, err := r.EndLapsed(r.Context(), "x")
		require.ErrorIs(r, err, ErrUnavailable)
		assert.Less(r, time.Since(began), 2*time.Second)
		r.heal()
		r.sleep(2 * time.Second)
		assert.Len(r, r.said(), 10)
		r.atRest()
	}, func(cfg *Config) { cfg.EndSilent = false })
}

// Whoever was asleep when the rules changed is asked for signs of life as often
// as the new TTL needs when it is back.
func TestTTLIsToldWhenReviving(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("room", time.Minute)
		l := &link{}
		c, err := r.Connect("c", nil, l, func() {})
		require.NoError(r, err)
		r.join(c, "room")
		r.sleep(62 * time.Second)
		r.rule("room", 2*time.Second)
		r.Retime(r.Rooms())
		c.Seen()
		r.sleep(time.Second)
		told := l.told()
		assert.Equal(r, 2*time.Second, told[len(told)-1], "%v", told)
	})
}

// While Redis is away nobody answers the leave; that its frame was a sign of
// life for the other rooms is known all the same.
func TestAskingToLeaveOneRoomWakesTheOthersAtOnce(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("left", time.Second)
		r.rule("kept", time.Second)
		c := r.connect("c")
		r.join(c, "left")
		r.join(c, "kept")
		r.sleep(3 * time.Second) // silent: out of both
		r.away()
		began := time.Now()
		c.Stamp()
		go func() { _, _ = c.Leave(r.Context(), "left", store.CauseLeft) }()
		synctest.Wait()
		wanted, _, _ := c.standing()
		require.Equal(t, 1, wanted)
		require.Zero(t, time.Since(began))
		require.False(t, c.In("left"))
		r.heal()
		r.sleep(5 * time.Second)
		require.False(t, c.In("left"))
	})
}
