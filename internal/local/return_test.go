package local

import (
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// gate is a MayReturn with a settable answer. It counts its calls.
type gate struct {
	open  atomic.Bool
	asked atomic.Int64
}

func (g *gate) set(cfg *Config) {
	cfg.MayReturn = func(*Conn, string) bool {
		g.asked.Add(1)
		return g.open.Load()
	}
}

func yes(uint64) error { return nil }

func TestReturnWaitsForPermission(t *testing.T) {
	g := &gate{}
	virtual(t, func(r *rig) {
		r.rule("room", 2*time.Second)
		c := r.connect("c")
		r.join(c, "room")
		in := func() bool { _, ok := r.storedEntry("room", "c"); return ok }
		silent := func() {
			r.Helper()
			r.sleep(5 * time.Second)
			require.False(r, in())
		}
		silent()
		for range 3 {
			c.Touched()
			r.sleep(50 * time.Millisecond)
		}
		require.False(r, in())
		require.EqualValues(r, 3, g.asked.Load())
		require.True(r, c.In("room"), "it is still to come back")

		no := errors.New("no")
		was, err := c.Return("room", func(uint64) error { return no })
		require.True(r, was)
		require.Equal(r, no, err)
		was, err = c.Return("room", yes)
		require.True(r, was)
		require.NoError(r, err)
		r.sleep(50 * time.Millisecond)
		require.True(r, in())
		was, err = c.Return("room", yes)
		require.False(r, was, "it is in")
		require.NoError(r, err)
		require.False(r, c.StayOut("room", func(uint64) bool { return true }))

		// The connection falls silent again before it gets the permission. Only its last
		// frame counts.
		silent()
		c.Touched()
		r.sleep(1500 * time.Millisecond)
		was, err = c.Return("room", yes)
		require.True(r, was)
		require.NoError(r, err)
		r.sleep(100 * time.Millisecond)
		require.True(r, in())
		r.sleep(time.Second)
		require.False(r, in(), "the TTL counts from the frame")
		_, err = c.Return("room", yes)
		require.NoError(r, err)
		r.sleep(50 * time.Millisecond)
		require.False(r, in(), "it has been silent for too long")

		c.Touched()
		require.False(r, c.StayOut("room", func(uint64) bool { return false }))
		require.True(r, c.StayOut("room", func(uint64) bool { return true }))
		require.False(r, c.In("room"))
		asked := g.asked.Load()
		c.Touched()
		require.Equal(r, asked, g.asked.Load(), "it is over")
		r.join(c, "room")
		require.True(r, in())
	}, g.set)
}

// These returns need a permission.
func TestReturnsThatNeedPermission(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		do    func(r *rig, c *Conn)
		asked bool
	}{
		"silence": {asked: true, do: func(r *rig, _ *Conn) { r.sleep(10 * time.Second) }},
		"a stall": {asked: true, do: func(r *rig, _ *Conn) {
			r.redis.do(func() { r.redis.cleanUpDead("I1") })
			r.reregister("I2", true)
			r.sleep(500 * time.Millisecond)
		}},
		"a reregistration": {do: func(r *rig, _ *Conn) { r.redis.do(func() { r.redis.cleanUpDead("I1") }); r.reregister("I2", false) }},
		"data loss":        {do: func(r *rig, _ *Conn) { r.redis.do(func() { clear(r.redis.rooms) }); r.heartbeat(true) }},
	} {
		t.Run(name, func(t *testing.T) {
			g := &gate{}
			virtual(t, func(r *rig) {
				r.rule("room", 2*time.Second)
				c := r.connect("c")
				r.join(c, "room")
				tc.do(r, c)
				c.Touched()
				r.sleep(time.Second)
				require.Equal(r, tc.asked, g.asked.Load() > 0)
				_, in := r.storedEntry("room", "c")
				require.Equal(r, !tc.asked, in)
			}, g.set)
		})
	}
}

func TestJoinIfAndLeaveIf(t *testing.T) {
	virtual(t, func(r *rig) {
		ctx := r.Context()
		c := r.connect("c")
		no := errors.New("no")
		version := uint64(99)
		_, err := c.JoinIf(ctx, "room", JoinOptions{Accept: func(v uint64) error { version = v; return no }})
		require.Equal(r, no, err)
		_, known := c.Metadata()
		require.Equal(r, known, version)
		require.False(r, c.In("room"))
		_, err = c.JoinIf(ctx, "room", JoinOptions{Accept: yes})
		require.NoError(r, err)
		was, err := c.LeaveIf(ctx, "room", store.CauseLeft, func(uint64) bool { return false })
		require.NoError(r, err)
		require.False(r, was)
		require.True(r, c.In("room"))
		was, err = c.LeaveIf(ctx, "room", store.CauseLeft, func(uint64) bool { return true })
		require.NoError(r, err)
		require.True(r, was)
		was, err = c.LeaveIf(ctx, "room", store.CauseLeft, func(uint64) bool { panic("not asked about nothing") })
		require.NoError(r, err)
		require.False(r, was)
	})
}

// A connection that waits for a frame stays out if it asks to leave, and comes back if it
// joins.
func TestJoinAndLeaveWhileWaitingForAFrame(t *testing.T) {
	virtual(t, func(r *rig) {
		for _, room := range []string{"leaves", "joins", "closes"} {
			r.rule(room, time.Second)
		}
		c := r.connect("a")
		r.join(c, "leaves")
		r.join(c, "joins")
		r.join(c, "closes")
		r.sleep(3 * time.Second)
		require.Len(r, r.told(), 6)
		r.forgetTold()
		r.leave(c, "leaves")
		assert.False(r, r.join(c, "joins").Again)
		assert.Equal(r, []string{"J a/joins"}, r.told())
		assert.Equal(r, []string{"closes", "joins"}, c.Rooms())
		c.Close(store.CauseClosed, false)
		<-c.Gone()
		assert.Equal(r, []string{"J a/joins", "L a/joins c"}, r.told())
		c.Touched()
		r.nothingLeft()
	})
}

// A frame that comes while the leave is written causes a new join after it.
func TestFrameDuringTheLeave(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("x", time.Second)
		c := r.connect("a")
		r.join(c, "x")
		r.plan(func(int, []store.Op) fault {
			return fault{before: 100 * time.Millisecond, after: 100 * time.Millisecond}
		})
		r.sleep(1100 * time.Millisecond) // the leave is in flight
		c.Touched()
		r.sleep(time.Second / 2)
		assert.Equal(r, []string{"J a/x", "L a/x s", "J a/x"}, r.told())
		r.atRest()
	})
}

// The rules change while a connection waits for a frame. After its return it is asked for
// signs of life as often as the new TTL needs.
func TestMinTTLAfterAReturn(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("room", time.Minute)
		l := &link{}
		c, err := r.Connect("c", nil, l, func() {})
		require.NoError(r, err)
		r.join(c, "room")
		r.sleep(62 * time.Second)
		r.rule("room", 2*time.Second)
		r.ApplyRules(r.Rooms())
		c.Touched()
		r.sleep(time.Second)
		told := l.told()
		assert.Equal(r, 2*time.Second, told[len(told)-1], "%v", told)
	})
}

// While Redis is away the leave is not answered. But its frame was a sign of life for the
// other rooms.
func TestLeaveReturnsTheOtherRoomsAtOnce(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("left", time.Second)
		r.rule("kept", time.Second)
		c := r.connect("c")
		r.join(c, "left")
		r.join(c, "kept")
		r.sleep(3 * time.Second) // silent: out of both
		r.away()
		began := time.Now()
		c.FrameSeen()
		go func() { _, _ = c.Leave(r.Context(), "left", store.CauseLeft) }()
		synctest.Wait()
		wanted, _, _ := c.checkRest()
		require.Equal(t, 1, wanted)
		require.Zero(t, time.Since(began))
		require.False(t, c.In("left"))
		r.heal()
		r.sleep(5 * time.Second)
		require.False(t, c.In("left"))
	})
}
