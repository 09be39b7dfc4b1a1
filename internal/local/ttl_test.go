package local

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
	"github.com/meshpresence/mesh/internal/wait"
)

// frames lets a connection give signs of life until stop.
func (r *rig) frames(c *Conn, every time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(r.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for wait.For(ctx, every) == nil {
			c.Touched()
		}
	})
	return func() { cancel(); wg.Wait() }
}

// last returns the last event.
func (r *rig) last() event {
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
				assert.Len(r, r.told(), 2, "frames keep it")
				c.Touched()
				silent := time.Now()

				r.sleep(ttl + time.Second)
				e := r.last()
				assert.Equal(r, []string{"J a/x", "J a/forever", "L a/x s"}, r.told())
				assert.GreaterOrEqual(r, e.at.Sub(silent), ttl)
				assert.LessOrEqual(r, e.at.Sub(silent), ttl+time.Second)
				r.sleep(10 * ttl)
				assert.Len(r, r.told(), 3, "once")
				assert.True(r, c.In("x"), "it comes back by itself")
				assert.Empty(r, r.InRoom("x"))
				require.ErrorIs(r, c.PublishState(r.Context(), "x", []byte("s"), 0, false), ErrNotPresent)
				r.atRest()

				c.Touched()
				r.sleep(time.Millisecond)
				assert.Equal(r, "J a/x", r.told()[3])
				r.atRest()
				assert.Zero(r, c.frameWaiters.Load())
				r.leave(c, "x")
				assert.Equal(r, []time.Duration{ttl, 0}, l.told())
				r.drain()
				r.nothingLeft()
				assert.EqualValues(r, 1, r.Stats().LeftSilent)
			})
		})
	}
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
			h, ok := r.storedEntry("x", "a")
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

// The key's life counts from the last frame, so that the key of a silent connection of a
// dead server runs out too.
func TestRefreshCountsFromTheLastFrame(t *testing.T) {
	virtual(t, func(r *rig) {
		const ttl = 9 * time.Second
		r.rule("x", ttl)
		c := r.connect("a")
		r.join(c, "x")
		r.sleep(time.Second)
		c.Touched()
		end := time.Now().Add(ttl + time.Second)
		r.sleep(ttl - time.Second)
		h, ok := r.storedEntry("x", "a")
		require.True(r, ok)
		assert.WithinDuration(r, end, h.until, time.Millisecond)
	})
}

// Refreshes of several entries share a call, whatever their rooms and whenever they
// joined.
func TestRefreshesShareACall(t *testing.T) {
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
			c.Touched()
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

// Redis lost an entry, or another server ended it after its key had expired. A connection
// that is alive returns at the next refresh, and a silent one at the next frame.
func TestEntryEndedByAnotherServer(t *testing.T) {
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
					want = append(want, "L a/x s") // back at the refresh, because there was a frame within the TTL
				}
				assert.Equal(r, want, r.told())
				stop()
				r.atRest()
			})
		})
	}
}

// If nothing ends silent entries, entries stay, keys run out, and an entry is refreshed
// at the next frame.
func TestLapsedEntries(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", 3*time.Second)
		r.rule("y", 3*time.Second)
		c, d := r.connect("a"), r.connect("b")
		r.join(c, "x")
		r.join(d, "x")
		r.join(d, "y")
		r.sleep(time.Minute)
		assert.Len(r, r.told(), 3, "they stay")
		h, _ := r.storedEntry("x", "a")
		assert.True(r, h.until.Before(time.Now()), "and the key may run out")
		r.atRest()

		c.Touched()
		r.sleep(time.Millisecond)
		h, _ = r.storedEntry("x", "a")
		assert.Equal(r, 4*time.Second, time.Until(h.until)+time.Millisecond)
		assert.Zero(r, c.frameWaiters.Load())
		assert.Len(r, r.told(), 3)

		n, err := r.EndLapsed(r.Context(), "x")
		require.NoError(r, err)
		assert.Equal(r, 1, n)
		assert.Equal(r, []string{"J a/x", "J b/x", "J b/y", "L b/x s"}, r.told())
		n, err = r.EndLapsed(r.Context(), "x")
		require.NoError(r, err)
		assert.Zero(r, n)
		r.atRest()
		d.Touched()
		r.sleep(time.Millisecond)
		assert.Equal(r, "J b/x", r.told()[4])
		assert.Zero(r, d.frameWaiters.Load())

		// Cleaned up by the app on another server.
		r.sleep(time.Minute)
		r.redis.do(r.redis.cleanUpExpired)
		assert.Len(r, r.told(), 8)
		c.Touched()
		d.Touched()
		r.sleep(time.Second)
		assert.Len(r, r.told(), 11)
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
		assert.Len(r, r.told(), 10)
		r.atRest()
	}, func(cfg *Config) { cfg.EndSilent = false })
}
