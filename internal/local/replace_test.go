package local

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/meshpresence/mesh/internal/store"
)

// A join takes the place of another connection of this server, which forgets its entry
// before anyone hears of it, and sends nothing about it.
func TestReplaceOnOneServer(t *testing.T) {
	var old, seen *Conn
	virtual(t, func(r *rig) {
		r.keep("room", 10*time.Second)
		r.join(r.connectAs("c", "ann"), "room")
		old, _ = r.Conn("c")
		r.publish(old, "room", "s1", 0)
		c := r.connectAs("d", "ann")
		joined, err := c.JoinIf(r.Context(), "room", JoinOptions{Replaces: "c"})
		require.NoError(r, err)
		require.Equal(r, "c", joined.Replaced)
		require.Equal(r, 1, joined.Total)
		require.Equal(r, old, seen)
		require.Equal(r, []string{"J c/room", "S c/room s1", "J d/room", "L c/room p"}, r.told())
		require.Empty(r, r.join(c, "room").Replaced, "it was in the room")
		old.Close(store.CauseLost, true)
		<-old.Gone()
		r.atRest()
		require.Empty(r, r.ops(store.OpLeave))
		require.EqualValues(r, 1, r.Stats().Replaced)
		require.Zero(r, r.Stats().Kept)
	}, withUsers, func(cfg *Config) {
		cfg.Replaced = func(room, conn, owner string, by *Conn, pos store.Position) {
			if room == "room" && conn == "c" && owner == "I1" && by.id == "d" && pos.Seq > 0 && !old.In(room) {
				seen = old
			}
		}
	})
}

// The place of a connection of another server, or a kept place, is taken.
func TestReplaceElsewhere(t *testing.T) {
	for name, h := range map[string]storedEntry{
		"another server": {entry: "x", inc: "other", user: "ann"},
		"a kept place":   {entry: "x", inc: store.NoOwner, user: "ann", keptUntil: time.Now().Add(time.Hour)},
		"another user":   {entry: "x", inc: "other", user: "bob"},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.redis.do(func() { r.redis.rooms["room"] = map[string]storedEntry{"c": h} })
				joined, err := r.connectAs("d", "ann").JoinIf(r.Context(), "room", JoinOptions{Replaces: "c"})
				require.NoError(r, err)
				s := r.Stats()
				switch name {
				case "another user":
					require.Empty(r, joined.Replaced)
					require.Empty(r, r.takeHeard())
				default:
					require.Equal(r, "c", joined.Replaced)
					require.Equal(r, []string{fmt.Sprintf("replaced c/room of %s by d", h.inc)}, r.takeHeard())
					require.EqualValues(r, 1, s.Replaced+s.Returned)
					require.Equal(r, h.kept(), s.Returned == 1)
				}
			}, withUsers)
		})
	}
}

// A connection that returns on this server ends the memory of the hand-over.
func TestReturnEndsMemoryOfHandOver(t *testing.T) {
	virtual(t, func(r *rig) {
		r.keep("room", 10*time.Second)
		c := r.connectAs("c", "ann")
		r.join(c, "room")
		c.Close(store.CauseLost, true)
		<-c.Gone()
		require.Equal(r, 1, r.Stats().Kept)
		d := r.connectAs("d", "ann")
		require.Equal(r, "c", r.join(d, "room").Replaced)
		require.Zero(r, r.Stats().Kept)
		r.leave(d, "room")
		require.Empty(r, r.join(d, "room").Replaced, "this join took none")
		r.sleep(11 * time.Second)
		r.atRest()
	}, withUsers)
}

// The reply to a join is lost. The retry reports the place that the join took.
func TestReplacedSurvivesLostReply(t *testing.T) {
	virtual(t, func(r *rig) {
		old := r.connectAs("c", "ann")
		r.join(old, "room")
		c := r.connectAs("d", "ann")
		require.NoError(r, c.Registered(r.Context()))
		r.plan(func(call int, _ []store.Op) fault { return fault{lost: call == 0} })
		joined, err := c.JoinIf(r.Context(), "room", JoinOptions{Replaces: "c"})
		require.NoError(r, err)
		require.Equal(r, "c", joined.Replaced)
		require.Equal(r, []string{"replaced c/room of I1 by d"}, r.takeHeard())
		require.False(r, old.In("room"))
		r.heartbeat(true)
		require.Len(r, r.redis.rooms["room"], 1)
		r.atRest()
	}, withUsers)
}

// Another server has taken the place of a connection of this one.
func TestForget(t *testing.T) {
	steps := []struct {
		name   string
		do     func(r *rig, c *Conn) // before
		pos    store.Position
		loses  bool
		leaves bool // an op removes what Redis may still list
	}{
		{name: "held", pos: store.Position{Epoch: "E", Seq: 5}, loses: true, leaves: true},
		{name: "the same position", pos: store.Position{Epoch: "E", Seq: 1}, loses: true, leaves: true},
		{name: "no position", loses: true, leaves: true},
		{name: "newer", pos: store.Position{Epoch: "E", Seq: 0}},
		{name: "has left", do: func(r *rig, c *Conn) { r.leave(c, "room") }, pos: store.Position{Epoch: "E", Seq: 5}},
		{
			name: "joins again", pos: store.Position{Epoch: "E", Seq: 5}, loses: true, leaves: true,
			do: func(r *rig, c *Conn) {
				r.leave(c, "room")
				r.plan(func(int, []store.Op) fault { return fault{before: time.Second} })
				go func() { _, _ = c.Join(r.Context(), "room") }()
				r.sleep(100 * time.Millisecond)
			},
		},
		{
			name: "silent", pos: store.Position{Epoch: "E", Seq: 5}, loses: true,
			do: func(r *rig, c *Conn) {
				r.sleep(3 * time.Second)
				r.redis.do(func() { r.redis.remove("room", "c", causeCleanedUp) })
			},
		},
		{
			name: "to be rebuilt", pos: store.Position{Epoch: "E", Seq: 5}, loses: true, leaves: true,
			do: func(r *rig, _ *Conn) {
				r.away()
				r.reregister("I2", false)
			},
		},
	}
	for _, step := range steps {
		t.Run(step.name, func(t *testing.T) {
			virtual(t, func(r *rig) {
				r.rule("room", 2*time.Second)
				r.keep("room", time.Minute)
				c := r.connectAs("c", "ann")
				r.join(c, "room")
				if step.do != nil {
					step.do(r, c)
				}
				before := len(r.ops(store.OpLeave))
				if step.loses && step.name != "silent" && step.name != "joins again" {
					// As the join of another server does it: the index of this one keeps the item.
					r.redis.do(func() { delete(r.redis.rooms["room"], "c") })
				}
				lost := r.Forget("room", "c", step.pos)
				require.Equal(r, step.loses, lost == c)
				require.Zero(r, r.Stats().Kept)
				require.Equal(r, step.loses || step.name == "has left", !c.In("room"))
				r.heal()
				for range 4 {
					c.Touched()
					r.sleep(time.Second)
				}
				require.Equal(r, step.leaves, len(r.ops(store.OpLeave)) > before)
				_, in := r.storedEntry("room", "c")
				require.Equal(r, c.In("room"), in)
				require.Nil(r, r.Forget("room", "c", store.Position{Epoch: "E", Seq: 0}))
				require.Nil(r, r.Forget("room", "unknown", step.pos))
				require.Nil(r, r.Forget("other", "c", step.pos))
				r.atRest()
			}, withUsers)
		})
	}
}

// A join of an entry that had taken a place before does not report that place again.
func TestJoinAfterSilenceTookNoPlace(t *testing.T) {
	virtual(t, func(r *rig) {
		r.rule("room", time.Second)
		r.join(r.connectAs("c", "ann"), "room")
		d := r.connectAs("d", "ann")
		joined, err := d.JoinIf(r.Context(), "room", JoinOptions{Replaces: "c"})
		require.NoError(r, err)
		require.Equal(r, "c", joined.Replaced)
		r.sleep(3 * time.Second)
		_, in := r.storedEntry("room", "d")
		require.False(r, in, "there is no grace")
		require.Empty(r, r.join(d, "room").Replaced)
	}, withUsers)
}
