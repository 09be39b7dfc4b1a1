package owner

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// gate is a MayReturn that says no, or yes, and counts.
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

func TestAReturnWaitsForItsPermission(t *testing.T) {
	g := &gate{}
	virtual(t, func(r *rig) {
		r.rule("room", 2*time.Second)
		c := r.connect("c")
		r.join(c, "room")
		in := func() bool { _, ok := r.held("room", "c"); return ok }
		silent := func() {
			r.Helper()
			r.sleep(5 * time.Second)
			require.False(r, in())
		}
		silent()
		for range 3 {
			c.Seen()
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

		// Silent again before it has the permission: the frame that counts is the
		// last one.
		silent()
		c.Seen()
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

		c.Seen()
		require.False(r, c.StayOut("room", func(uint64) bool { return false }))
		require.True(r, c.StayOut("room", func(uint64) bool { return true }))
		require.False(r, c.In("room"))
		asked := g.asked.Load()
		c.Seen()
		require.Equal(r, asked, g.asked.Load(), "it is over")
		r.join(c, "room")
		require.True(r, in())
	}, g.set)
}

// Which returns need a permission.
func TestWhatIsAReturn(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		do    func(r *rig, c *Conn)
		asked bool
	}{
		"silence": {asked: true, do: func(r *rig, _ *Conn) { r.sleep(10 * time.Second) }},
		"a stall": {asked: true, do: func(r *rig, _ *Conn) {
			r.redis.do(func() { r.redis.bury("I1") })
			r.reborn("I2", true)
			r.sleep(500 * time.Millisecond)
		}},
		"a rebirth": {do: func(r *rig, _ *Conn) { r.redis.do(func() { r.redis.bury("I1") }); r.reborn("I2", false) }},
		"data loss": {do: func(r *rig, _ *Conn) { r.redis.do(func() { clear(r.redis.rooms) }); r.heartbeat(true) }},
	} {
		t.Run(name, func(t *testing.T) {
			g := &gate{}
			virtual(t, func(r *rig) {
				r.rule("room", 2*time.Second)
				c := r.connect("c")
				r.join(c, "room")
				tc.do(r, c)
				c.Seen()
				r.sleep(time.Second)
				require.Equal(r, tc.asked, g.asked.Load() > 0)
				_, in := r.held("room", "c")
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
		_, err := c.JoinIf(ctx, "room", func(v uint64) error { version = v; return no })
		require.Equal(r, no, err)
		_, known := c.Metadata()
		require.Equal(r, known, version)
		require.False(r, c.In("room"))
		_, err = c.JoinIf(ctx, "room", yes)
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
